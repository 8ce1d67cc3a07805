"""START HERE for experiments. One training loop for every task, with R-Drop (`alpha` > 0) or plainly (`alpha` = 0).

    train(recipe, folder)
      -> recipe.json
      -> task, seeded model, newest good checkpoint if the run was interrupted
      -> updates; every so often a score on the valid split, a checkpoint
      -> the weights with the best valid score, scored on valid and test, once: result.json

Three properties hold for every task, and tests hold them:

* An update does not depend on how it is cut. Both terms of the loss are sums over positions divided by the number of
  valid positions of the whole update, over all microbatches and processes.
* A run that was killed ends in the same bits as one that was not. Order of the data is a pure function of
  (seed, epoch), randomness one of (seed, step, microbatch, process): a checkpoint needs no generator's state, and
  evaluation cannot disturb training.
* A number that is not finite stops the run at that step. It never reaches the weights.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from rdrop.dropout import dropout_sources
from rdrop.experiments import checkpoints
from rdrop.experiments.cost import CostMeter
from rdrop.experiments.machine import machine, versions
from rdrop.experiments.optimization import build_optimizer, learning_rate_at
from rdrop.experiments.preemption import Preempted, StopRequestedError, StopSignals
from rdrop.experiments.randomness import data_order, seed_all, updates_per_epoch
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.results import FORMAT, RunFolder
from rdrop.experiments.tasks import Batch, Task, load_task
from rdrop.loss import LossTerms, cross_entropy, rdrop_loss
from rdrop.views import repeat_batch

IGNORE_INDEX = -100
TRAIN_KEYS = ("loss", "task_loss", "divergence", "learning_rate", "gradient_norm")


class TrainingError(RuntimeError):
    """A run that cannot start, or cannot go on: what, at which step, and how to fix it."""


@dataclass(frozen=True)
class Progress:
    """What `on_progress` is told after every update and every score."""

    step: int
    updates: int
    loss: float
    valid: dict[str, float] | None
    """The newest scores on the valid split."""
    seconds_per_step: float
    """Of this session, evaluation and checkpoints included: times the steps left, the time left."""


@dataclass
class RunState:
    """All that a checkpoint must know beside weights and optimizer: a JSON object."""

    step: int = 0
    """Updates done."""
    evaluated_step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    seconds: float = 0.0
    resumed: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Of what the next `train` row averages, with the counts."""
    counts: dict[str, int] = field(default_factory=dict)


