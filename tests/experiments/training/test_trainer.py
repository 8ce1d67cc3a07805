"""The training loop: what an update computes, and that nothing but the recipe decides it."""

import gc
import math
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.experiments import tiny_runs
from tests.experiments.signals import send, stop_when_the_result_is_written
from tests.experiments.tiny_runs import RECIPE, TinyNetwork, TinyRecipe, TinyTask, final_state
from tests.several_processes import outputs_of
from torch import Tensor, nn

from rdrop import rdrop_loss, squared_difference, squared_error
from rdrop.alpha import alpha_at
from rdrop.experiments import metrics
from rdrop.experiments.randomness import derived_seed, seed_all
from rdrop.experiments.run_folder import ResultsError, RunFolder, find_runs
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training import trainer
from rdrop.experiments.training.checkpoints import load, load_newest_good
from rdrop.experiments.training.optimization import build_optimizer, learning_rate_at
from rdrop.experiments.training.order import DataOrder
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.trainer import Progress, TrainingError, train
from rdrop.integrations.targets import Target, count_positions
from rdrop.passes import repeat_batch

WITHOUT_CHANCE = {"plain": {"alpha": 0.0, "model.dropout": 0.0}, "r-drop": {"alpha": 2.0, "model.fixed": True}}


@pytest.fixture(autouse=True)
def _tiny_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)


