"""R-Drop in Lightning and in Fabric: the gradient of the whole update, plain at alpha 0, and what is refused."""

import re
import runpy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="Lightning is an extra: pip install '.[lightning]'")

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from rdrop.integrations.lightning import RDropCallback
from rdrop.integrations.targets import Target
from rdrop.terms import cross_entropy, squared_difference, squared_error

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of Lightning's own code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # its advice on workers and checkpoints
]


@pytest.fixture(scope="module")
def agreement() -> Any:
    """The functions of `lightning_agreement.py`, in this process."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "lightning_agreement.py"), run_name="agreement"))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_of_an_update_of_lightning_is_that_of_the_whole_batch(agreement: Any, accumulation: int) -> None:
    """Ragged labels; the second of four batches has none."""
    difference, trainer = agreement.of_lightning(accumulation)
    assert difference < 1e-12
    tokens, labels = agreement.whole(agreement.ragged(accumulation))
    model = agreement.Tagger([]).train()
    _, task_loss, divergence = agreement.rdrop_loss(model(tokens.repeat(2, 1)), labels, alpha=1.0)
    assert trainer.callback_metrics["task_loss"].item() == pytest.approx(task_loss.item(), rel=1e-6)
    assert trainer.callback_metrics["divergence"].item() == pytest.approx(divergence.item(), rel=1e-6)


def test_at_alpha_zero_the_gradient_is_that_of_cross_entropy_of_the_whole_batch(agreement: Any) -> None:
    difference, trainer = agreement.of_lightning(4, alpha=0.0)
    assert difference < 1e-12
    assert "divergence" not in trainer.callback_metrics


def test_the_gradient_of_an_update_of_fabric_is_that_of_the_whole_batch(agreement: Any) -> None:
    assert agreement.of_fabric(4) < 1e-12


def test_two_processes_have_the_gradient_of_the_whole_batch_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    """2 processes x 1 and x 4 batches, of Lightning and of Fabric; then a run that stops and goes on."""
    environment = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *environment, str(HERE / "lightning_agreement.py"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    found = dict(re.findall(r"^(\w+ \S+): (\S+)$", run.stdout, re.MULTILINE))
    assert found.pop("resumed 2") == "True"
    assert set(found) == {"lightning 2x1", "lightning 2x4", "fabric 2x1", "fabric 2x4"}
    assert max(map(float, found.values())) < 1e-12


class Classifier(L.LightningModule):  # type: ignore[misc, unused-ignore]
    def __init__(self, rdrop: RDropCallback | None, dropout: float = 0.1, step: Any = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.rdrop, self.step = rdrop, step

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.rdrop is None else [self.rdrop]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.step is not None:
            return self.step(self, images, labels)
        if self.rdrop is None:
            return nn.functional.cross_entropy(self.layers(images), labels)
        return self.rdrop.loss(self.layers(self.rdrop.repeat(images)), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(model: L.LightningModule, batch_size: int = 16, **options: Any) -> L.LightningModule:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 6, generator=draw), torch.randint(3, (64,), generator=draw))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_model_summary=False, devices=1, **quiet, **options)
    torch.manual_seed(0)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size))
    return model


def fitted_with_rising_alpha(folder: Path, resume: bool = False, **options: Any) -> tuple[L.LightningModule, Any]:
    """After three epochs of two updates, with the alpha that was logged of each; masks are those of the step."""
    logged = []

    def step(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(model.trainer.global_step)
        return model.rdrop.loss(model.layers(model.rdrop.repeat(images)), labels)

    class Watched(RDropCallback):
        def on_before_optimizer_step(self, *arguments: Any) -> None:
            super().on_before_optimizer_step(*arguments)
            logged.append(arguments[0].callback_metrics["alpha"].item())

    model = Classifier(Watched(**({"alpha": 3.6, "alpha_schedule": "quadratic"} | options)), step=step)
    data = torch.utils.data.TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), LABELS)
    trainer = L.Trainer(
        max_epochs=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1)],
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, 16), ckpt_path=folder / "step=2.ckpt" if resume else None)
    return model, logged


LABELS = torch.arange(64) % 3


def test_alpha_rises_with_the_updates_of_lightning_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, logged = fitted_with_rising_alpha(tmp_path)
    assert logged == pytest.approx([3.6 * (update / 6) ** 2 for update in range(1, 7)])
    resumed, logged_after = fitted_with_rising_alpha(tmp_path, resume=True)
    assert logged_after == logged[2:]
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    _, logged = fitted_with_rising_alpha(tmp_path / "auto", alpha="auto", alpha_schedule="constant")
    assert logged[-1] == 4


def test_an_alpha_that_rises_over_an_unknown_number_of_updates_is_refused() -> None:
    trainer = L.Trainer(max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"their number \(=0\) is not known: give the training"):
        trainer.fit(Classifier(RDropCallback(alpha="auto")), torch.utils.data.DataLoader(LABELS))
    with pytest.raises(ValueError, match="must be 'constant', 'linear' or 'quadratic'"):
        RDropCallback(alpha=1.0, alpha_schedule="cosine")


def test_training_that_ends_early_says_how_far_alpha_rose() -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended after 1 of 4 updates, when alpha had risen to 0\.25 of 4"):
        fitted(Classifier(RDropCallback(alpha="auto")), callbacks=[Stops()])


def test_at_alpha_zero_training_is_plain_lightning_to_the_bit() -> None:
    """Where the labels of an update are a power of two, by which division does not round."""
    for options in ({}, {"accumulate_grad_batches": 2}):
        plain = fitted(Classifier(None), **options)
        own = fitted(Classifier(RDropCallback(alpha=0.0)), **options)
        for one, other in zip(plain.parameters(), own.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_gradient_is_clipped_after_it_is_divided() -> None:
    """A summed gradient would always be clipped."""
    free = fitted(Classifier(RDropCallback(alpha=1.0)))
    clipped = fitted(Classifier(RDropCallback(alpha=1.0)), gradient_clip_val=5.0)
    for one, other in zip(free.parameters(), clipped.parameters(), strict=True):
        assert torch.equal(one, other)


def mean_loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model.layers(images), labels)


def loss_without_repeating(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return model.rdrop.loss(model.layers(images), labels)


def two_losses(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    logits = model.layers(model.rdrop.repeat(images))
    return model.rdrop.loss(logits, labels) + model.rdrop.loss(logits, labels)


def weighted_loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    target = Target(labels, class_weight=torch.tensor([1.0, 2.0, 3.0]))
    return model.rdrop.loss(model.layers(model.rdrop.repeat(images)), target)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (mean_loss, "training_step did not call loss of this RDropCallback"),
        (loss_without_repeating, "16 rows of logits for 16 of labels: with passes=2 the model must see 32 rows"),
        (two_losses, "a second loss for the same batch"),
        (weighted_loss, "class weights divide the task loss by their sum"),
    ],
)
def test_a_training_step_that_would_train_something_else_is_refused(step: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(Classifier(RDropCallback(alpha=1.0), step=step))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_task_loss_with_the_weights_in_it_trains_as_the_error_says(alpha: float) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])

    def trained(task_loss: Any) -> nn.Module:
        def step(model: Any, images: Tensor, labels: Tensor) -> Tensor:
            return model.rdrop.loss(model.layers(model.rdrop.repeat(images)), Target(labels, task_loss=task_loss))

        return fitted(Classifier(RDropCallback(alpha=alpha), step=step))

    found, expected, plain = (
        trained(task_loss)
        for task_loss in (
            partial(cross_entropy, weight=weight),
            lambda logits, labels: nn.functional.cross_entropy(logits, labels, weight, reduction="none"),
            cross_entropy,
        )
    )
    for one, other, without in zip(found.parameters(), expected.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, without)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_batch_without_a_loss_is_left_out_of_its_update(alpha: float) -> None:
    """Lightning divides by the batches of an update all the same; here the labels that there were divide."""

    def some(model: Any, images: Tensor, labels: Tensor) -> Tensor | None:
        model.seen = getattr(model, "seen", 0) + 1
        return None if model.seen % 2 == 0 else model.rdrop.loss(model.layers(model.rdrop.repeat(images)), labels)

    fitted(Classifier(RDropCallback(alpha=alpha), step=some))  # whole updates without one
    cut = fitted(Classifier(RDropCallback(alpha=alpha), step=some), accumulate_grad_batches=2)
    assert all(weight.isfinite().all() for weight in cut.parameters())


def test_label_smoothing_of_another_task_loss_is_refused_at_alpha_zero_too() -> None:
    def step(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        logits = model.layers(model.rdrop.repeat(images))
        target = Target(torch.zeros_like(logits[: len(labels)]), task_loss=squared_error, divergence=squared_difference)
        return model.rdrop.loss(logits, target, label_smoothing=0.1)

    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="label_smoothing and weight belong to the cross-entropy"):
            fitted(Classifier(RDropCallback(alpha=alpha), step=step))


def test_a_model_without_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is random in Classifier while it trains"):
        fitted(Classifier(RDropCallback(alpha=1.0), dropout=0.0))


def test_a_callback_that_is_not_the_trainers_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of the Trainer's"):
        RDropCallback(alpha=1.0).loss(torch.zeros(4, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"passes \(=1\) must be 2 or more"):
        RDropCallback(alpha=1.0, passes=1)


def test_strategies_and_optimizers_whose_update_is_not_known_are_refused() -> None:
    callback, model = RDropCallback(alpha=1.0), Classifier(None)
    with pytest.raises(ValueError, match="object keeps gradients where a callback cannot divide them"):
        callback.on_train_start(SimpleNamespace(strategy=object(), optimizers=[1]), model)
    with pytest.raises(ValueError, match="the module has 2 optimizers"):
        callback.on_train_start(SimpleNamespace(strategy=SingleDeviceStrategy(), optimizers=[1, 2]), model)


def test_validation_of_lightning_is_the_modules_own(agreement: Any) -> None:
    model = agreement.LIGHTNING["Tagger"](1.0)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    data = agreement.LIGHTNING["sentences"](64, seed=2)
    [scores] = trainer.validate(model, torch.utils.data.DataLoader(data, 16), verbose=False)
    model.eval()
    tokens, labels = data[:]
    with torch.no_grad():
        right = (model(tokens).argmax(-1) == labels)[labels != -100]
    assert scores["accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_the_lightning_example_learns_with_and_without_rdrop_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["1", "2"], []):
        monkeypatch.setattr(sys, "argv", ["lightning_loop.py", *arguments])
        runpy.run_path(str(EXAMPLES / "lightning_loop.py"), run_name="__main__")
    scores = re.findall(r"alpha (\d): accuracy on other sentences (\d\.\d+)", capsys.readouterr().out)
    assert [alpha for alpha, _ in scores] == ["0", "1"] * 2
    assert min(float(score) for _, score in scores) > 0.9  # chance is about 0.5
    assert torch.load(tmp_path / "runs/lightning/alpha-1/last.ckpt")["epoch"] == 3


def test_the_fabric_example_learns_with_and_without_rdrop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fabric_loop.py"])
    runpy.run_path(str(EXAMPLES / "fabric_loop.py"), run_name="__main__")
    scores = re.findall(r"alpha (\d): test accuracy (\d\.\d+)", capsys.readouterr().out)
    assert [alpha for alpha, _ in scores] == ["0", "5"]
    assert min(float(score) for _, score in scores) > 0.7  # chance is 0.1


def test_manual_optimization_which_clips_and_steps_by_itself_is_refused() -> None:
    model = Classifier(RDropCallback(alpha=1.0))
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="the module optimizes by hand"):
        fitted(model)


class SharedStep(Classifier):
    """Validates by the step that it trains with."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 6), LABELS[:4]), 4)


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_a_loss_of_a_validation_is_refused_and_says_what_to_use(sanity_steps: int) -> None:
    with pytest.raises(ValueError, match="it is for training_step; in validation and test use the plain loss"):
        fitted(SharedStep(RDropCallback(alpha=1.0)), num_sanity_val_steps=sanity_steps)


def unused_dropout(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    layers = model.layers
    return model.rdrop.loss(layers[3](layers[1](layers[0](model.rdrop.repeat(images)))), labels)


def test_dropout_that_never_acts_is_told_when_training_ends() -> None:
    with pytest.warns(
        UserWarning, match=r"the divergence was exactly 0 in all 16 updates.*check_rdrop\(model, batch\)"
    ):
        fitted(Classifier(RDropCallback(alpha=1.0), step=unused_dropout), batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the divergence was exactly 0")
        fitted(Classifier(RDropCallback(alpha=1.0)), batch_size=4)
        fitted(Classifier(RDropCallback(alpha=1.0), step=unused_dropout), batch_size=16)  # four updates are too few
