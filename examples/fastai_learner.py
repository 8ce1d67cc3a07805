"""R-Drop in fastai, on scikit-learn's digits: a callback repeats the batch and adds the divergence.

    python examples/fastai_learner.py

Needs pip install fastai.
"""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import check_rdrop, rdrop_loss, repeat_batch


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


class RDrop(Callback):
    """Repeats the training batches and adds the divergence to their loss; validation is fastai's own. alpha 0: plain.

    The task loss is the learner's, which gets logits and is a mean over the batch; its class weights act on it alone.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def before_fit(self) -> None:
        """Called by fastai."""
        self.plain_loss = self.learn.loss_func
        self.learn.loss_func = self.loss

    def after_fit(self) -> None:
        """Called by fastai."""
        self.learn.loss_func = self.plain_loss

    def before_batch(self) -> None:
        """Called by fastai."""
        if self.training and self.alpha > 0:
            self.learn.xb = repeat_batch(self.xb)  # one forward of [x; x]: two dropout masks

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.learn.training or self.alpha == 0:
            return self.plain_loss(logits, labels)
        ignore_index = getattr(self.plain_loss, "ignore_index", -100)
        divergence = rdrop_loss(logits, labels, alpha=self.alpha, ignore_index=ignore_index, task_passes=())
        return self.plain_loss(logits, repeat_batch(labels)) + divergence.loss


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
