"""What a Trainer does with an update whose loss or gradient is not finite."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gradient_agreement import CASES, arguments, build, cast, only_item
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from rdrop.integrations.transformers import FiniteUpdates, NonfiniteUpdateError, RDropTrainer, Target
from rdrop.integrations.transformers.nonfinite import MOST_IN_A_ROW, NonfiniteUpdateWarning

CLASSIFY = CASES["sequence classification"]
LLAMA = CASES["causal LM, Llama"]
LEFT_OUT = pytest.mark.filterwarnings("ignore::rdrop.integrations.transformers.nonfinite.NonfiniteUpdateWarning")

Poison = Callable[[Trainer, set[int]], None]


def poison_loss(trainer: Trainer, updates: set[int]) -> None:
    """Makes the hidden states of the updates' last micro-batch NaN."""
    embeddings = trainer.model.get_input_embeddings()  # type: ignore[union-attr]
    embeddings.register_forward_hook(lambda module, inputs, output: output * _nan_in(trainer, updates))


def poison_gradient(trainer: Trainer, updates: set[int]) -> None:
    """Makes one gradient NaN, and leaves the loss as it is."""
    weight = next(trainer.model.parameters())  # type: ignore[union-attr]
    weight.register_hook(lambda gradient: gradient * _nan_in(trainer, updates))


def _nan_in(trainer: Trainer, updates: set[int]) -> float:
    is_last = trainer.accelerator.sync_gradients
    return math.nan if is_last and trainer.state.global_step + 1 in updates else 1.0


class Weights(TrainerCallback):
    """The weights before the first update, and after each."""

    def __init__(self) -> None:
        self.after: list[list[Tensor]] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.after = [copy.deepcopy(list(model.parameters()))]

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.after.append(copy.deepcopy(list(model.parameters())))


def prepared(
    poison: Poison | None, updates: set[int], folder: str, *, trainer_class: Any = RDropTrainer, **options: Any
) -> tuple[Any, Weights]:
    """A trainer of a small classifier, whose update number n is poisoned for each n of `updates`."""
    settings = {"max_steps": 3, "weight_decay": 0.1, **options.pop("settings", {})}
    weights = Weights()
    model = options.pop("model", None) or build(CLASSIFY)
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=options.pop("batches", CLASSIFY.batches),
        data_collator=only_item,
        callbacks=[weights],
        **({"alpha": 1.0} if trainer_class is RDropTrainer else {}) | options,
    )
    if poison is not None:
        poison(trainer, updates)
    return trainer, weights


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def logged(trainer: Any, name: str) -> list[Any]:
    return [row.get(name) for row in trainer.state.log_history if "loss" in row]


EVERY_WAY = [
    (poison, alpha, settings)
    for poison in (poison_loss, poison_gradient)
    for alpha in (0.0, 1.0)
    for settings in ({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0})
]


class OwnStep(FiniteUpdates, Trainer):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model.train(), self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_whose_loss_nobody_sees_is_refused(folder: str) -> None:
    trainer, _ = prepared(poison_loss, {1}, folder, trainer_class=OwnStep)
    with pytest.raises(TypeError, match=r"OwnStep.training_step does not call FiniteUpdates.training_step"):
        trainer.train()


@LEFT_OUT
@pytest.mark.parametrize(("poison", "alpha", "settings"), EVERY_WAY)
def test_an_update_that_is_not_finite_is_left_out(
    poison: Poison, alpha: float, settings: dict[str, Any], folder: str
) -> None:
    trainer, weights = prepared(poison, {2}, folder, alpha=alpha, on_nonfinite="skip", settings=settings)
    output = trainer.train()
    before, after_first, after_second, after_third = weights.after
    assert same(after_first, after_second)
    assert not same(before, after_first)
    assert not same(after_second, after_third)
    assert all(weight.isfinite().all() for weight in after_third)
    assert logged(trainer, "skipped_updates") == [None, 1, 1]
    assert [math.isnan(value) for value in logged(trainer, "grad_norm")] == [False, True, False]
    losses = logged(trainer, "loss")
    assert [math.isnan(value) for value in losses] == [False, poison is poison_loss, False]
    assert output.training_loss == pytest.approx((losses[0] + losses[2]) / 2)


