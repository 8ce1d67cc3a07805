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
from other_trainers import (
    ALPHA,
    BATCHES,
    EXAMPLES,
    IMAGES,
    LABELS,
    OF_SKORCH,
    PROGRAMS,
    RATE,
    TRAINERS,
    Model,
    accelerated_by_skorch,
    example_of,
    fastai_learner,
    fitted,
    ignited,
    trained_by_hand,
)
from torch import nn

from rdrop import (
    bernoulli_kl,
    binary_cross_entropy,
    rdrop_loss,
    repeat_batch,
    squared_difference,
    squared_error,
)

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported
pytestmark = [  # of the libraries' own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


REASONS = {"fastai": "fastai asks for torchvision, which does not fit every build of torch: pip install fastai"}
libraries = pytest.mark.parametrize("library", TRAINERS)


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    for library in TRAINERS:
        if library in request.node.name:
            pytest.importorskip(library, reason=REASONS.get(library, f"{library} is of the extra dev"))


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_an_accumulated_update_of_ignite_is_that_of_the_mean_of_its_batches() -> None:
    found = ignited(Model(), ALPHA, BATCHES[1:], gradient_accumulation_steps=2)
    assert_same_weights(found, trained_by_hand(ALPHA, [[(1 / 2, batch) for batch in BATCHES[1:]]]))


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_accumulation_of_skorch_by_accelerate_loses_all_batches_but_the_last_without_rdrop_too(alpha: float) -> None:
    """skorch 1.4 zeroes the gradients before the batch that ends an update."""
    found = accelerated_by_skorch(alpha, gradient_accumulation_steps=2)
    assert_same_weights(found, trained_by_hand(alpha, [[(1 / 2, BATCHES[1])]]))


def test_an_accumulated_update_of_fastai_is_that_of_all_its_examples() -> None:
    """Of three batches, the last of which is short."""
    from fastai.callback.training import GradientAccumulation

    found = fitted(fastai_learner(ALPHA, cbs=[example_of("fastai")["RDrop"](ALPHA), GradientAccumulation(40)])).model
    assert_same_weights(found, trained_by_hand(ALPHA, [[(len(batch[1]) / 40, batch) for batch in BATCHES]]))


def test_ignite_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the states of trainer, model and optimizer that its `Checkpoint` saves, masks seeded."""
    from ignite.engine import Events
    from ignite.handlers import Checkpoint, DiskSaver

    example = example_of("ignite")

    def parts() -> dict[str, Any]:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
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

    def net() -> Any:
        momentum = {"optimizer__momentum": 0.9}
        return example_of("skorch")["RDropClassifier"](Model, alpha=ALPHA, **momentum, **OF_SKORCH).initialize()

    data = IMAGES.numpy(), LABELS.numpy()
    files = {"f_params": tmp_path / "module.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    whole, resumed = net(), net()
    whole.partial_fit(*data)
    whole.save_params(**files)
    whole.partial_fit(*data)
    resumed.load_params(**files)
    resumed.partial_fit(*data)
    assert all(map(torch.equal, resumed.module_.parameters(), whole.module_.parameters()))


def test_skorch_scores_the_training_by_the_first_pass() -> None:
    from skorch.callbacks import EpochScoring

    scores = {"callbacks": [("train_acc", EpochScoring("accuracy", on_train=True, lower_is_better=False))]}
    one_batch = OF_SKORCH | {"batch_size": 40} | scores
    net = example_of("skorch")["RDropClassifier"](Model, alpha=ALPHA, **one_batch)
    net.fit(IMAGES.numpy(), LABELS.numpy())
    first_pass = Model().train()(repeat_batch(IMAGES))[:40]
    assert net.history[0, "accuracy"] == pytest.approx(
        (first_pass.argmax(-1) == LABELS).float().mean().item(), abs=1e-6
    )


def test_skorch_gives_one_output_for_each_example_outside_of_a_training_step() -> None:
    net = example_of("skorch")["RDropClassifier"](Model, alpha=ALPHA, **OF_SKORCH).fit(IMAGES.numpy(), LABELS.numpy())
    for training in (False, True):
        assert net.forward(IMAGES.numpy(), training=training).shape == (40, 10)


CRITERIA = {
    nn.BCEWithLogitsLoss: {"task_loss": binary_cross_entropy, "divergence": bernoulli_kl},
    nn.MSELoss: {"task_loss": squared_error, "divergence": squared_difference},
}
ONE_HOT = nn.functional.one_hot(LABELS, 10).float()


def one_update_by_hand(criterion: Any) -> nn.Module:
    return trained_by_hand(ALPHA, [[(1.0, (IMAGES, ONE_HOT))]], **CRITERIA[criterion])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_skorch_compares_the_passes_by_the_divergence_of_the_criterion(criterion: Any) -> None:
    from skorch import NeuralNet

    class Net(example_of("skorch")["RDrop"], NeuralNet):  # type: ignore[misc]
        pass

    divergence = CRITERIA[criterion]["divergence"]
    net = Net(Model, alpha=ALPHA, criterion=criterion, divergence=divergence, **OF_SKORCH | {"batch_size": 40})
    assert_same_weights(net.fit(IMAGES.numpy(), ONE_HOT.numpy()).module_, one_update_by_hand(criterion))
    assert net.get_params()["divergence"] is divergence


def test_skorch_learns_yes_or_no_of_one_number_for_each_example() -> None:
    from skorch import NeuralNetBinaryClassifier

    class Net(example_of("skorch")["RDrop"], NeuralNetBinaryClassifier):  # type: ignore[misc]
        pass

    class One(Model):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, 0]

    options = {"criterion": nn.BCEWithLogitsLoss, "divergence": bernoulli_kl, **OF_SKORCH, "batch_size": 40}
    yes = ONE_HOT[:, 0]
    found = Net(One, alpha=ALPHA, **options).fit(IMAGES.numpy(), yes.numpy()).module_
    model = One().train()
    losses = {"task_loss": binary_cross_entropy, "divergence": bernoulli_kl}
    rdrop_loss(model(repeat_batch(IMAGES)), yes, alpha=ALPHA, **losses).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= RATE * weight.grad
    assert_same_weights(found, model)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fastai_compares_the_passes_by_the_divergence_of_the_loss(criterion: Any) -> None:
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(IMAGES, ONE_HOT), 40)
    callback = example_of("fastai")["RDrop"](ALPHA, CRITERIA[criterion]["divergence"])
    learner = fastai_learner(ALPHA, loss_func=criterion(), cbs=callback, metrics=[])
    learner.dls = DataLoaders(loader, loader, device="cpu")
    assert_same_weights(fitted(learner).model, one_update_by_hand(criterion))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_fastai_has_the_loss_of_its_learner_after_training_was_interrupted(error: type[BaseException]) -> None:
    from fastai.callback.core import Callback

    class Interrupted(Callback):
        def before_backward(self) -> None:
            raise error("stop")

    learner = fastai_learner(ALPHA, loss_func=nn.CrossEntropyLoss())
    before = learner.loss_func
    with pytest.raises(error), learner.added_cbs(Interrupted()):
        fitted(learner)
    assert learner.loss_func is before
    assert_same_weights(fitted(learner).model, trained_by_hand(ALPHA))


def test_fastai_scores_the_training_by_the_first_pass() -> None:
    learner = fastai_learner(ALPHA, images=16)
    learner.recorder.train_metrics = True
    fitted(learner)
    first_pass = Model().train()(repeat_batch(IMAGES[:16]))[:16]
    right = (first_pass.argmax(-1) == LABELS[:16]).float().mean()
    assert learner.recorder.values[-1][1] == pytest.approx(right.item(), abs=1e-6)


def test_fastai_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From the weights and the optimizer that fastai saves, masks seeded."""
    from fastai.optimizer import SGD

    options = {"opt_func": partial(SGD, mom=0.9), "path": tmp_path, "moms": (0.9, 0.9, 0.9)}
    whole, resumed = (fastai_learner(ALPHA, **options) for _ in range(2))
    with resumed.no_logging():
        fitted(whole).save("first")
        resumed.create_opt()
        resumed.load("first")
    fitted(whole)
    fitted(resumed)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


@libraries
def test_an_epoch_of_another_trainer_ends_in_the_weights_of_a_loop_of_ones_own(library: str) -> None:
    found, _ = TRAINERS[library](ALPHA)
    expected, plain = trained_by_hand(ALPHA), trained_by_hand(0.0)
    assert_same_weights(found, expected)
    for with_rdrop, without in zip(expected.parameters(), plain.parameters(), strict=True):
        assert (with_rdrop - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    "of_loss",
    [{"weight": torch.arange(1.0, 11)}, {"label_smoothing": 0.5}, {"ignore_index": int(LABELS[0])}],
    ids=lambda of_loss: next(iter(of_loss)),
)
@pytest.mark.parametrize("library", ["skorch", "fastai"])
def test_the_loss_given_to_another_trainer_is_the_task_loss(library: str, of_loss: dict[str, Any]) -> None:
    found, _ = TRAINERS[library](ALPHA, **of_loss)
    assert_same_weights(found, trained_by_hand(ALPHA, **of_loss))


@libraries
def test_at_alpha_zero_another_trainer_ends_in_the_weights_of_plain_training_to_the_bit(library: str) -> None:
    found, _ = TRAINERS[library](0.0)
    assert all(map(torch.equal, found.parameters(), trained_by_hand(0.0).parameters()))


@libraries
def test_another_trainer_evaluates_with_one_pass_and_no_dropout(library: str) -> None:
    _, score = TRAINERS[library](ALPHA)
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


@pytest.mark.parametrize("criterion", ["binary_crossentropy", "mean_squared_error"])
def test_keras_compares_the_passes_by_the_divergence_of_a_subclass(criterion: str) -> None:
    other = keras_model(ALPHA)
    import keras

    of_loss = CRITERIA[nn.MSELoss if criterion == "mean_squared_error" else nn.BCEWithLogitsLoss]

    class Other(type(other)):  # type: ignore[misc]
        divergence = staticmethod(of_loss["divergence"])

    model = Other(other.inputs, other.outputs)
    model.alpha = ALPHA
    losses = {"binary_crossentropy": keras.losses.BinaryCrossentropy(from_logits=True)}
    model.compile(optimizer=keras.optimizers.SGD(0.5), loss=losses.get(criterion, criterion))
    before = [weight.value.detach().clone() for weight in other.trainable_weights]
    torch.manual_seed(1)
    rdrop_loss(other(repeat_batch(IMAGES), training=True), ONE_HOT, alpha=ALPHA, **of_loss).loss.backward()
    gradients = [weight.value.grad.clone() for weight in other.trainable_weights]
    torch.manual_seed(1)
    model.train_on_batch(IMAGES.numpy(), ONE_HOT.numpy())
    for found, start, gradient in zip(model.trainable_weights, before, gradients, strict=True):
        torch.testing.assert_close(found.value, start - 0.5 * gradient)


def test_keras_takes_classes_in_a_column_as_its_own_loss_does() -> None:
    """As `keras.datasets.cifar10` has them."""
    models = [keras_model(ALPHA), keras_model(ALPHA)]
    for model, labels in zip(models, (LABELS.numpy(), LABELS.numpy().astype("uint8")[:, None]), strict=True):
        torch.manual_seed(1)
        model.fit(IMAGES.numpy(), labels, batch_size=16, shuffle=False, verbose=0)
    for found, expected in zip(models[1].trainable_weights, models[0].trainable_weights, strict=True):
        assert torch.equal(found.value, expected.value)


def test_keras_saves_alpha_with_the_model(tmp_path: Path) -> None:
    model = keras_model(ALPHA)
    import keras

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects={type(model).__name__: type(model)})
    assert loaded.alpha == ALPHA


