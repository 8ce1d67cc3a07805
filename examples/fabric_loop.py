"""R-Drop in a loop of your own with Lightning Fabric: accumulation and several processes, exact to the example.

    python examples/fabric_loop.py --processes 2

Needs Lightning and scikit-learn: pip install '.[lightning]' scikit-learn in the clone.

The labels of the whole update, over its accumulation steps and processes, are counted before its first forward
(`num_items`), so the short last batch of an epoch weighs as many examples as it has.
"""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import check_rdrop, rdrop_loss, repeat_batch

Batch = tuple[Tensor, Tensor]


def build_model(dropout: float = 0.3) -> nn.Module:
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def add_gradients(fabric: Fabric, model: nn.Module, batches: list[Batch], alpha: float) -> Tensor:
    """Computes the gradient of one update, `batches` being this process's part; returns its two terms, for the log."""
    count = torch.tensor(float(sum((labels != -100).sum() for _, labels in batches)), device=fabric.device)
    # DDP averages the gradients of the processes, which divides once more by their number.
    num_items = fabric.all_reduce(count, reduce_op="sum") / fabric.world_size
    terms = torch.zeros(2, device=fabric.device)
    for batch in batches:
        images, labels = batch
        with fabric.no_backward_sync(model, enabled=batch is not batches[-1]):
            logits = model(repeat_batch(images))  # one forward of [x; x]: two dropout masks
            loss, task_loss, divergence = rdrop_loss(logits, labels, alpha=alpha, num_items=num_items)
            fabric.backward(loss)
        terms += torch.stack([task_loss, divergence])
    return fabric.all_reduce(terms, reduce_op="mean")


def train(alpha: float, processes: int = 1, epochs: int = 15, accumulation: int = 2) -> float:
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = build_model()
    report = check_rdrop(model, images[:8])
    assert report.ok, report
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(images[:200], labels[:200]), 16, shuffle=True))
    fabric.seed_everything(fabric.global_rank, verbose=False)  # other dropout masks on every process
    for epoch in range(epochs):
        batches = list(loader)
        for start in range(0, len(batches), accumulation):
            task_loss, divergence = add_gradients(fabric, model, batches[start : start + accumulation], alpha).tolist()
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        if epoch % 5 == 4:
            fabric.print(f"  epoch {epoch + 1}: task loss {task_loss:.4f}, divergence {divergence:.4f}")
    model.eval()  # one pass, no dropout
    with torch.no_grad():
        return float((model(images[200:]).argmax(-1) == labels[200:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    processes = parser.parse_args().processes
    for alpha in (0.0, 5.0):
        print(f"alpha {alpha:g}: test accuracy {train(alpha, processes):.3f}")


if __name__ == "__main__":
    main()
