"""R-Drop in a loop of your own with Accelerate: gradient accumulation and several processes, exact to the label.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

A tagger says of every token whether it is larger than the one before it; sentences differ in length, so batches differ
in how many labels they have. Needs accelerate: pip install '.[transformers]' in the clone.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import check_rdrop, rdrop_loss, repeat_batch


class Tagger(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(12, 48), nn.GRU(48, 48, batch_first=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(48, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(states))


def sentences(count: int, seed: int) -> TensorDataset:
    """3 to 20 tokens each, and a label for every token but the first; -100 stands where there is none."""
    draw = torch.Generator().manual_seed(seed)
    tokens, lengths = (
        torch.randint(1, 12, (count, 20), generator=draw),
        torch.randint(3, 21, (count, 1), generator=draw),
    )
    labels, place = (tokens > tokens.roll(1, 1)).long(), torch.arange(20)
    return TensorDataset(tokens, labels.masked_fill((place == 0) | (place >= lengths), -100))


def add_gradients(accelerator: Accelerator, model: nn.Module, batches: list, alpha: float) -> None:
    """Computes the gradient of one update, `batches` being this process's part of it."""
    count = torch.stack([(labels != -100).sum() for _, labels in batches]).sum()
    # DDP averages the gradients of the processes, which divides once more by their number.
    num_items = accelerator.reduce(count, "sum") / accelerator.num_processes
    for number, (tokens, labels) in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):  # exchanged in the last one only
            logits = model(repeat_batch(tokens))  # one forward of [x; x]: two dropout masks
            accelerator.backward(rdrop_loss(logits, labels, alpha=alpha, num_items=num_items).loss)


def train(alpha: float, epochs: int = 8, accumulation: int = 2) -> None:
    # No gradient_accumulation_steps here: backward() would divide by it what num_items has divided already.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # told so, it finds the processes on CPUs too
    set_seed(0)
    model = Tagger()
    assert check_rdrop(model, torch.ones(8, 5, dtype=torch.long)).ok
    train_set, valid_set = (DataLoader(sentences(count, seed=count), 16, shuffle=True) for count in (640, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, train_set, valid_set = accelerator.prepare(model, optimizer, train_set, valid_set)
    set_seed(0, device_specific=True)  # other dropout masks on every process
    for _ in range(epochs):
        batches = list(train_set)
        for start in range(0, len(batches), accumulation):
            add_gradients(accelerator, model, batches[start : start + accumulation], alpha)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()  # one pass, no dropout
    with torch.no_grad():
        rows = [accelerator.gather_for_metrics((model(tokens).argmax(-1), labels)) for tokens, labels in valid_set]
    found, labels = map(torch.cat, zip(*rows, strict=True))
    right = (found == labels)[labels != -100].float()
    accelerator.print(f"alpha {alpha:g}: accuracy on other sentences {right.mean():.3f}")


if __name__ == "__main__":
    for alpha in (0.0, 1.0):
        train(alpha)