@pytest.fixture
def on_event(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    return lambda listener: monkeypatch.setattr(TinyTask, "on_event", staticmethod(listener))


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    model = TinyNetwork(0.0)
    load(folder / "checkpoints", step).restore_model(model)
    return model.state_dict()


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


# ------------------------------------------------------------------------------------------------- what it computes


def hand_written_loop(recipe: tiny_runs.TinyRecipe, loss_of: Callable[..., Tensor]) -> nn.Module:
    """The same training in plain PyTorch, for accumulation 1."""
    task = TinyTask(recipe)
    seed_all(recipe.seed, "model")
    model = task.build_model().train()
    optimizer = build_optimizer(recipe, model)
    for step in range(recipe.updates):
        epoch, indices = DataOrder(recipe, task.train_size(), None).at(step)
        batch = task.train_batch(indices.tolist(), epoch)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate_at(step, recipe)
        seed_all(recipe.seed, "step", step, 0, 0)
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_alpha_zero_is_a_plain_loop_with_cross_entropy_bit_for_bit(tmp_path: Path) -> None:
    recipe = RECIPE.replace(alpha=0.0, accumulation=1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"].flatten()
        logits = model(batch["inputs"]).flatten(0, 1)
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) / (labels != -100).sum()

    train(recipe, tmp_path)
    assert largest_difference(weights(tmp_path, 8), hand_written_loop(recipe, loss_of).state_dict()) == 0


@pytest.mark.parametrize("passes", [2, 3])
def test_r_drop_is_a_plain_loop_with_rdrop_loss_bit_for_bit(tmp_path: Path, passes: int) -> None:
    recipe = RECIPE.replace(passes=passes, accumulation=1, label_smoothing=0.0)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        items = (batch["labels"] != -100).sum()
        logits = model(repeat_batch(batch, passes)["inputs"])
        return rdrop_loss(logits, batch["labels"], alpha=2.0, num_items=items).loss

    train(recipe, tmp_path)
    assert largest_difference(weights(tmp_path, 8), hand_written_loop(recipe, loss_of).state_dict()) == 0


def test_every_second_update_uses_r_drop_and_the_others_are_plain(tmp_path: Path) -> None:
    recipe = RECIPE.replace(every=2, evaluate_every=1)
    assert [recipe.method.acts_at(step) for step in range(4)] == [False, True, False, True]
    train(recipe, tmp_path)
    rows = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert [row["divergence"] is not None for row in rows] == [False, True] * 4


@pytest.mark.parametrize("loss", WITHOUT_CHANCE)
def test_four_microbatches_are_one_batch_though_their_label_counts_differ(tmp_path: Path, loss: str) -> None:
    for accumulation in (1, 4):
        train(RECIPE.replace(accumulation=accumulation, **WITHOUT_CHANCE[loss]), tmp_path / str(accumulation))
    assert_equal_but_for_rounding(tmp_path / "1", tmp_path / "4")


def test_two_processes_make_the_updates_of_one(tmp_path: Path) -> None:
    outputs_of(2, tiny_runs.__file__, str(tmp_path / "two"), "model.fixed=true")
    train(RECIPE.replace(**{"model.fixed": True}), tmp_path / "one")
    assert_equal_but_for_rounding(tmp_path / "one", tmp_path / "two")


def test_two_processes_score_one_model_with_the_running_statistics_of_the_first(tmp_path: Path) -> None:
    first, second = outputs_of(2, __file__, str(tmp_path))
    assert first.count("scored") == 6
    assert [line for line in second.splitlines() if line.startswith("scored")] == [
        line for line in first.splitlines() if line.startswith("scored")
    ]


def assert_equal_but_for_rounding(one: Path, other: Path) -> None:
    assert largest_difference(weights(one, 8), weights(other, 8)) <= 1e-6
    for row, other_row in zip(RunFolder(one).metrics(), RunFolder(other).metrics(), strict=True):
        assert row.keys() == other_row.keys()
        for key in row.keys() - {"kind", "seconds"}:
            assert other_row[key] is row[key] is None or other_row[key] == pytest.approx(row[key], rel=1e-5), key


def test_bf16_runs_the_forward_in_bf16_and_keeps_loss_and_weights_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()

    def logits(self: TinyTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output: Tensor = model(batch["inputs"])
        dtypes.add(output.dtype)
        return output

    monkeypatch.setattr(TinyTask, "logits", logits)
    train(RECIPE.replace(precision="bf16"), tmp_path)
    assert dtypes == {torch.bfloat16}
    assert {weight.dtype for weight in weights(tmp_path, 8).values()} == {torch.float32}


def test_learning_rate_rises_over_the_warmup_and_then_follows_the_schedule() -> None:
    recipe = RECIPE.replace(updates=6, warmup_steps=2, learning_rate=1.0)
    rates = {
        schedule: [learning_rate_at(step, recipe.replace(schedule=schedule)) for step in range(6)]
        for schedule in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.5, 1, 1, 1, 1, 1]
    assert rates["linear"] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates["cosine"] == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_weight_decay_spares_biases_and_norms() -> None:
    decayed, spared = build_optimizer(RECIPE, nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).param_groups
    assert [len(decayed["params"]), len(spared["params"])] == [1, 3]
    assert [decayed["weight_decay"], spared["weight_decay"]] == [0.1, 0]


def test_positions_without_labels_do_not_count_and_their_logits_do_not_matter() -> None:
    labels = torch.tensor([1, -100, 2])
    logits = torch.zeros(3, 4).index_fill(0, torch.tensor([1]), math.nan).requires_grad_()
    loss = Target(labels).plain_loss(logits) / 2
    loss.backward()
    assert count_positions(labels) == 2
    assert loss.item() == pytest.approx(math.log(4))
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0, 0, 0, 0]


def test_a_regression_task_is_trained_with_its_own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTask, "task_loss", staticmethod(squared_error))
    monkeypatch.setattr(TinyTask, "divergence", staticmethod(squared_difference))
    monkeypatch.setattr(TinyTask, "labels", lambda self, batch: F.one_hot(batch["inputs"], 11).float())
    for alpha in (0.0, 2.0):
        train(RECIPE.replace(alpha=alpha, label_smoothing=0.0), tmp_path / str(alpha))
        losses = [row["loss"] for row in RunFolder(tmp_path / str(alpha)).metrics() if row["kind"] == "train"]
        assert losses[-1] < losses[0]


def test_an_update_without_any_label_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_batch = TinyTask.train_batch

    def unlabeled_at_first(self: TinyTask, indices: list[int], epoch: int) -> dict[str, Tensor]:
        batch = train_batch(self, indices, epoch)
        return batch | ({"labels": torch.full_like(batch["labels"], -100)} if epoch < 2 else {})

    monkeypatch.setattr(TinyTask, "train_batch", unlabeled_at_first)
    for alpha in (0.0, 2.0):
        folder = tmp_path / str(alpha)
        train(RECIPE.replace(alpha=alpha, weight_decay=0.0, evaluate_every=8), folder)
        trained = weights(folder, 6)
        seed_all(0, "model")
        initial = TinyNetwork(0.0).state_dict()
        assert largest_difference(trained, initial) == 0
        assert largest_difference(weights(folder, 8), initial) > 0


