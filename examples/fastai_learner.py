"""R-Drop in fastai, on scikit-learn's digits: a callback repeats the batch and adds the divergence.

    python examples/fastai_learner.py

Needs pip install fastai.
"""

from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import check_rdrop, rdrop_loss, repeat_batch, split_passes, symmetric_kl


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


class RDrop(Callback):
    """Repeats the training batches and adds the divergence to their loss; validation is fastai's own. alpha 0: plain.

    The task loss is the learner's, which gets logits and is a mean over the batch; its class weights act on it alone.
    The divergence must fit it: `symmetric_kl` fits a cross-entropy, `bernoulli_kl` a binary cross-entropy,
    `squared_difference` a squared error.
    """

    run_valid = False

    def __init__(self, alpha: float, divergence: Any = symmetric_kl) -> None:
        self.alpha, self.divergence = alpha, divergence

    def before_batch(self) -> None:
        """Called by fastai."""
        if self.alpha > 0:  # one forward of [x; x]: two dropout masks
            self.learn.xb, self.learn.yb = repeat_batch(self.xb), repeat_batch(self.yb)

    def after_loss(self) -> None:
        """Called by fastai."""
        if self.alpha == 0:
            return
        logits = self.pred
        self.learn.pred, self.learn.yb = split_passes((logits, self.yb))[0]  # the first pass, for fastai's metrics
        of_loss = {"ignore_index": getattr(self.loss_func, "ignore_index", -100), "divergence": self.divergence}
        divergence = rdrop_loss(logits, *self.yb, alpha=self.alpha, task_passes=(), **of_loss)
        self.learn.loss_grad = self.loss_grad + divergence.loss
        self.learn.loss = self.loss_grad.clone()


def train(alpha: float, epochs: int = 20) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train_set, valid_set = TensorDataset(images[:200], labels[:200]), TensorDataset(images[200:], labels[200:])
    loaders = DataLoaders(DataLoader(train_set, 20, shuffle=True), DataLoader(valid_set, 256), device="cpu")
    learner = Learner(loaders, build_model(), nn.CrossEntropyLoss(), metrics=accuracy, cbs=RDrop(alpha))
    with learner.no_logging():
        learner.fit(epochs, 3e-3)
    _, score = learner.validate()
    return float(score)


def main() -> None:
    print(check_rdrop(build_model(), torch.rand(8, 64)))
    for alpha in (0.0, 5.0):
        print(f"alpha {alpha:g}: accuracy on other images {train(alpha):.3f}")


if __name__ == "__main__":
    main()