def train(
    recipe: Recipe, folder: str | PathLike[str], *, on_progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Trains the recipe in `folder`, or resumes it there, and returns its result (the content of `result.json`).

    A finished run is not repeated: its result is returned. Under `torchrun` or `accelerate launch` every process calls
    this; the first one writes. Python's, numpy's and torch's global generators are seeded.

    Raises:
        TrainingError: the folder belongs to another recipe, R-Drop has nothing to act on, a number is not finite.
        CheckpointError: checkpoints are there, and all are damaged.
        StorageError: the disk is full or cannot be written. What was saved before stays good.
        Preempted: SIGTERM or SIGINT came; the state is saved, and the same call resumes it.
    """
    run = RunFolder(folder)
    result = run.result()
    if result is not None:
        _require_same_recipe(recipe, result["recipe"], run.path)
        return result
    return _Training(recipe, run, on_progress or (lambda progress: None)).run()


class _Training:
    def __init__(self, recipe: Recipe, folder: RunFolder, on_progress: Callable[[Progress], None]) -> None:
        self.recipe, self.folder, self.on_progress = recipe, folder, on_progress
        self.checkpoint_folder = folder.path / "checkpoints"
        # Precision and accumulation are this loop's own, whatever `accelerate launch` has put into the environment.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
        self.stop = StopSignals(self.any_process)

        self.write_recipe()
        self.task = load_task(recipe)
        _require_fitting_recipe(recipe, self.task, self.accelerator.num_processes)
        seed_all(recipe.seed, "model")
        self.model = self.task.build_model().to(self.accelerator.device)  # what is evaluated and saved
        _require_randomness(recipe, self.model)
        self.optimizer = build_optimizer(recipe, self.model)
        self.state = RunState()
        self.saved_step: int | None = None  # of the checkpoint that holds the present state
        self.resume()
        self.parallel_model = self.accelerator.prepare_model(self.model)  # what is trained: under DDP, its wrapper

        self.cost = CostMeter(self.accelerator.device, self.state.seconds)
        self.started_at, self.started_step = time.perf_counter(), self.state.step
        self.valid: dict[str, float] | None = None

    def run(self) -> dict[str, Any]:
        with self.stop:
            try:
                while True:
                    if self.must_evaluate():
                        self.evaluate()
                    if self.is_due(self.recipe.checkpoint_every) or self.state.best_step == self.state.step:
                        self.save()
                    if self.state.step == self.recipe.updates:
                        return self.finish()
                    self.update()
            except StopRequestedError:
                self.save()
                raise Preempted(self.stop.signum, self.state.step, self.checkpoint_folder) from None

    # ------------------------------------------------------------------------------------------------ one update

    def update(self) -> None:
        with self.cost:
            step = self.state.step
            learning_rate = learning_rate_at(step, self.recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            terms = self.accumulate_gradient(step)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf)
            loss, task_loss, divergence, gradient_norm = [*terms.tolist(), norm.item()]
            measured = dict(zip(TRAIN_KEYS, (loss, task_loss, divergence, learning_rate, gradient_norm), strict=True))
            if not uses_rdrop(step, self.recipe):
                del measured["divergence"]
            self.require_finite(measured)
            self.optimizer.step()
            self.optimizer.zero_grad()

        self.state.step += 1
        self.state.seconds = self.cost.train_seconds
        for name, value in measured.items():
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value
            self.state.counts[name] = self.state.counts.get(name, 0) + 1
        self.report_progress(loss)

    def accumulate_gradient(self, step: int) -> Tensor:
        """Leaves the gradient of the update's loss in the parameters; returns loss, task loss, divergence: `(3,)`."""
        accelerator, recipe, task = self.accelerator, self.recipe, self.task
        self.parallel_model.train()
        microbatches = [send_to_device(batch, accelerator.device) for batch in self.microbatches(step)]
        positions = torch.stack([count_positions(task.labels(batch)) for batch in microbatches]).sum()
        num_items = self.sum_over_processes(positions).clamp(min=1)
        terms = torch.zeros(3, device=accelerator.device)
        for index, batch in enumerate(microbatches):
            self.stop.poll()
            seed_all(recipe.seed, "step", step, index, accelerator.process_index)
            is_last = index == len(microbatches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.parallel_model):
                loss = self.loss(batch, step, num_items)
                self.cost.sample_memory()
                # DDP averages the gradients of the processes; the loss is their sum.
                (loss.loss * accelerator.num_processes).backward()
            terms += torch.stack(loss).detach()
        return self.sum_over_processes(terms)

    def microbatches(self, step: int) -> list[Batch]:
        """This process's part of the update's batch, in `accumulation` parts."""
        epoch, indices = data_order(step, self.recipe, self.task.train_size())
        processes = self.accelerator.num_processes
        parts = np.array_split(indices, self.recipe.accumulation * processes)
        own = parts[self.accelerator.process_index :: processes]
        return [self.task.train_batch(part.tolist(), epoch) for part in own]

    def loss(self, batch: Batch, step: int, num_items: Tensor) -> LossTerms:
        """R-Drop's loss or, with one pass, the plain one; both in fp32, their sums divided by `num_items`."""
        recipe, task = self.recipe, self.task
        labels = task.labels(batch)
        if not uses_rdrop(step, recipe):
            logits = self.logits(batch)
            return plain_loss(logits, labels, task, label_smoothing=recipe.label_smoothing, num_items=num_items)
        logits = self.logits(repeat_batch(batch, recipe.passes))
        try:
            return rdrop_loss(
                logits,
                labels,
                alpha=recipe.alpha,
                label_smoothing=recipe.label_smoothing,
                num_items=num_items,
                divergence=task.divergence,
                task_loss=task.task_loss,
            )
        except ValueError as error:  # on CPU, rdrop_loss names the logit that is not finite
            if not logits.isfinite().all():
                self.append_row("train", step + 1, dict.fromkeys(TRAIN_KEYS, math.nan))
            raise TrainingError(f"step {step + 1}: {error}. {self.advice()}") from error

    def logits(self, batch: Batch) -> Tensor:
        device = self.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self.task.logits(self.parallel_model, batch)

    def require_finite(self, measured: dict[str, float]) -> None:
        wrong = [f"{name} is {value}" for name, value in measured.items() if not math.isfinite(value)]
        if wrong:
            self.append_row("train", self.state.step + 1, dict.fromkeys(TRAIN_KEYS) | measured)
            raise TrainingError(f"step {self.state.step + 1}: {' and '.join(wrong)}. {self.advice()}")

    def advice(self) -> str:
        recipe = self.recipe
        return (
            f"The weights are still those of step {self.state.step}. Lower learning_rate (={recipe.learning_rate}) or "
            f"clip_norm (={recipe.clip_norm}), set precision (={recipe.precision}) to fp32, and look at the data."
        )

    # ---------------------------------------------------------------------------------- scores, checkpoints, result

    def is_due(self, every: int) -> bool:
        step = self.state.step
        return step > 0 and (step % every == 0 or step == self.recipe.updates)

    def must_evaluate(self) -> bool:
        return self.is_due(self.recipe.evaluate_every) and self.state.evaluated_step < self.state.step

    def evaluate(self) -> None:
        """Scores the valid split, writes both rows of this step, and notes whether it is the best so far."""
        self.valid = self.score("valid")
        state, means = self.state, _means(self.state)
        self.append_row("train", state.step, dict.fromkeys(TRAIN_KEYS) | means)
        self.append_row("valid", state.step, self.valid)
        state.sums, state.counts, state.evaluated_step = {}, {}, state.step
        score = self.valid[self.task.metric]
        if state.best_score is None or self.is_better(score, state.best_score):
            state.best_step, state.best_score = state.step, score
        self.report_progress(means["loss"])

    def is_better(self, score: float, other: float) -> bool:
        return score > other if self.task.higher_is_better else score < other

    def score(self, split: Literal["valid", "test"]) -> dict[str, float]:
        """The task's scores of the model as it is. Every process computes them all: they need no exchange."""
        seed_all(self.recipe.seed, "evaluate", self.state.step)
        hook = self.model.register_forward_pre_hook(self.stop.poll)
        try:
            scores = self.task.evaluate(self.model.eval(), split)
        finally:
            hook.remove()
        wrong = [f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)]
        if wrong:
            raise TrainingError(f"step {self.state.step}, {split} split: {' and '.join(wrong)}. {self.advice()}")
        return scores

    def finish(self) -> dict[str, Any]:
        """Scores the best weights. The test split is used here, once, and decides nothing.

        The last update has a checkpoint by now: a stop from here on has nothing more to save.
        """
        state, recipe = self.state, self.recipe
        assert state.best_step is not None  # the last update is always scored
        self.accelerator.wait_for_everyone()
        checkpoints.load(self.checkpoint_folder, state.best_step).restore_model(self.model)
        result = {
            "format": FORMAT,
            "recipe": recipe.model_dump(mode="json"),
            "digest": recipe.digest(),
            "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "metric": self.task.metric,
            "higher_is_better": self.task.higher_is_better,
            "best_step": state.best_step,
            "valid": self.score("valid"),
            "test": self.score("test"),
            "cost": self.cost.report(self.model),
            "machine": machine(self.accelerator.device, self.accelerator.num_processes),
            "versions": versions(),
            "resumed": state.resumed,
        }
        if self.accelerator.is_main_process:
            self.folder.write_result(result)
        self.accelerator.wait_for_everyone()
        return result

    def save(self) -> None:
        """A checkpoint of this step, unless it is there already."""
        if self.state.step == self.saved_step:
            return
        self.require_finite_weights()
        if self.accelerator.is_main_process:
            checkpoints.save(
                self.checkpoint_folder,
                self.state.step,
                self.model,
                self.optimizer,
                asdict(self.state),
                keep=self.recipe.keep_checkpoints,
            )
        self.saved_step = self.state.step
        self.accelerator.wait_for_everyone()

    def require_finite_weights(self) -> None:
        wrong = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
        if wrong:
            raise TrainingError(
                f"step {self.state.step}: the update overflowed {wrong[0]} ({len(wrong)} such parameters); it is not "
                f"saved. Lower learning_rate (={self.recipe.learning_rate})."
            )

    def resume(self) -> None:
        """Takes up the newest good checkpoint, if there is one, and drops the rows written after it."""
        checkpoint = checkpoints.load_newest_good(self.checkpoint_folder)
        if checkpoint is not None:
            checkpoint.restore_model(self.model)
            checkpoint.restore_optimizer(self.optimizer)
            self.state = _parse_state(checkpoint)
            self.state.resumed += 1
            self.saved_step = self.state.step
        if self.accelerator.is_main_process:
            # If the score of this step is still to come, so are its rows.
            self.folder.truncate_metrics(self.state.step - self.must_evaluate())

    # ------------------------------------------------------------------------------------------ files and processes

    def write_recipe(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if (self.folder.path / "recipe.json").exists():
            _require_same_recipe(self.recipe, self.folder.recipe(), self.folder.path)
        self.folder.write_recipe(self.recipe.model_dump(mode="json"))

    def append_row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            epoch = step / updates_per_epoch(self.recipe, self.task.train_size())
            row = {"kind": kind, "step": step, "epoch": epoch, "seconds": self.state.seconds}
            self.folder.append_metrics(row | values)

    def report_progress(self, loss: float) -> None:
        steps = self.state.step - self.started_step
        seconds = (time.perf_counter() - self.started_at) / max(steps, 1)
        self.on_progress(Progress(self.state.step, self.recipe.updates, loss, self.valid, seconds))

    def sum_over_processes(self, value: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.sum_over_processes(torch.tensor(int(flag), device=self.accelerator.device)).item())


def uses_rdrop(step: int, recipe: Recipe) -> bool:
    """Whether the update after `step` updates is one with several passes (k-step R-Drop: updates k, 2k, ...)."""
    return recipe.alpha > 0 and (step + 1) % recipe.every == 0


def plain_loss(
    logits: Tensor, labels: Tensor, task: Task, *, label_smoothing: float, num_items: int | Tensor
) -> LossTerms:
    """For a classifier, `F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=...) / num_items`.

    A logit at a position without a label never matters, not even a NaN.
    """
    if task.task_loss is cross_entropy:
        rows, targets = logits.flatten(0, -2).float(), labels.flatten(0, logits.dim() - 2)
        if targets.dim() == 1:
            rows = rows.masked_fill((targets == IGNORE_INDEX)[:, None], 0.0)
        total = F.cross_entropy(rows, targets, reduction="sum", label_smoothing=label_smoothing)
    else:
        total = task.task_loss(logits.float(), labels).sum()
    loss = total / num_items
    return LossTerms(loss, loss.detach(), torch.zeros_like(loss))


def count_positions(labels: Tensor) -> Tensor:
    """Positions with something to learn: labels that are not -100; of targets `(N, ..., K)`, the `(N, ...)`."""
    if labels.is_floating_point():
        return torch.tensor(len(labels) if labels.dim() == 1 else labels.shape[:-1].numel(), device=labels.device)
    return (labels != IGNORE_INDEX).sum()


def _parse_state(checkpoint: checkpoints.Checkpoint) -> RunState:
    try:
        return RunState(**checkpoint.state)
    except TypeError as error:
        raise checkpoints.CheckpointError(
            f"{checkpoint.path} was written by another version of rdrop ({error}). Resume it with that version, or "
            f"delete {checkpoint.path.parent} to start the run again."
        ) from error


def _means(state: RunState) -> dict[str, float]:
    return {name: total / state.counts[name] for name, total in state.sums.items()}


def _require_same_recipe(recipe: Recipe, found: dict[str, Any], path: Path) -> None:
    wanted = recipe.model_dump(mode="json")
    if found != wanted:
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise TrainingError(
            f"{path} holds a run of another recipe, which differs in {', '.join(differing)}. Choose another folder."
        )


def _require_fitting_recipe(recipe: Recipe, task: Task, processes: int) -> None:
    if recipe.label_smoothing and task.task_loss is not cross_entropy:
        raise TrainingError(
            f"label_smoothing (={recipe.label_smoothing}) must be 0: {recipe.task} has no cross-entropy"
        )
    if recipe.batch_size > task.train_size():
        raise TrainingError(
            f"batch_size (={recipe.batch_size}) must be at most the number of training examples (={task.train_size()})"
        )
    if recipe.batch_size < recipe.accumulation * processes:
        raise TrainingError(
            f"batch_size (={recipe.batch_size}) must be at least accumulation (={recipe.accumulation}) times the "
            f"number of processes (={processes})"
        )


def _require_randomness(recipe: Recipe, model: nn.Module) -> None:
    # Layerdrop is left out: the passes of one forward share its coin.
    acts = any(source.active and source.kind != "layerdrop" for source in dropout_sources(model.train()))
    if recipe.alpha > 0 and not acts:
        raise TrainingError(
            f"alpha (={recipe.alpha}) asks for R-Drop, but the model has no dropout: all passes would be the same. "
            "Set a dropout rate of the model above 0, or alpha=0 for plain training."
        )
