"""R-Drop in ignite, skorch, fastai and Keras by the loss alone, as the examples do it.

Each trains one epoch of a small model whose dropout draws the same masks in every forward of one size; a loop written
out here must end in the same weights.
"""

import os
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdrop import rdrop_loss, repeat_batch

EXAMPLES = Path(__file__).parents[2] / "examples"
ALPHA = 20.0
DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(40, 64, generator=DRAW), torch.randint(10, (40,), generator=DRAW)
BATCHES = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))  # the last is short

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported
pytestmark = [  # of the libraries' own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.layers(images)


def trained_by_hand(alpha: float) -> nn.Module:
    model = Model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for images, labels in BATCHES:
        if alpha == 0:
            loss = nn.functional.cross_entropy(model(images), labels)
        else:
            loss = rdrop_loss(model(repeat_batch(images)), labels, alpha=alpha).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 16)


def trained_by_ignite(example: dict[str, Any], alpha: float) -> tuple[nn.Module, float]:
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Accuracy

    model = Model()
    example["rdrop_trainer"](model, torch.optim.SGD(model.parameters(), lr=0.5), alpha).run(loader(), max_epochs=1)
    scores = create_supervised_evaluator(model, {"accuracy": Accuracy()}).run(loader()).metrics
    return model, scores["accuracy"]


def trained_by_skorch(example: dict[str, Any], alpha: float) -> tuple[nn.Module, float]:
    settings = {"max_epochs": 1, "lr": 0.5, "batch_size": 16, "verbose": 0, "train_split": None}
    net = example["RDropClassifier"](Model, alpha=alpha, **settings)
    net.fit(IMAGES.numpy(), LABELS.numpy())
    return net.module_, net.score(IMAGES.numpy(), LABELS.numpy())


def trained_by_fastai(example: dict[str, Any], alpha: float) -> tuple[nn.Module, float]:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD

    loaders = DataLoaders(loader(), loader(), device="cpu")
    options = {"opt_func": SGD, "metrics": accuracy, "cbs": example["RDrop"](alpha)}
    learner = Learner(loaders, Model(), nn.CrossEntropyLoss(), **options)
    with learner.no_logging():
        learner.fit(1, 0.5, wd=0.0)
    return learner.model, learner.validate()[1]


def test_an_accumulated_update_of_ignite_is_that_of_the_mean_of_its_batches() -> None:
    model, other = Model(), Model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    example = example_of("ignite", "ignite_trainer.py")
    example["rdrop_trainer"](model, optimizer, ALPHA, gradient_accumulation_steps=2).run(BATCHES[:2], max_epochs=1)
    for images, labels in BATCHES[:2]:
        (rdrop_loss(other(repeat_batch(images)), labels, alpha=ALPHA).loss / 2).backward()
    for found, before in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, before - 0.5 * before.grad)