def test_an_update_of_keras_in_mixed_precision_is_that_of_the_gradient_written_out() -> None:
    """Keras' optimizer then divides the gradient by the scale of the loss."""
    keras_model(ALPHA)
    import keras

    images, labels = BATCHES[0]
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model, other = keras_model(ALPHA), keras_model(ALPHA)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    torch.manual_seed(1)
    model.train_on_batch(images.numpy(), labels.numpy())
    torch.manual_seed(1)
    rdrop_loss(other(repeat_batch(images), training=True), labels, alpha=ALPHA).loss.backward()
    for found, before in zip(model.trainable_weights, other.trainable_weights, strict=True):
        change = 0.5 * before.value.grad
        torch.testing.assert_close(before.value - found.value, change, rtol=0.01, atol=0.01 * change.abs().max().item())


@pytest.mark.parametrize("added", ["class_weight", "sample_weight", "regularizer"])
def test_keras_keeps_what_is_said_of_the_loss_beside_the_divergence(added: str) -> None:
    images, labels = BATCHES[0]
    model, other = keras_model(ALPHA), keras_model(ALPHA)
    import keras

    of_class, of_example, options = torch.arange(1.0, 11), torch.ones(16), {}
    if added == "class_weight":
        of_example, options = of_class[labels], {added: dict(enumerate(of_class.tolist()))}
    elif added == "sample_weight":
        of_example = torch.arange(16.0)
        options = {added: of_example.numpy()}
    else:
        model.trainable_weights[0].regularizer = keras.regularizers.L2(0.01)
    torch.manual_seed(1)
    model.train_on_batch(images.numpy(), labels.numpy(), **options)
    torch.manual_seed(1)
    logits = other(repeat_batch(images), training=True)
    losses = nn.functional.cross_entropy(logits, labels.repeat(2), reduction="none") * of_example.repeat(2)
    loss = losses.mean() + rdrop_loss(logits, labels, alpha=ALPHA, task_passes=()).loss
    if added == "regularizer":
        loss = loss + 0.01 * other.trainable_weights[0].value.square().sum()
    loss.backward()
    for found, before in zip(model.trainable_weights, other.trainable_weights, strict=True):
        torch.testing.assert_close(found.value, before.value - 0.5 * before.value.grad)


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


@pytest.mark.parametrize("library", [*TRAINERS, "keras"])
def test_the_example_of_another_trainer_learns(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    if library == "keras":
        keras_model(0.0)
    runpy.run_path(str(EXAMPLES / (PROGRAMS | {"keras": "keras_fit.py"})[library]), run_name="__main__")
    scores = re.findall(r"accuracy[a-z -]* (\d\.\d+)", capsys.readouterr().out)
    assert len(scores) >= 2
    assert min(map(float, scores)) > 0.7  # chance is 0.1