# ------------------------------------------------------------------------------------------- what it depends on


def test_order_of_the_data_is_a_pure_function_of_seed_and_epoch() -> None:
    def order(recipe: tiny_runs.TinyRecipe) -> list[tuple[int, list[int]]]:
        return [(epoch, rows.tolist()) for epoch, rows in map(DataOrder(recipe, 28, None).at, range(7))]

    first = order(RECIPE)
    np.random.seed(1), torch.manual_seed(1)
    assert first == order(RECIPE.replace(alpha=0.0, accumulation=1, updates=100))
    assert first != order(RECIPE.replace(seed=1))
    assert [epoch for epoch, _ in first] == [0, 0, 0, 1, 1, 1, 2]
    assert len({row for _, rows in first[:3] for row in rows}) == 24  # without repetition within an epoch
    assert first[0][1] != first[3][1]


def test_seeds_of_different_keys_differ() -> None:
    keys = [(0, "step", 1, 0, 0), (0, "step", 0, 1, 0), (0, "step", 0, 0, 1), (1, "step", 0, 0, 0), (0, "step", 10, 0)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


def test_two_runs_of_one_recipe_end_in_the_same_bits(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "a")
    torch.rand(100)
    train(RECIPE, tmp_path / "b")
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_evaluation_and_checkpoints_do_not_disturb_training(tmp_path: Path) -> None:
    train(RECIPE.replace(evaluate_every=1, checkpoint_every=1), tmp_path / "often")
    train(RECIPE.replace(evaluate_every=1000, checkpoint_every=1000), tmp_path / "once")
    assert final_state(tmp_path / "often")["files"] == final_state(tmp_path / "once")["files"]


def test_masks_differ_between_steps_microbatches_and_seeds() -> None:
    def mask(*key: int | str) -> Tensor:
        seed_all(*key)
        return F.dropout(torch.ones(64))

    masks = [mask(0, "step", 0, 0, 0), mask(0, "step", 1, 0, 0), mask(0, "step", 0, 1, 0), mask(1, "step", 0, 0, 0)]
    assert len({tuple(drawn.tolist()) for drawn in masks}) == len(masks)


# ----------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("recipe", "stride"),
    [
        pytest.param(RECIPE, 5, id="fp32"),
        pytest.param(RECIPE.replace(precision="bf16", every=2), 9, id="bf16"),
        pytest.param(RECIPE, 1, id="everywhere", marks=pytest.mark.long),
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(
    tmp_path: Path, on_event: Callable[[Callable[[str], None]], None], recipe: tiny_runs.TinyRecipe, stride: int
) -> None:
    """Stops at the first step, amid accumulation, around epochs' ends, in each evaluation: at events of the run."""
    events: list[str] = []
    on_event(events.append)
    train(recipe, tmp_path / "whole")
    expected = final_state(tmp_path / "whole")
    assert events.count("forward") == 16
    assert events.count("evaluate") == 6  # four on the way, valid and test at the end

    for stop_at in (i for i, event in enumerate(events) if i % stride == 0 or event == "evaluate"):
        folder = tmp_path / str(stop_at)
        seen: list[str] = []

        def stop(event: str, seen: list[str] = seen, stop_at: int = stop_at) -> None:
            seen.append(event)
            if len(seen) == stop_at + 1:
                send()

        on_event(stop)
        with pytest.raises(Preempted):
            train(recipe, folder)
        assert RunFolder(folder).result() is None
        result = train(recipe, folder)
        assert final_state(folder) == expected, (stop_at, events[stop_at])
        assert result["resumed"] == 1


def stop_after(kind: str, times: int) -> Callable[[str], None]:
    seen: list[str] = []

    def listen(event: str) -> None:
        seen.append(event)
        if seen.count(kind) > times:
            send(signal.SIGINT)

    return listen


def test_a_run_stopped_at_every_microbatch_still_ends_in_the_same_bits(
    tmp_path: Path, on_event: Callable[[Callable[[str], None]], None]
) -> None:
    train(RECIPE, tmp_path / "whole")
    sessions, result = 0, None
    while result is None:
        sessions += 1
        on_event(stop_after("forward", 2))
        with suppress(Preempted):
            result = train(RECIPE, tmp_path / "stopped")
    assert sessions == result["resumed"] + 1 == 8  # one update of two microbatches each
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


class NormalizedNetwork(tiny_runs.TinyNetwork):
    """Has running statistics, which every forward in training changes."""

    def __init__(self, dropout: float, fixed: bool = False) -> None:
        super().__init__(dropout, fixed)
        self.norm = nn.BatchNorm1d(tiny_runs.WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.dropout(self.embedding(inputs)).transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.output(self.dropout(self.hidden(hidden).tanh()))
        return logits


def test_a_stop_between_the_parts_of_an_update_leaves_running_statistics_as_they_were(
    tmp_path: Path, on_event: Callable[[Callable[[str], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_runs, "TinyNetwork", NormalizedNetwork)
    train(RECIPE, tmp_path / "whole")
    on_event(stop_after("forward", 10))  # in the first of the two parts of the sixth update
    with pytest.raises(Preempted):
        train(RECIPE, tmp_path / "stopped")
    on_event(lambda event: None)
    train(RECIPE, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_a_run_stopped_in_every_score_writes_each_row_once(
    tmp_path: Path, on_event: Callable[[Callable[[str], None]], None]
) -> None:
    recipe = RECIPE.replace(updates=7, checkpoint_every=100)  # the last score is off the beat of evaluate_every
    train(recipe, tmp_path / "whole")
    for patience in range(2, 5):
        finished = False
        while not finished:
            on_event(stop_after("evaluate", patience))
            with suppress(Preempted):
                train(recipe, tmp_path / str(patience))
                finished = True
        assert final_state(tmp_path / str(patience)) == final_state(tmp_path / "whole")


def test_previous_signal_handlers_come_back(tmp_path: Path, on_event: Callable[[Callable[[str], None]], None]) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    on_event(lambda event: send() if event == "evaluate" else None)
    with pytest.raises(Preempted, match=r"stopped by SIGTERM at step 2, saved in .*checkpoints") as stopped:
        train(RECIPE, tmp_path)
    assert stopped.value.exit_code == 143
    assert before == [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


def test_a_signal_after_the_last_poll_is_told_when_the_run_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when_the_result_is_written(monkeypatch)
    with pytest.raises(Preempted, match="stopped by SIGTERM when the run had finished; its result is saved"):
        train(RECIPE, tmp_path)
    assert train(RECIPE, tmp_path) == RunFolder(tmp_path).result()


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, on_event: Callable[[Callable[[str], None]], None]) -> None:
    def twice(event: str) -> None:
        send(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        for _ in range(6000):
            time.sleep(0.01)  # the second interrupts it, or one of them

    on_event(twice)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        train(RECIPE, tmp_path)
    assert not isinstance(interrupted.value, Preempted)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(RECIPE, tmp_path))
    thread.start()
    thread.join()
    assert RunFolder(tmp_path).result() is not None


def test_a_finished_run_is_not_repeated(tmp_path: Path, on_event: Callable[[Callable[[str], None]], None]) -> None:
    result = train(RECIPE, tmp_path)
    on_event(lambda event: pytest.fail(event))
    assert train(RECIPE, tmp_path) == result


def test_a_run_is_not_resumed_on_other_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Preempted):
        train(RECIPE, tmp_path, on_progress=lambda progress: send())
    original = TinyTask.__init__

    def other_classes(task: TinyTask, recipe: tiny_runs.TinyRecipe) -> None:
        original(task, recipe)
        task.targets = torch.where(task.targets == -100, -100, (task.targets + 1) % tiny_runs.VOCABULARY)

    monkeypatch.setattr(TinyTask, "__init__", other_classes)
    with pytest.raises(TrainingError, match=rf"not those with which {tmp_path} began.*delete that folder"):
        train(RECIPE, tmp_path)


def test_a_run_leaves_no_model_behind_for_the_next_one_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[nn.Module]] = []
    build = TinyTask.build_model

    def watched(task: TinyTask) -> nn.Module:
        assert [model() for model in built] == [None] * len(built)
        model = build(task)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(TinyTask, "build_model", watched)
    monkeypatch.setattr(trainer, "free_earlier_runs", gc.collect)  # as where there is an accelerator
    for seed in range(3):
        train(RECIPE.replace(seed=seed), tmp_path / str(seed))
    assert len(built) == 3


def test_a_result_of_another_recipe_is_the_file_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / RECIPE.digest()
    train(RECIPE.replace(seed=5), folder)
    (folder / "recipe.json").unlink()
    with pytest.raises(ResultsError, match=re.escape(f"{folder / 'result.json'}: {folder} holds a run of another")):
        train(RECIPE, folder)


def test_the_run_of_another_recipe_is_not_overwritten(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "finished")
    RunFolder(tmp_path / "begun").write_recipe(RECIPE.saved())
    for name in ("finished", "begun"):
        with pytest.raises(TrainingError, match=r"run of another recipe, which differs in alpha, seed"):
            train(RECIPE.replace(seed=7, alpha=1.0), tmp_path / name)


# ------------------------------------------------------------------------------------------------- what is refused


def poisoned(monkeypatch: pytest.MonkeyPatch, forward: int, poison: Callable[[Tensor], Tensor]) -> None:
    """The logits of one forward of training, spoiled."""
    calls: list[None] = []

    def logits(self: TinyTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(None)
        output: Tensor = model(batch["inputs"])
        return poison(output) if len(calls) == forward else output

    monkeypatch.setattr(TinyTask, "logits", logits)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, number: float
) -> None:
    recipe = RECIPE.replace(alpha=alpha, checkpoint_every=1)
    poisoned(monkeypatch, 10, lambda logits: logits + number)  # the second microbatch of the fifth update
    with pytest.raises(TrainingError, match=r"step 5: .*(nan|NaN|inf).* weights are still those of step 4.*Lower"):
        train(recipe, tmp_path)
    newest = load_newest_good(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.state["step"] == 4
    last = RunFolder(tmp_path).metrics()[-1]
    assert (last["kind"], last["step"], math.isfinite(last["loss"])) == ("train", 5, False)
    assert all(weight.isfinite().all() for weight in weights(tmp_path, 4).values())


def test_a_gradient_that_is_not_finite_stops_the_run_and_stands_in_the_rows_as_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_gradient(logits: Tensor) -> Tensor:
        logits.register_hook(lambda gradient: gradient * math.nan)
        return logits

    poisoned(monkeypatch, 5, spoil_gradient)
    with pytest.raises(TrainingError, match="step 3: gradient_norm is nan"):
        train(RECIPE, tmp_path)
    last = RunFolder(tmp_path).metrics()[-1]
    assert (last["kind"], last["step"]) == ("train", 3)
    assert math.isnan(last["gradient_norm"])
    assert math.isfinite(last["loss"])

    monkeypatch.undo()  # the cause removed, the run goes on from its checkpoint, and the row is gone
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    train(RECIPE, tmp_path)
    train(RECIPE, tmp_path.with_name("whole"))
    assert final_state(tmp_path) == final_state(tmp_path.with_name("whole"))


def test_weights_that_overflow_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def overflow(self: torch.optim.AdamW) -> None:
        self.param_groups[0]["params"][0][0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(TrainingError, match=r"step 1: the update overflowed embedding.weight .*Lower learning_rate"):
        train(RECIPE.replace(checkpoint_every=1), tmp_path)
    assert load_newest_good(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("alpha", [1e30, 1e300])
def test_an_alpha_that_overflows_is_named(alpha: float, tmp_path: Path) -> None:
    named = re.escape(f"Lower alpha (={alpha:g}): alpha / 2 times the divergence is ")
    with pytest.raises(TrainingError, match=rf"step 1: .* is inf.*{named}.*, and the task loss \d"):
        train(RECIPE.replace(alpha=alpha), tmp_path)


def test_an_alpha_that_overflows_while_it_rises_is_named_as_it_was_set(tmp_path: Path) -> None:
    at_first = alpha_at(0, RECIPE.total_updates, 1e300, "quadratic")
    with pytest.raises(TrainingError, match=re.escape(f"Lower alpha (=1e+300, {at_first:.3g} in this update): ")):
        train(RECIPE.replace(alpha=1e300, alpha_schedule="quadratic"), tmp_path)


def test_a_score_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTask, "evaluate", lambda self, model, split: {"loss": math.nan})
    with pytest.raises(TrainingError, match="step 2, valid split: loss is nan"):
        train(RECIPE, tmp_path)


def test_r_drop_without_dropout_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_event: Callable[[Callable[[str], None]], None]
) -> None:
    monkeypatch.setattr(TinyTask, "build_model", lambda self: TinyNetwork(dropout=0.0))
    on_event(lambda event: pytest.fail(event))
    with pytest.raises(TrainingError, match=r"alpha \(=2.0\) asks for R-Drop, but the model has no dropout"):
        train(RECIPE, tmp_path)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch_size \(=30\) must be at most .* \(=28\)"):
        train(RECIPE.replace(batch_size=30), tmp_path)


def test_what_is_refused_before_the_first_update_leaves_no_run_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError):
        train(RECIPE.replace(batch_size=30), tmp_path)
    assert find_runs(tmp_path) == []

    def refused(task: TinyTask, recipe: TinyRecipe) -> None:
        raise DataError("bad.csv: no")

    monkeypatch.setattr(TinyTask, "__init__", refused)
    with pytest.raises(DataError):
        train(RECIPE, tmp_path)
    assert find_runs(tmp_path) == []


# ---------------------------------------------------------------------------------------------- what it leaves behind


class WithScore(TinyTask):
    """A task with a score of its own."""

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return super().evaluate(model, split) | {"own_score": 1.0}


def test_a_score_that_nobody_defined_is_refused_where_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", WithScore)
    with pytest.raises(
        TrainingError, match=r"metric 'own_score' is not in the table.*metrics\.add\(Metric\('own_score'"
    ):
        train(RECIPE, tmp_path / "undefined")
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    metrics.add(metrics.Metric("own_score", "our score", higher_is_better=False))
    assert train(RECIPE, tmp_path / "defined")["metrics"]["own_score"]["higher_is_better"] is False


def test_the_run_folder_keeps_its_contract(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(RECIPE, tmp_path, on_progress=seen.append)
    run = RunFolder(tmp_path)
    assert run.recipe() == RECIPE.saved()
    assert run.result() == result
    assert set(result) == {
        *("format", "recipe", "digest", "finished", "metric", "metrics", "best_step", "valid", "test"),
        *("cost", "machine", "versions", "resumed", "updates", "averaged_steps", "constant", "notes", "data"),
        *("vocabulary", "files"),
    }
    assert set(result["machine"]) == {"device", "threads", "processes", "kernel"}
    assert set(result["cost"]) == {
        *("train_seconds", "step_milliseconds", "peak_extra_bytes", "parameters", "data_wait_share"),
    }
    assert result["cost"]["parameters"] == sum(parameter.numel() for parameter in TinyNetwork(0.0).parameters())
    common = {"kind", "step", "epoch", "seconds"}
    names = {"loss", "task_loss", "divergence", "alpha", "learning_rate", "gradient_norm"}
    for row in run.metrics():
        assert set(row) == common | (names if row["kind"] == "train" else {"loss"})
    assert [(row["kind"], row["step"]) for row in run.metrics()] == [
        (kind, step) for step in (2, 4, 6, 8) for kind in ("train", "valid")
    ]
    assert run.metrics()[0]["epoch"] == pytest.approx(2 * 8 / 28)  # what is seen, of all examples
    assert seen[-1].step == seen[-1].updates == 8
    assert seen[-1].valid == {"loss": run.metrics()[-1]["loss"]}


def test_the_checkpoint_with_the_best_valid_score_is_the_one_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 1.0, 1.0, 2.0, 1.0, 7.0])  # steps 2, 4, 6, 8, then valid and test of the best
    splits: list[str] = []
    models: list[dict[str, Any]] = []

    def evaluate(self: TinyTask, model: nn.Module, split: str) -> dict[str, float]:
        assert not model.training
        splits.append(split)
        models.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss": next(scores)}

    monkeypatch.setattr(TinyTask, "evaluate", evaluate)
    result = train(RECIPE, tmp_path)
    assert splits == ["valid"] * 5 + ["test"]
    assert result["best_step"] == 4
    assert largest_difference(models[-1], models[1]) == 0
    assert result["valid"] == {"loss": 1.0}
    assert result["test"] == {"loss": 7.0}


class ConstantAccuracy(TinyTask):
    """Its accuracy stands still while its loss falls and rises: scored after updates 2, 4, 6 and 8, then the best."""

    metric = "accuracy"

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self.scores = getattr(self, "scores", None) or iter([3.0, 2.0, 1.0, 1.5, 1.6, 0.0, 0.0, 0.0])
        return {"accuracy": 0.5, "loss": next(self.scores)}


@pytest.mark.parametrize(("select_by", "best", "updates"), [("score", 2, 6), ("loss", 6, 10)])
def test_the_loss_may_choose_the_weights_and_count_the_patience(
    select_by: str, best: int, updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", ConstantAccuracy)
    result = train(RECIPE.replace(select_by=select_by, patience=2, updates=20), tmp_path)
    assert (result["best_step"], result["updates"]) == (best, updates)


def test_selection_by_the_score_is_the_run_that_it_was_before_there_was_a_choice() -> None:
    assert RECIPE.replace(select_by="score").digest() == RECIPE.digest()
    assert "select_by" not in RECIPE.saved()


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", [2.0, 2.0, 2.0, 2.0]), ("linear", [0.5, 1.0, 1.5, 2.0]), ("quadratic", [0.125, 0.5, 1.125, 2.0])],
)
def test_alpha_rises_to_its_value_at_the_last_update(tmp_path: Path, schedule: str, weights: list[float]) -> None:
    recipe = RECIPE.replace(updates=4, evaluate_every=1, alpha_schedule=schedule)
    assert [recipe.method.alpha_at(step, 4) for step in range(4)] == weights
    train(recipe, tmp_path)
    rows = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert [row["alpha"] for row in rows] == weights
    for row in rows:
        assert row["loss"] == pytest.approx(row["task_loss"] + row["alpha"] / 2 * row["divergence"], rel=1e-5)


def test_a_run_whose_alpha_rises_ends_in_the_same_bits_after_a_stop(tmp_path: Path) -> None:
    recipe = RECIPE.replace(alpha_schedule="quadratic")
    train(recipe, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            send()

    with pytest.raises(Preempted):
        train(recipe, tmp_path / "stopped", on_progress=stop)
    train(recipe, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_a_constant_alpha_is_the_run_that_it_was_before_there_were_schedules() -> None:
    assert RECIPE.replace(alpha_schedule="constant").digest() == RECIPE.digest()
    assert "alpha_schedule" not in RECIPE.saved()["method"]
    assert RECIPE.replace(alpha_schedule="linear").digest() != RECIPE.digest()
    assert RECIPE.replace(alpha_schedule="linear").method.label() == "R-Drop (alpha 2, linear)"


def test_training_that_ends_early_says_how_far_alpha_rose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 4.0, 3.0, 2.0, 2.5, 3.0, 3.0])
    monkeypatch.setattr(TinyTask, "evaluate", lambda self, model, split: {"loss": next(scores)})
    result = train(RECIPE.replace(patience=1, updates=12, alpha_schedule="linear"), tmp_path)
    assert result["notes"]["alpha"] == "rose to 1.67 of 2: training ended after 10 of 12 updates"


def test_of_training_that_ends_early_the_weights_that_are_scored_say_how_far_alpha_rose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([5.0, 4.0, 4.5, 3.0, 3.0])
    monkeypatch.setattr(TinyTask, "evaluate", lambda self, model, split: {"loss": next(scores)})
    result = train(RECIPE.replace(patience=1, updates=12, alpha_schedule="linear"), tmp_path)
    said = "rose to 0.667 of 2: the weights that are scored are of update 4 of 12"
    assert result["notes"]["alpha"] == said


@pytest.mark.parametrize(
    ("best", "said"),
    [(0, "rose to 0.125 of 2: the weights that are scored are of update 3 of 12"), (2, None)],
)
def test_weights_from_before_alpha_had_risen_say_so(
    best: int, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([*(1.0 if place == best else 2.0 for place in range(4)), 2.0, 2.0])
    monkeypatch.setattr(TinyTask, "evaluate", lambda self, model, split: {"loss": next(scores)})
    result = train(RECIPE.replace(updates=12, evaluate_every=3, alpha_schedule="quadratic"), tmp_path)
    assert result["notes"].get("alpha") == said


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_run_all_of_whose_labels_are_ignored_is_refused(
    alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlabeled(TinyTask):
        def __init__(self, recipe: TinyRecipe) -> None:
            super().__init__(recipe)
            self.targets[: self.train_size()] = -100

    monkeypatch.setattr(trainer, "load_task", Unlabeled)
    with pytest.raises(TrainingError, match=r"^steps 1 to 2: all labels are ignored \(-100\), so nothing"):
        trainer.train(RECIPE.replace(alpha=alpha), tmp_path)
    assert RunFolder(tmp_path).result() is None


# ------------------------------------------------------------------------------------------------------------ epochs

# 28 examples in batches of 8: 2.5 epochs are 8.75 updates, of which an epoch has 3.5.
EPOCHS = RECIPE.replace(updates=None, epochs=2.5, warmup_updates=0, warmup_share=0.25, evaluate_every=None)


def test_a_training_in_epochs_is_the_one_of_as_many_updates_bit_for_bit(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(EPOCHS.replace(alpha_schedule="linear"), tmp_path / "epochs", on_progress=seen.append)
    updates = RECIPE.replace(updates=9, warmup_updates=2, evaluate_every=4, alpha_schedule="linear")
    train(updates, tmp_path / "updates")
    assert final_state(tmp_path / "epochs") == final_state(tmp_path / "updates")
    assert result["notes"]["epochs"] == "2.5 of 28 examples: 9 updates"
    assert {progress.updates for progress in seen} == {9}


def test_a_run_in_epochs_is_named_and_saved_by_them_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(EPOCHS, tmp_path / "whole")
    with pytest.raises(Preempted):
        train(EPOCHS, tmp_path / "stopped", on_progress=stop)
    train(EPOCHS, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
    assert result["digest"] == EPOCHS.digest()
    assert result["recipe"] == RunFolder(tmp_path / "whole").recipe() == EPOCHS.saved()
    assert result["recipe"]["epochs"] == 2.5


def test_a_training_in_epochs_that_ends_early_says_how_many_updates_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", ConstantAccuracy)
    result = train(EPOCHS.replace(evaluate_every=1, patience=2), tmp_path)
    assert result["updates"] < 9
    assert result["notes"]["epochs"] == f"2.5 of 28 examples: 9 updates, of which {result['updates']} were done"


def test_twice_the_batch_with_twice_the_epochs_has_as_many_updates() -> None:
    order = DataOrder(EPOCHS, 28, None)
    larger = EPOCHS.replace(batch_size=16, epochs=5.0)
    of_larger = DataOrder(larger, 28, None)
    assert larger.in_updates(of_larger.exact_updates_per_epoch).updates == 9
    assert EPOCHS.in_updates(order.exact_updates_per_epoch).updates == 9


def test_an_epoch_of_batches_by_tokens_is_all_of_them() -> None:
    recipe = EPOCHS.replace(batch_size=None, batch_tokens=20)
    order = DataOrder(recipe, 28, TinyTask(RECIPE).train_lengths())
    assert order.exact_updates_per_epoch == order.updates_per_epoch


if __name__ == "__main__":
    tiny_runs.TinyNetwork = NormalizedNetwork  # type: ignore[misc, assignment]
    score = TinyTask.evaluate

    def shown(task: TinyTask, model: nn.Module, split: str) -> dict[str, float]:
        sys.stdout.write(f"scored {split} {[buffer.tolist() for buffer in model.buffers()]}\n")
        return score(task, model, split)

    TinyTask.evaluate = shown  # type: ignore[method-assign]
    train(RECIPE, sys.argv[1])