def test_ignite_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the states of trainer, model and optimizer that its `Checkpoint` saves, masks seeded."""
    from ignite.engine import Events
    from ignite.handlers import Checkpoint, DiskSaver

    example = example_of("ignite", "ignite_trainer.py")

    def parts() -> dict[str, Any]:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "trainer": example["rdrop_trainer"](model, optimizer, ALPHA)}

    whole = parts()
    checkpoint = Checkpoint(
        whole, DiskSaver(str(tmp_path)), global_step_transform=lambda *_: whole["trainer"].state.epoch
    )
    whole["trainer"].add_event_handler(Events.EPOCH_COMPLETED(once=1), checkpoint)
    whole["trainer"].run(BATCHES, max_epochs=2)
    resumed = parts()
    Checkpoint.load_objects(resumed, torch.load(tmp_path / "checkpoint_1.pt"))
    resumed["trainer"].run(BATCHES, max_epochs=2)
    assert all(map(torch.equal, resumed["model"].parameters(), whole["model"].parameters()))


def test_skorch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the module and the optimizer that skorch saves, masks seeded."""
    example = example_of("skorch", "skorch_search.py")

    def net() -> Any:
        settings = {"max_epochs": 1, "lr": 0.5, "batch_size": 16, "verbose": 0, "train_split": None}
        return example["RDropClassifier"](Model, alpha=ALPHA, optimizer__momentum=0.9, **settings).initialize()

    data = IMAGES.numpy(), LABELS.numpy()
    files = {"f_params": tmp_path / "module.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    whole, resumed = net(), net()
    whole.partial_fit(*data)
    whole.save_params(**files)
    whole.partial_fit(*data)
    resumed.load_params(**files)
    resumed.partial_fit(*data)
    assert all(map(torch.equal, resumed.module_.parameters(), whole.module_.parameters()))


def fastai_learner(example: dict[str, Any], folder: Path, **options: Any) -> Any:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    loaders = DataLoaders(loader(), loader(), device="cpu")
    made = Learner(
        loaders,
        Model(),
        nn.CrossEntropyLoss(),
        opt_func=partial(SGD, mom=0.9),
        path=folder,
        moms=(0.9, 0.9, 0.9),
        **options,
    )
    made.add_cb(example["RDrop"](ALPHA))
    return made


def test_fastai_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the weights and the optimizer that fastai saves, masks seeded."""
    example = example_of("fastai", "fastai_learner.py")
    whole, resumed = fastai_learner(example, tmp_path), fastai_learner(example, tmp_path)
    with whole.no_logging(), resumed.no_logging():
        whole.fit(1, 0.5, wd=0.0)
        whole.save("first")
        whole.fit(1, 0.5, wd=0.0)
        resumed.create_opt()
        resumed.load("first")
        resumed.fit(1, 0.5, wd=0.0)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


TRAINERS = {
    "ignite": ("ignite_trainer.py", trained_by_ignite),
    "skorch": ("skorch_search.py", trained_by_skorch),
    "fastai": ("fastai_learner.py", trained_by_fastai),
}
REASONS = {
    "fastai": "fastai asks for torchvision, which does not fit every build of torch: pip install fastai",
}


def example_of(library: str, file: str) -> dict[str, Any]:
    pytest.importorskip(library, reason=REASONS.get(library, f"{library} is of the extra dev"))
    return runpy.run_path(str(EXAMPLES / file), run_name="example")


@pytest.mark.parametrize("library", TRAINERS)
def test_an_epoch_of_another_trainer_ends_in_the_weights_of_a_loop_of_ones_own(library: str) -> None:
    file, train = TRAINERS[library]
    found, _ = train(example_of(library, file), ALPHA)
    expected, plain = trained_by_hand(ALPHA), trained_by_hand(0.0)
    for one, other, without in zip(found.parameters(), expected.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert (other - without).abs().max() > 1e-3  # R-Drop did something


@pytest.mark.parametrize("library", TRAINERS)
def test_at_alpha_zero_another_trainer_ends_in_the_weights_of_plain_training_to_the_bit(library: str) -> None:
    file, train = TRAINERS[library]
    found, _ = train(example_of(library, file), 0.0)
    for one, other in zip(found.parameters(), trained_by_hand(0.0).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("library", TRAINERS)
def test_another_trainer_evaluates_with_one_pass_and_no_dropout(library: str) -> None:
    file, train = TRAINERS[library]
    _, score = train(example_of(library, file), ALPHA)
    model = trained_by_hand(ALPHA).eval()
    right = (model(IMAGES).argmax(-1) == LABELS).float().mean()
    assert float(score) == pytest.approx(right.item(), abs=1e-6)


def keras_model(alpha: float, accumulation: int | None = None, momentum: float = 0.0) -> Any:
    pytest.importorskip("keras", reason="keras is of the extra dev")
    import keras

    if keras.config.backend() != "torch":
        pytest.skip(f"Keras runs on {keras.config.backend()} in this process; R-Drop needs KERAS_BACKEND=torch")
    keras.utils.set_random_seed(0)
    model = runpy.run_path(str(EXAMPLES / "keras_fit.py"), run_name="example")["build_model"](alpha)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.5, momentum=momentum, gradient_accumulation_steps=accumulation)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def test_an_update_of_keras_is_that_of_the_gradient_written_out() -> None:
    images, labels = BATCHES[0]
    model, other = keras_model(ALPHA), keras_model(ALPHA)
    torch.manual_seed(1)
    model.train_on_batch(images.numpy(), labels.numpy())
    torch.manual_seed(1)
    with_masks = other(repeat_batch(images), training=True)
    rdrop_loss(with_masks, labels, alpha=ALPHA).loss.backward()
    for found, before in zip(model.trainable_weights, other.trainable_weights, strict=True):
        expected = before.value - 0.5 * before.value.grad
        torch.testing.assert_close(found.value, expected)
        assert before.value.grad.abs().max() > 1e-4


def test_at_alpha_zero_keras_trains_as_without_rdrop_to_the_bit() -> None:
    model, other = keras_model(0.0), keras_model(0.0)
    import keras

    plain = keras.Model(other.inputs, other.outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(optimizer=keras.optimizers.SGD(0.5), loss=loss)
    for each in (model, plain):
        torch.manual_seed(1)
        each.train_on_batch(IMAGES.numpy(), LABELS.numpy())
    for found, expected in zip(model.trainable_weights, plain.trainable_weights, strict=True):
        assert torch.equal(found.value, expected.value)


def test_an_accumulated_update_of_keras_is_that_of_the_mean_of_its_batches() -> None:
    """Two batches of 16, whose masks are drawn alike."""
    model, other = keras_model(ALPHA, accumulation=2), keras_model(ALPHA)
    for images, labels in BATCHES[:2]:
        torch.manual_seed(1)
        model.train_on_batch(images.numpy(), labels.numpy())
        torch.manual_seed(1)
        (rdrop_loss(other(repeat_batch(images), training=True), labels, alpha=ALPHA).loss / 2).backward()
    for found, before in zip(model.trainable_weights, other.trainable_weights, strict=True):
        torch.testing.assert_close(found.value, before.value - 0.5 * before.value.grad)


def test_keras_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the weights and the optimizer's state that Keras saves, masks seeded."""
    whole, first, second = (keras_model(ALPHA, momentum=0.9) for _ in range(3))

    def train(model: Any, batches: list[Any]) -> None:
        for images, labels in batches:
            torch.manual_seed(1)
            model.train_on_batch(images.numpy(), labels.numpy())

    train(whole, BATCHES[:2])
    train(first, BATCHES[:1])
    first.save_weights(tmp_path / "model.weights.h5")
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "model.weights.h5")
    train(second, BATCHES[1:2])
    for found, expected in zip(second.trainable_weights, whole.trainable_weights, strict=True):
        assert torch.equal(found.value, expected.value)


def test_keras_evaluates_with_one_pass_and_no_dropout() -> None:
    model = keras_model(ALPHA)
    model.fit(IMAGES.numpy(), LABELS.numpy(), epochs=1, batch_size=16, verbose=0)
    score = model.evaluate(IMAGES.numpy(), LABELS.numpy(), verbose=0, return_dict=True)["accuracy"]
    right = (model(IMAGES, training=False).argmax(-1) == LABELS).float().mean()
    assert score == pytest.approx(right.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("library", "file"),
    [*((library, file) for library, (file, _) in TRAINERS.items()), ("keras", "keras_fit.py")],
)
def test_the_example_of_another_trainer_learns(library: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    if library == "keras":
        keras_model(0.0)
    example_of(library, file)["main"]()
    scores = re.findall(r"accuracy[a-z -]* (\d\.\d+)", capsys.readouterr().out)
    assert len(scores) >= 2
    assert min(map(float, scores)) > 0.7  # chance is 0.1
