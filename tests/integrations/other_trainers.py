"""A small model trained by ignite, skorch and fastai as the examples do it, and by a loop of one's own."""

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rdrop import rdrop_loss, repeat_batch

EXAMPLES = Path(__file__).parents[2] / "examples"
ALPHA = 20.0
RATE = 0.5
DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(40, 64, generator=DRAW), torch.randint(10, (40,), generator=DRAW)
BATCHES = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))  # the last is short


class Model(nn.Module):
    """Draws the same masks in every forward of one size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.layers(images)


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


# -------------------------------------------------------------------------------------------- a loop of one's own


def loss_by_hand(model: nn.Module, images: Tensor, labels: Tensor, alpha: float, **of_loss: Any) -> Tensor:
    if alpha == 0:
        return nn.functional.cross_entropy(model(images), labels, **of_loss)
    return rdrop_loss(model(repeat_batch(images)), labels, alpha=alpha, **of_loss).loss


def trained_by_hand(alpha: float, updates: Any = None, **of_loss: Any) -> nn.Module:
    """After updates of weighted batches, `(weight, batch)`; unless given, one for every batch."""
    model = Model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for update in [[(1.0, batch)] for batch in BATCHES] if updates is None else updates:
        optimizer.zero_grad()
        for weight, batch in update:
            (weight * loss_by_hand(model, *batch, alpha, **of_loss)).backward()
        optimizer.step()
    return model


# ---------------------------------------------------------------------------------------------------- the libraries


def example_of(library: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / PROGRAMS[library]), run_name="example")


PROGRAMS = {"ignite": "ignite_trainer.py", "skorch": "skorch_search.py", "fastai": "fastai_learner.py"}


def ignited(model: nn.Module, alpha: float, batches: Any = BATCHES, **options: Any) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    example_of("ignite")["rdrop_trainer"](model, optimizer, alpha, **options).run(batches, max_epochs=1)
    return model


def trained_by_ignite(alpha: float) -> tuple[nn.Module, float]:
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Accuracy

    model = ignited(Model(), alpha)
    scores = create_supervised_evaluator(model, {"accuracy": Accuracy()}).run(BATCHES).metrics
    return model, scores["accuracy"]


OF_SKORCH = {"max_epochs": 1, "lr": RATE, "batch_size": 16, "verbose": 0, "train_split": None}


def trained_by_skorch(alpha: float, **of_loss: Any) -> tuple[nn.Module, float]:
    criterion = {f"criterion__{name}": setting for name, setting in of_loss.items()}
    net = example_of("skorch")["RDropClassifier"](Model, alpha=alpha, **OF_SKORCH, **criterion)
    net.fit(IMAGES.numpy(), LABELS.numpy())
    return net.module_, net.score(IMAGES.numpy(), LABELS.numpy())


def accelerated_by_skorch(alpha: float = ALPHA, **accelerate: Any) -> nn.Module:
    """After one epoch of the first two batches.

    The criterion is a function: Accelerate would give a module DDP on CPUs, which is an error where it has no weights.
    """
    from accelerate import Accelerator
    from skorch import NeuralNetClassifier
    from skorch.hf import AccelerateMixin

    class Accelerated(example_of("skorch")["RDrop"], AccelerateMixin, NeuralNetClassifier):  # type: ignore[misc]
        pass

    accelerator = Accelerator(cpu=True, **accelerate)
    net = Accelerated(
        Model, alpha=alpha, accelerator=accelerator, criterion=lambda: nn.functional.cross_entropy, **OF_SKORCH
    )
    return net.fit(IMAGES[:32].numpy(), LABELS[:32].numpy()).module_


def fastai_learner(alpha: float, images: int = 40, **options: Any) -> Any:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD

    loader = DataLoader(TensorDataset(IMAGES[:images], LABELS[:images]), 16)
    options = {"opt_func": SGD, "metrics": accuracy, "cbs": example_of("fastai")["RDrop"](alpha)} | options
    options = {"loss_func": nn.CrossEntropyLoss()} | options
    return Learner(DataLoaders(loader, loader, device="cpu"), Model(), **options)


def fitted(learner: Any) -> Any:
    with learner.no_logging():
        learner.fit(1, RATE, wd=0.0)
    return learner


def trained_by_fastai(alpha: float, **of_loss: Any) -> tuple[nn.Module, float]:
    learner = fitted(fastai_learner(alpha, loss_func=nn.CrossEntropyLoss(**of_loss)))
    return learner.model, learner.validate()[1]


TRAINERS = {"ignite": trained_by_ignite, "skorch": trained_by_skorch, "fastai": trained_by_fastai}


# ---------------------------------------------------------------------------------------- one process of several


def together_by_ignite() -> nn.Module:
    import ignite.distributed as idist

    model = Model()
    ignited(idist.auto_model(model), ALPHA, [BATCHES[idist.get_rank()]])
    return model


def together_by_fastai() -> nn.Module:
    """fastai spreads the order of the examples by CUDA alone, so this says how on a CPU."""
    from fastai import distributed

    def broadcast(self: Any, order: Any, rank: int) -> Any:
        order = torch.tensor(order)
        dist.broadcast(order, rank)
        return order.tolist()

    distributed.DistributedDL._broadcast = broadcast
    learner = fastai_learner(ALPHA, images=32)
    with learner.distrib_ctx(sync_bn=False, cpu=True):
        fitted(learner)
    return learner.model


TOGETHER = {"ignite": together_by_ignite, "skorch": accelerated_by_skorch, "fastai": together_by_fastai}


def weights_of_all() -> dict[str, list[Tensor]]:
    """By library, those after one update of two processes with one batch each."""
    libraries = [library for library in TOGETHER if is_installed(library)]
    return {library: [weight.detach() for weight in TOGETHER[library]().parameters()] for library in libraries}
