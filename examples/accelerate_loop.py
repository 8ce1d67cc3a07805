"""R-Drop in a loop of your own with Accelerate: gradient accumulation and several processes, exact to the label.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

A tagger says of every token whether it is larger than the one before it; sentences differ in length, so batches differ
in how many labels they have. Needs accelerate: pip install '.[transformers]' in the clone.

What differs from plain Accelerate code: the batch is repeated, and the labels of the whole update, over its
accumulation steps and processes, are counted before its first forward (`num_items`). Then alpha and the learning rate
mean the same however an update is cut; a mean of means would weigh the labels of short batches more.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from rdrop import check_rdrop, rdrop_loss, repeat_batch

IGNORED = -100
VOCABULARY = 12
Batch = dict[str, Tensor]


class Tagger(nn.Module):
    def __init__(self, hidden: int = 48, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.recurrent = nn.GRU(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(N, T)` to the logits `(N, T, 2)`."""
        states, _ = self.recurrent(self.dropout(self.embedding(tokens)))
        logits: Tensor = self.head(self.dropout(states))
        return logits


def sentences(count: int, seed: int) -> list[Batch]:
    """3 to 20 tokens each, and a label for every token but the first."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (count,), generator=draw).tolist()
    texts = [torch.randint(1, VOCABULARY, (length,), generator=draw) for length in lengths]
    return [
        {"tokens": text, "labels": torch.cat([torch.tensor([IGNORED]), (text[1:] > text[:-1]).long()])}
        for text in texts
    ]


def padded(examples: list[Batch]) -> Batch:
    tokens = pad_sequence([example["tokens"] for example in examples], batch_first=True)
    labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=IGNORED)
    return {"tokens": tokens, "labels": labels}


def add_gradients(
    accelerator: Accelerator, model: nn.Module, batches: list[Batch], alpha: float
) -> tuple[Tensor, Tensor]:
    """The gradient of one update, `batches` being this process's part of it; returns its two terms, for the log."""
    counts = torch.stack([(batch["labels"] != IGNORED).sum() for batch in batches])
    # DDP averages the gradients of the processes, which divides once more by their number.
    num_items = accelerator.reduce(counts.sum(), "sum") / accelerator.num_processes
    terms = torch.zeros(2, device=accelerator.device)
    for batch in batches:
        # Processes exchange gradients in the last backward only.
        with nullcontext() if batch is batches[-1] else accelerator.no_sync(model):
            logits = model(repeat_batch(batch["tokens"]))  # one forward of [x; x]: two dropout masks
            loss, task_loss, divergence = rdrop_loss(logits, batch["labels"], alpha=alpha, num_items=num_items)
            accelerator.backward(loss)
        terms += torch.stack([task_loss, divergence])
    task_loss, divergence = accelerator.reduce(terms, "mean")
    return task_loss, divergence


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    while True:
        yield from loader


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Batch]) -> float:
    model.eval()  # one pass, no dropout
    right_and_all = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        counted = batch["labels"] != IGNORED
        right = (model(batch["tokens"]).argmax(-1) == batch["labels"]) & counted
        right_and_all += torch.stack([right.sum(), counted.sum()])
    right_total, total = accelerator.reduce(right_and_all, "sum").tolist()
    model.train()
    return right_total / total


def train(alpha: float, updates: int = 150, accumulation: int = 2, batch_size: int = 16) -> float:
    # No gradient_accumulation_steps here: backward() would divide by it what num_items has divided already.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # told so, it finds the processes on CPUs too
    set_seed(0)
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_set = DataLoader(sentences(640, seed=1), batch_size, shuffle=True, drop_last=True, collate_fn=padded)
    valid_set = DataLoader(sentences(256, seed=2), batch_size, collate_fn=padded)
    model, optimizer, train_set, valid_set = accelerator.prepare(model, optimizer, train_set, valid_set)
    set_seed(0, device_specific=True)  # other dropout masks on every process

    batches = endless(train_set)
    for update in range(1, updates + 1):
        part = list(islice(batches, accumulation))
        if update == 1 and alpha > 0:
            report = check_rdrop(model, part[0]["tokens"])
            assert report.ok, report
        task_loss, divergence = add_gradients(accelerator, model, part, alpha)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % 50 == 0:
            accelerator.print(f"  update {update}: task loss {task_loss:.4f}, divergence {divergence:.4f}")
    return accuracy(accelerator, model, valid_set)


def main() -> None:
    for alpha in (0.0, 1.0):
        score = train(alpha)
        PartialState().print(f"alpha {alpha:g}: accuracy on other sentences {score:.3f}")


if __name__ == "__main__":
    main()
