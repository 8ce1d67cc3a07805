"""R-Drop in PyTorch-Ignite, on scikit-learn's digits: the batch is repeated where it is prepared, the loss is ours.

    python examples/ignite_trainer.py

Needs pip install pytorch-ignite scikit-learn.
"""

from typing import Any

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import check_rdrop, rdrop_loss, repeat_batch

Batch = tuple[Tensor, Tensor]


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


def rdrop_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, alpha: float, **options: Any) -> Engine:
    """Returns the trainer with R-Drop; `options` are those of `create_supervised_trainer`. alpha 0 is plain."""
    if alpha == 0:
        return create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, **options)

    def prepare_repeated(batch: Batch, device: Any, non_blocking: bool) -> Batch:
        images, labels = batch
        return repeat_batch(images.to(device, non_blocking=non_blocking)), labels.to(device, non_blocking=non_blocking)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return rdrop_loss(logits, labels, alpha=alpha).loss

    return create_supervised_trainer(model, optimizer, loss, prepare_batch=prepare_repeated, **options)


def train(alpha: float, epochs: int = 30) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train_set, test_set = (
        torch.utils.data.Subset(data, range(100)),
        torch.utils.data.Subset(data, range(100, len(data))),
    )
    model = build_model()
    trainer = rdrop_trainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3), alpha)
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})  # one pass, no dropout

    @trainer.on(Events.EPOCH_COMPLETED(every=10))
    def log(engine: Engine) -> None:
        print(f"  epoch {engine.state.epoch}: loss {engine.state.output:.4f}")

    trainer.run(DataLoader(train_set, 20, shuffle=True), max_epochs=epochs)
    return float(evaluator.run(DataLoader(test_set, 256)).metrics["accuracy"])


def main() -> None:
    print(check_rdrop(build_model(), torch.rand(8, 64)))
    for alpha in (0.0, 5.0):
        print(f"alpha {alpha:g}: test accuracy {train(alpha):.3f}")


if __name__ == "__main__":
    main()