@pytest.mark.parametrize(("poison", "alpha", "settings"), EVERY_WAY)
def test_training_stops_before_an_update_that_is_not_finite(
    poison: Poison, alpha: float, settings: dict[str, Any], folder: str
) -> None:
    trainer, weights = prepared(poison, {2}, folder, alpha=alpha, settings=settings)
    loss = "nan" if poison is poison_loss else r"\d\.\d+"
    message = rf"update 2 has a loss of {loss} and a gradient of norm nan.*still those after 1 updates.*learning_rate"
    with pytest.raises(NonfiniteUpdateError, match=message):
        trainer.train()
    assert same(list(trainer.model.parameters()), weights.after[1])
    assert logged(trainer, "nonfinite_update") == [None, 2]
    assert math.isnan(logged(trainer, "loss")[1]) is (poison is poison_loss)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(features))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class OfClasses(RDropTrainer):
    def rdrop_targets(self, inputs: Any) -> list[Target]:
        return [Target(inputs["labels"])]


@LEFT_OUT
@pytest.mark.filterwarnings("ignore:.*BatchNorm")
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_statistics_of_batch_norm_are_put_back_with_the_weights(policy: str, folder: str) -> None:
    """Two micro-batches an update, of which the last one of update 2 is NaN."""
    torch.manual_seed(0)
    batch = {"features": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    found = []
    for updates in (1, 2):
        model = Normalized()
        settings = {"gradient_accumulation_steps": 2, "max_steps": updates, "learning_rate": 0.0}
        options = {"model": model, "batches": [batch] * 4, "settings": settings, "on_nonfinite": policy, "alpha": 1.0}
        trainer, _ = prepared(None, set(), folder, trainer_class=OfClasses, **options)

        def poison(module: Any, inputs: Any, trainer: Any = trainer) -> Any:
            return (inputs[0] * _nan_in(trainer, {2}),)

        model.norm.register_forward_pre_hook(poison)
        stops = pytest.raises(NonfiniteUpdateError, match="still those after 1 updates")
        with stops if (policy, updates) == ("stop", 2) else nullcontext():
            trainer.train()
        found.append([buffer.clone() for buffer in model.buffers()])
    assert same(*found)


def test_the_learning_rate_takes_its_course_over_an_update_that_is_left_out(folder: str) -> None:
    settings = {"lr_scheduler_type": "linear"}
    trainer, _ = prepared(poison_gradient, {2}, folder, on_nonfinite="skip", settings=settings)
    with pytest.warns(NonfiniteUpdateWarning, match=r"update 2 has a loss .*: this update is left out"):
        trainer.train()
    undisturbed, _ = prepared(None, set(), folder, settings=settings)
    undisturbed.train()
    assert logged(trainer, "learning_rate") == logged(undisturbed, "learning_rate")


@pytest.mark.parametrize("fused", [False, True])
def test_the_message_names_the_example_where_the_loss_can_be_read(fused: bool, folder: str) -> None:
    trainer, _ = prepared(poison_loss, {1}, folder, model=build(LLAMA), batches=LLAMA.batches, fused=fused)
    with pytest.raises(NonfiniteUpdateError, match=r"norm nan \((hidden|logit) at example 0.*\. The weights are still"):
        trainer.train()


@LEFT_OUT
def test_skipping_stops_where_it_does_not_help(folder: str) -> None:
    settings = {"max_steps": 99}
    trainer, weights = prepared(poison_loss, set(range(3, 99)), folder, on_nonfinite="skip", settings=settings)
    message = rf"update {MOST_IN_A_ROW + 2} .*The {MOST_IN_A_ROW - 1} updates before it were left out too"
    with pytest.raises(NonfiniteUpdateError, match=message):
        trainer.train()
    assert same(list(trainer.model.parameters()), weights.after[2])


def test_weights_that_are_not_finite_are_named(folder: str) -> None:
    model: Any = build(CLASSIFY)
    nn.init.constant_(model.classifier.bias, torch.nan)
    trainer, _ = prepared(None, set(), folder, model=model)
    with pytest.raises(NonfiniteUpdateError, match=r"weights before it are not finite either \(classifier\.bias\)"):
        trainer.train()


def test_updates_that_are_left_out_are_counted_on_after_a_resume(folder: str) -> None:
    trainer, _ = prepared(None, set(), folder)
    trainer.state.log_history = [{"loss": 1.0, "skipped_updates": 3}, {"eval_loss": 1.0}]
    trainer._skipped_since_log = 2
    trainer.log({"loss": 1.0})
    trainer.log({"loss": 1.0})
    assert logged(trainer, "skipped_updates") == [3, 5, 5]


@LEFT_OUT
def test_any_trainer_of_transformers_may_have_it(folder: str) -> None:
    class Finite(FiniteUpdates, Trainer):
        pass

    settings = {"gradient_accumulation_steps": 2}
    trainer, weights = prepared(poison_loss, {2}, folder, trainer_class=Finite, on_nonfinite="skip", settings=settings)
    trainer.train()
    assert same(weights.after[1], weights.after[2])
    assert not same(weights.after[2], weights.after[3])
    assert trainer.args.logging_nan_inf_filter


def test_finite_updates_are_those_of_the_stock_trainer_to_the_bit(folder: str) -> None:
    class Finite(FiniteUpdates, Trainer):
        pass

    trained = []
    for trainer_class in (Trainer, Finite):
        trainer, weights = prepared(None, set(), folder, trainer_class=trainer_class, settings={"max_grad_norm": 1.0})
        trainer.train()
        trained.append((weights.after[-1], logged(trainer, "loss"), logged(trainer, "grad_norm")))
    (stock, *stock_logs), (ours, *our_logs) = trained
    assert same(stock, ours)
    assert stock_logs == our_logs


class Reads(TorchDispatchMode):
    """Counts the values that are read one by one, for each of which an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_device_is_waited_for_once_in_an_update(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 99}
    case = CASES["image classification"]  # a model whose own forward reads nothing
    model, batches = build(case, dtype=torch.float32), [cast(batch, torch.float32) for batch in case.batches]
    trainer, _ = prepared(None, set(), folder, alpha=0.0, settings=settings, model=model, batches=batches)
    for module in ("rdrop.arguments", "rdrop.integrations.targets"):  # as for tensors of an accelerator
        monkeypatch.setattr(f"{module}.values_may_be_read", lambda tensor: False)
    monkeypatch.setattr("rdrop.integrations.transformers.trainer.CHECKED_MICRO_BATCHES", 0)
    reads, looks = Reads(), []
    by_process = trainer._by_process
    monkeypatch.setattr(trainer, "_by_process", lambda *args: looks.append(by_process(*args)) or looks[-1])
    inner = type(trainer).training_step

    def counted(self: Any, *args: Any) -> Any:
        with reads:
            return inner(self, *args)

    monkeypatch.setattr(type(trainer), "training_step", counted)
    trainer.train()
    assert len(looks) == 2
    assert reads.calls["aten._local_scalar_dense.default"] == 0
    assert reads.calls["aten.addmm.default"] > 0


# ------------------------------------------------------------------------------------------------- a loss scale


def with_loss_scale(trainer: Any, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Accelerate believe that it trains in float16 on a GPU, which scales its losses."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    monkeypatch.setattr(trainer.accelerator, "autocast", lambda *args, **kwargs: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_loss_scale_that_is_too_large_is_no_reason_to_stop(
    alpha: float, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(CLASSIFY, dtype=torch.float32)
    batches = CLASSIFY.batches[:1]
    trainer, weights = prepared(None, set(), folder, model=model, batches=batches, alpha=alpha)
    with_loss_scale(trainer, 2.0**20, monkeypatch)
    scaler, weight = trainer.accelerator.scaler, next(trainer.model.parameters())
    weight.register_hook(lambda gradient: gradient * (math.inf if scaler.get_scale() > 2.0**18 else 1.0))
    trainer.train()
    taken = [not same(*pair) for pair in zip(weights.after, weights.after[1:], strict=False)]
    assert taken == [False, False, True]
    assert logged(trainer, "skipped_updates") == [1, 2, 2]
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


@pytest.mark.parametrize("scale", [1.0, 2.0**20])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@LEFT_OUT
def test_a_loss_that_is_not_finite_is_not_put_down_to_the_loss_scale(
    on_nonfinite: Any, scale: float, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(CLASSIFY, dtype=torch.float32)
    trainer, weights = prepared(poison_loss, {2}, folder, model=model, on_nonfinite=on_nonfinite)
    with_loss_scale(trainer, scale, monkeypatch)
    if on_nonfinite == "stop":
        with pytest.raises(NonfiniteUpdateError, match="update 2 has a loss of nan"):
            trainer.train()
    else:
        trainer.train()
        assert same(weights.after[1], weights.after[2])
        assert not same(weights.after[2], weights.after[3])
        assert logged(trainer, "skipped_updates") == [None, 1, 1]


def test_a_gradient_at_the_least_loss_scale_is_not_put_down_to_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CLASSIFY, dtype=torch.float32)
    trainer, _ = prepared(poison_gradient, {2}, folder, model=model)
    with_loss_scale(trainer, 1.0, monkeypatch)
    with pytest.raises(NonfiniteUpdateError, match="gradient of norm nan"):
        trainer.train()


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_policy_that_is_none_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite \(='halt'\) must be \"stop\" or \"skip\""):
        prepared(None, set(), folder, on_nonfinite="halt")


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "lomo"])
def test_skipping_is_refused_where_the_step_is_a_part_of_backward(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match=rf"on_nonfinite \(=\"skip\"\) must be \"stop\" with optim='{name}'"):
        prepared(None, set(), folder, on_nonfinite="skip", settings={"optim": name})
