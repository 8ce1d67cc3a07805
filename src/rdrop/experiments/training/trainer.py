"""START HERE for experiments. One training loop for every task, with R-Drop (`alpha` > 0) or plainly (`alpha` = 0).

    train(recipe, folder)
      -> task, seeded model: what they refuse leaves no run behind
      -> recipe.json, newest good checkpoint if the run was interrupted
      -> updates; every so often a score on the valid split, a checkpoint
      -> the weights that are the best on valid, scored on valid and test, once: result.json

Three properties hold for every task, and tests hold them:

* An update does not depend on how it is cut. Both terms of the loss are sums over positions divided by the number of
  valid positions of the whole update, over all microbatches and processes.
* A run that was killed ends in the same bits as one that was not. Order of the data is a pure function of
  (seed, epoch), randomness one of (seed, step, microbatch, process): a checkpoint needs no generator's state, and
  evaluation cannot disturb training.
* A number that is not finite stops the run at that step. It never reaches the weights.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from rdrop.experiments import metrics
from rdrop.experiments.distributed import is_first_process
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import (
    FORMAT,
    RECIPE,
    RESULT,
    ResultsError,
    RunFolder,
    data_files,
    read_result,
    remedy,
    saved,
    source,
)
from rdrop.experiments.run_folder.predictions import write_predictions
from rdrop.experiments.tasks.share import Share
from rdrop.experiments.tasks.task import (
    Batch,
    KeepsPredictions,
    KnowsConstant,
    SharesEvaluation,
    ShowsLearning,
    load_task,
)
from rdrop.experiments.training import checkpoints, sharding
from rdrop.experiments.training.beginning import has_begun, new_warning
from rdrop.experiments.training.cost import CostMeter, bytes_of_state
from rdrop.experiments.training.failures import DivergedError, RefusedError, TrainingError, advice, refusals
from rdrop.experiments.training.feed import Feed, Microbatch
from rdrop.experiments.training.fingerprint import fingerprint
from rdrop.experiments.training.machine import machine, versions
from rdrop.experiments.training.notes import notes_on
from rdrop.experiments.training.objective import Objective
from rdrop.experiments.training.optimization import build_optimizer, learning_rate_at
from rdrop.experiments.training.preemption import Preempted, StopRequestedError, StopSignals
from rdrop.experiments.training.prefetch import Prefetched
from rdrop.experiments.training.progress import Progress as Progress
from rdrop.experiments.training.start import start_from, vocabulary_digest
from rdrop.experiments.training.state import RunState, parse_state
from rdrop.experiments.training.stored_state import damaged_state_named, require_whole_state
from rdrop.experiments.training.trackers import require_trackers
from rdrop.integrations.targets import count_positions
from rdrop.terms import LossTerms

TRAIN_KEYS = ("loss", "task_loss", "divergence", "alpha", "learning_rate", "gradient_norm")


def train(
    recipe: Recipe,
    folder: str | PathLike[str],
    *,
    on_progress: Callable[[Progress], None] | None = None,
    trackers: Sequence[str] = (),
    side_by_side: int = 1,
) -> dict[str, Any]:
    """Trains the recipe in `folder`, or resumes it there, and returns its result (the content of `result.json`).

    A finished run is not repeated: its result is returned. Under `torchrun` or `accelerate launch` every process calls
    this; the first one writes. Python's, numpy's and torch's global generators are seeded. `trackers` are names that
    Accelerate knows ("tensorboard", "wandb", ...): they are told what `metrics.jsonl` is told. `side_by_side` is how
    many runs share the machine, which its times and memory depend on; the result says so.

    Raises:
        RunLockedError: another process trains this run.
        RefusedError: the recipe does not fit its task, its data or its machine.
        DivergedError: a number is not finite; the run folder says so, until the run is trained again.
        TrainingError: the folder belongs to another recipe, or its data have changed.
        TrackerError: Accelerate does not know a tracker, or does not find its package.
        DataError: the data are not what they should be: which file and line.
        CheckpointError: checkpoints are there, and all are damaged.
        StorageError: the disk is full or cannot be written. What was saved before stays good.
        Preempted: SIGTERM or SIGINT came; the state is saved, or the run has just finished, and the same call resumes
            it or returns its result.
    """
    require_trackers(trackers)
    run = RunFolder(folder)
    result = _finished(recipe, run)
    if result is not None:
        return result
    if not is_first_process():
        with _divergence_written(run):
            return _Training(recipe, run, on_progress or (lambda progress: None), trackers).run()

    with run.held() as lock:
        result = _finished(recipe, run)  # by another process, before this one had the lock
        if result is not None:
            return result

        def still_ours(progress: Progress) -> None:
            lock.require_held()
            if on_progress is not None:
                on_progress(progress)

        run.clear_failure()
        with _divergence_written(run):
            return _Training(recipe, run, still_ours, trackers, side_by_side).run()


@contextmanager
def _divergence_written(run: RunFolder) -> Iterator[None]:
    """Writes into the run's folder that it has diverged. Of several processes one may be alone with it."""
    try:
        yield
    except DivergedError as error:
        run.write_failure(error.step, str(error), error.batch)
        raise


class _Training:
    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        on_progress: Callable[[Progress], None],
        trackers: Sequence[str],
        side_by_side: int = 1,
    ) -> None:
        free_earlier_runs()
        self.asked, self.recipe = recipe, recipe  # as it is saved; as it is trained, with its lengths in updates
        self.folder, self.on_progress, self.side_by_side = folder, on_progress, side_by_side
        self.checkpoint_folder = folder.path / "checkpoints"
        with refusals():
            plugin = sharding.asked_plugin(recipe)
        # Precision and accumulation are this loop's own, whatever `accelerate launch` has put into the environment.
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            fsdp_plugin=plugin,
            log_with=list(trackers) or None,
            project_dir=folder.path,
        )
        self.stop = StopSignals(self.any_process, self.accelerator.num_processes)

        self.require_same_recipe()
        files: dict[str, str] = {}
        with data_files.noting(files, data_files.names_of(recipe.saved())):
            self.task = load_task(recipe)
            data_files.note_model(recipe.saved())
            for path in source.weights_files(recipe.init_from, recipe.seed):
                data_files.note_read(path)
        seed_all(recipe.seed, "model")
        self.model = self.task.build_model()  # what is evaluated and saved
        if plugin is None:
            self.model.to(self.accelerator.device)
        with refusals():
            metrics.find(self.task.metric)
            self.feed = Feed(recipe, self.task, self.accelerator.process_index, self.accelerator.num_processes)
            self.recipe = recipe = self.feed.recipe
            self.batches = Prefetched(self.feed.microbatches, end=recipe.total_updates)
            self.objective = Objective(recipe, self.task, self.model, self.logits)
        self.optimizer = build_optimizer(recipe, self.model)
        self.stored: tuple[checkpoints.Stored, checkpoints.Stored] = self.model, self.optimizer
        if plugin is not None:
            with refusals():
                self.model, self.optimizer = sharding.shard(self.accelerator, self.model, self.optimizer)
            self.stored = sharding.whole_model(self.model), sharding.whole_optimizer(self.optimizer)
        self.is_sharded = plugin is not None
        self.state = RunState(data=fingerprint(self.task), files=files, processes=self.accelerator.num_processes)
        self.saved_step: int | None = None  # of the checkpoint that holds the present state
        self.resume()
        if not (self.state.step or self.state.resumed):
            self.state.start = start_from(recipe, self.task, self.stored[0])
        if self.accelerator.is_main_process:  # not before: what is refused leaves nothing to resume
            self.folder.write_recipe(self.asked.saved())
        # What is trained: under DDP, its wrapper.
        self.parallel_model = self.model if self.is_sharded else self.accelerator.prepare_model(self.model)
        if recipe.compile:
            self.parallel_model = torch.compile(self.parallel_model)
        if trackers:
            self.accelerator.init_trackers(recipe.name)

        self.cost = CostMeter(self.accelerator.device, self.state.seconds, bytes_of_state(self.optimizer))
        self.started_at, self.started_step = time.perf_counter(), self.state.step
        self.valid: dict[str, float] | None = None
        self.labels_since_score: Tensor | int = 0

    def run(self) -> dict[str, Any]:
        with self.batches, self.stop:
            try:
                while True:
                    if self.must_evaluate():
                        self.evaluate()
                    if self.must_save():
                        self.save()
                    if self.is_over():
                        break
                    self.update()
                result = self.finish()
            except StopRequestedError:
                self.save()
                raise Preempted(self.stop.signum, self.state.step, self.checkpoint_folder) from None
            if self.stop.asked:  # after the last poll; whoever runs the next must know
                raise Preempted(self.stop.signum, self.state.step, self.checkpoint_folder, finished=True)
            return result

    # ------------------------------------------------------------------------------------------------ one update

    def update(self) -> None:
        with self.cost:
            step = self.state.step
            learning_rate = learning_rate_at(step, self.recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            terms = self.accumulate_gradient(step)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf)
            loss, task_loss, divergence, gradient_norm = [*terms.tolist(), sharding.whole_tensor(norm).item()]
            measured = {"loss": loss, "task_loss": task_loss}
            if self.recipe.method.acts_at(step):
                alpha = self.recipe.method.alpha_at(step, self.recipe.total_updates)
                measured |= {"divergence": divergence, "alpha": alpha}
            measured |= {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
            self.require_finite(measured)
            self.optimizer.step()
            self.optimizer.zero_grad()

        self.state.step += 1
        self.state.seconds = self.cost.train_seconds
        self.state.note(measured)
        self.report_progress(loss)

    def accumulate_gradient(self, step: int) -> Tensor:
        """Leaves the gradient of the update's loss in the parameters; returns loss, task loss, divergence: `(3,)`."""
        accelerator, recipe = self.accelerator, self.recipe
        self.parallel_model.train()
        with self.cost.waiting_for_data():
            parts = self.batches.at(step, self.stop.poll_alone)
        microbatches = [part._replace(batch=send_to_device(part.batch, accelerator.device)) for part in parts]
        positions = torch.zeros(2, dtype=torch.long, device=accelerator.device)  # without labels, with
        for part in microbatches:
            positions[int(part.is_labeled)] += count_positions(self.objective.labels(part.batch, step))
        positions = self.sum_over_processes(positions)
        self.labels_since_score = self.labels_since_score + positions[1]
        num_items = positions.clamp(min=1)
        terms = torch.zeros(3, device=accelerator.device)
        with _buffers_of_whole_updates(self.model, len(microbatches)):
            for index, part in enumerate(microbatches):
                self.stop.poll()
                seed_all(recipe.seed, "step", step, index, accelerator.process_index)
                # Of a sharded model only shards of the gradient are kept, so each microbatch adds to those.
                adds_up_now = self.is_sharded or index == len(microbatches) - 1
                with nullcontext() if adds_up_now else accelerator.no_sync(self.parallel_model):
                    loss = self.loss(part, step, num_items[int(part.is_labeled)])
                    self.cost.sample_memory()
                    # DDP averages the gradients of the processes; the loss is their sum.
                    (loss.loss * accelerator.num_processes).backward()
                terms += torch.stack(loss).detach()
        return self.sum_over_processes(terms)

    def loss(self, part: Microbatch, step: int, num_items: Tensor) -> LossTerms:
        try:
            with refusals():
                if not part.is_labeled:
                    return self.objective.unlabeled_terms(part.batch, step, num_items)
                return self.objective.terms(part.batch, step, num_items)
        except FloatingPointError as error:
            self.append_row("train", step + 1, dict.fromkeys(TRAIN_KEYS, math.nan))
            raise DivergedError(
                step + 1, f"step {step + 1}: {error}", advice(self.recipe, step), self.feed.examples(step)
            ) from error

    def logits(self, batch: Batch) -> Tensor:
        device = self.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self.task.logits(self.parallel_model, batch)

    def require_finite(self, measured: dict[str, float]) -> None:
        wrong = [f"{name} is {value}" for name, value in measured.items() if not math.isfinite(value)]
        if wrong:
            self.append_row("train", self.state.step + 1, dict.fromkeys(TRAIN_KEYS) | measured)
            step = self.state.step + 1
            batch = self.feed.examples(step - 1)
            what = f"step {step}: {' and '.join(wrong)}"
            raise DivergedError(step, what, advice(self.recipe, step - 1, measured), batch)

    # ---------------------------------------------------------------------------------- scores, checkpoints, result

    def is_due(self, every: int | None) -> bool:
        step = self.state.step
        return step > 0 and (step == self.recipe.total_updates or (every is not None and step % every == 0))

    def must_evaluate(self) -> bool:
        return self.is_due(self.recipe.evaluate_every) and self.state.evaluated_step < self.state.step

    def must_save(self) -> bool:
        """Whether a checkpoint is due: for a resume, or because the final score may want these weights."""
        wanted = (self.state.best_step, *self.state.averaged_steps)
        return self.is_due(self.recipe.checkpoint_every) or self.state.step in wanted

    def is_over(self) -> bool:
        patience = self.recipe.patience
        return self.state.step == self.recipe.total_updates or (
            patience is not None and self.state.scores_since_best >= patience
        )

    def evaluate(self) -> None:
        """Scores the valid split, writes both rows of this step, and notes whether it is the best so far."""
        self.require_labels()
        self.valid = self.score("valid")
        state, means = self.state, self.state.means()
        self.append_row("train", state.step, dict.fromkeys(TRAIN_KEYS) | means)
        self.append_row("valid", state.step, self.valid | self.signs())
        state.sums, state.counts, state.evaluated_step = {}, {}, state.step
        metric = self.task.metric if self.recipe.select_by == "score" else "loss"
        score = self.valid[metric]
        state.scores_since_best += 1
        if state.best_score is None or metrics.find(metric).is_better(score, state.best_score):
            state.best_step, state.best_score, state.scores_since_best = state.step, score, 0
        if self.recipe.average_last > 1:
            state.averaged_steps = [*state.averaged_steps, state.step][-self.recipe.average_last :]
        self.report_progress(means["loss"], self.warning())

    def signs(self) -> dict[str, float]:
        """Whether the model that was scored on valid has begun to learn, where its task measures that."""
        return self.task.signs if isinstance(self.task, ShowsLearning) else {}

    def warning(self) -> str | None:
        """Returns why training has not begun, once in a training."""
        if has_begun(self.signs()):
            return None
        return new_warning(self.valid_rows(), self.recipe, self.constant_scores())

    def constant_scores(self) -> dict[str, float]:
        return self.task.constant_scores() if isinstance(self.task, KnowsConstant) else {}

    def valid_rows(self) -> list[dict[str, Any]]:
        """The scores of the valid split so far, in the process that writes them."""
        return [row for row in self.folder.metrics() if row["kind"] == "valid"] if is_first_process() else []

    def require_labels(self) -> None:
        """Refuses training data without a label that counts, once the updates up to a score have shown it."""
        labels, self.labels_since_score = int(self.labels_since_score), 0
        first = self.state.evaluated_step + 1
        if not labels and first > self.started_step:  # else a process before this one made some of the updates
            raise TrainingError(
                f"steps {first} to {self.state.step}: all labels are ignored (-100), so nothing can be learned from "
                "them. Look at the labels of the training data."
            )

    def score(self, split: Literal["valid", "test"]) -> dict[str, float]:
        """The task's scores of the model as it is, the same in every process."""
        seed_all(self.recipe.seed, "evaluate", self.state.step)
        accelerator, poll = self.accelerator, self.stop.poll
        if accelerator.num_processes > 1 and not self.is_sharded:
            for buffer in filter(torch.is_floating_point, self.model.buffers()):
                torch.distributed.broadcast(buffer, src=0)  # batch norm has those of the process's own examples
        # A sharded model runs in all processes at once, so each computes all.
        if accelerator.num_processes > 1 and not self.is_sharded and isinstance(self.task, SharesEvaluation):
            self.task.share = Share(accelerator.process_index, accelerator.num_processes, poll)
            scores = self.task.evaluate(self.model.eval(), split)
        else:
            hook = self.model.register_forward_pre_hook(poll)
            try:
                scores = self.task.evaluate(self.model.eval(), split)
            finally:
                hook.remove()
        with refusals():
            metrics.rows(scores)
        scorer = type(self.task).__name__
        for name in ("loss", self.task.metric):
            if name not in scores:
                raise RefusedError(
                    f"{scorer}.evaluate returns no {name!r}, but {', '.join(scores) or 'nothing'}; add it"
                )
        wrong = [f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)]
        if wrong:
            step = self.state.step
            # Of a finite loss a perplexity may be infinite; NaN is the scorer's own.
            is_own = math.isfinite(scores["loss"]) and any(map(math.isnan, scores.values()))
            what_to_do = f"Look at how {scorer} computes it." if is_own else advice(self.recipe, step)
            raise DivergedError(step, f"step {step}, {split} split: {' and '.join(wrong)}", what_to_do)
        return scores

    def finish(self) -> dict[str, Any]:
        """Scores the best weights, or the mean of the last. The test split is used here, once, and decides nothing."""
        state = self.state
        assert state.best_step is not None  # the last update is always scored
        self.accelerator.wait_for_everyone()
        self.save()  # a stop from here on must not save the weights that are scored as those of the last update
        with damaged_state_named(self.checkpoint_folder):
            checkpoints.restore_final(self.checkpoint_folder, state.best_step, state.averaged_steps, self.stored[0])
        valid, signs, test = self.score("valid"), self.signs(), self.score("test")
        constant = self.constant_scores()
        result = {
            "format": FORMAT,
            "recipe": self.asked.saved(),
            "digest": self.asked.digest(),
            "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "metric": self.task.metric,
            "updates": state.step,
            "best_step": state.best_step,
            "averaged_steps": state.averaged_steps,
            "valid": valid,
            "test": test,
            "constant": constant,
            "metrics": metrics.rows(test),
            "notes": self.task.notes
            | self.state.start
            | notes_on(state, self.asked, self.feed, self.valid_rows(), valid, constant),
            "data": state.data,
            "files": state.files,
            "vocabulary": vocabulary_digest(self.task),
            "cost": self.cost.report(self.model),
            "machine": machine(self.accelerator.device, self.accelerator.num_processes)
            | ({} if self.side_by_side == 1 else {"side_by_side": self.side_by_side})
            | ({"sharded": "FSDP2"} if self.is_sharded else {}),
            "versions": versions(),
            "resumed": state.resumed,
        } | signs
        if self.accelerator.is_main_process:
            if isinstance(self.task, KeepsPredictions) and self.task.predictions is not None:
                write_predictions(self.folder.path, self.task.predictions)
            self.folder.write_result(result)
        for tracker in self.accelerator.trackers:  # not end_training, which would end the process group too
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return result

    def save(self) -> None:
        """Saves a checkpoint of this step, unless it is there already."""
        if self.state.step == self.saved_step:
            return
        self.require_finite_weights()
        model, optimizer = (part.gathered() if isinstance(part, sharding.Whole) else part for part in self.stored)
        if self.accelerator.is_main_process:
            keep = self.recipe.keep_checkpoints
            with damaged_state_named(self.checkpoint_folder):
                checkpoints.save(
                    self.checkpoint_folder, self.state.step, model, optimizer, asdict(self.state), keep=keep
                )
        self.saved_step = self.state.step
        self.accelerator.wait_for_everyone()

    def require_finite_weights(self) -> None:
        weights = dict(self.model.named_parameters())
        wrong_parts = [~sharding.own_part(weight).isfinite().all() for weight in weights.values()]
        in_any = self.sum_over_processes(torch.stack(wrong_parts).long()).tolist()
        wrong = [name for name, count in zip(weights, in_any, strict=True) if count]
        if wrong:
            raise DivergedError(
                self.state.step,
                f"step {self.state.step}: the update overflowed {wrong[0]} ({len(wrong)} such parameters); it is not "
                "saved",
                f"Lower learning_rate (={self.recipe.learning_rate}).",
            )

    def resume(self) -> None:
        """Takes up the newest good checkpoint, if there is one, and drops the rows written after it."""
        with damaged_state_named(self.checkpoint_folder):
            checkpoint = checkpoints.load_newest_good(self.checkpoint_folder)
        if checkpoint is not None:
            model, optimizer = self.stored
            require_whole_state(checkpoint.path)
            checkpoint.restore_model(model)
            checkpoint.restore_optimizer(optimizer)
            found = parse_state(checkpoint)
            source.require_same_source(self.asked.init_from, self.asked.seed, found.start, self.folder.path)
            self.state = self.resumed_state(found)
            self.state.resumed += 1
            self.saved_step = self.state.step
        elif self.accelerator.is_main_process and (rows := self.folder.metrics()):
            warnings.warn(
                f"{self.checkpoint_folder} has no checkpoint, and there are rows up to step {rows[-1]['step']}: the "
                f"run in {self.folder.path} starts again",
                checkpoints.CheckpointWarning,
                stacklevel=2,
            )
        if self.accelerator.is_main_process:
            # If the score of this step is still to come, so are its rows.
            self.folder.truncate_metrics(self.state.step - self.must_evaluate())

    def resumed_state(self, found: RunState) -> RunState:
        data, files = self.state.data, self.state.files
        other = [path for path, digest in files.items() if found.files.get(path, digest) != digest]
        if other:
            raise TrainingError(
                f"{', '.join(other)}: changed after {self.folder.path} had begun with it. Put back what it held, or "
                "delete that folder to start the run again."
            )
        if found.data not in (data, ""):
            raise TrainingError(
                f"the training data are not those with which {self.folder.path} began: other examples, vocabulary or "
                "classes. Put them back, or delete that folder to start the run again."
            )
        own = self.accelerator.num_processes
        if found.processes not in (own, None) and self.accelerator.is_main_process:
            warnings.warn(
                f"{self.folder.path} was trained in {found.processes} process(es) up to step {found.step} and goes on "
                f"in {own}: its dropout masks are others from here on, so it ends in other bits",
                checkpoints.CheckpointWarning,
                stacklevel=2,
            )
        return replace(found, data=data, files=files, processes=own)

    # ------------------------------------------------------------------------------------------ files and processes

    def require_same_recipe(self) -> None:
        if self.accelerator.is_main_process and (self.folder.path / "recipe.json").exists():
            _require_same_recipe(self.asked, self.folder.recipe(), self.folder.path / RECIPE)

    def append_row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            epoch = step / self.feed.order.exact_updates_per_epoch
            row = {"kind": kind, "step": step, "epoch": epoch, "seconds": self.state.seconds}
            self.folder.append_metrics(row | values)
            measured = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
            self.accelerator.log(measured | {"epoch": epoch}, step=step)

    def report_progress(self, loss: float, warning: str | None = None) -> None:
        steps = self.state.step - self.started_step
        seconds = (time.perf_counter() - self.started_at) / max(steps, 1)
        self.on_progress(Progress(self.state.step, self.recipe.total_updates, loss, self.valid, seconds, warning))

    def sum_over_processes(self, value: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.sum_over_processes(torch.tensor(int(flag), device=self.accelerator.device)).item())


def free_earlier_runs() -> None:
    """Frees the models of earlier runs in this process from an accelerator's memory: they are parts of cycles."""
    if torch.accelerator.is_available():
        gc.collect()


def _finished(recipe: Recipe, run: RunFolder) -> dict[str, Any] | None:
    """Returns the result of a run that is finished already. Its recipe, if somebody deleted it, is written again."""
    result = read_result(run)
    if result is not None:
        _require_same_recipe(recipe, result["recipe"], run.path / RESULT)
        source.require_same_source(recipe.init_from, recipe.seed, result.get("notes", {}), run.path)
        data_files.require_unchanged([run.path])
        if is_first_process():
            run.restore_recipe(recipe.saved())
    return result


def _require_same_recipe(recipe: Recipe, found: dict[str, Any], file: Path) -> None:
    """Refuses a folder whose `file` has another recipe than the one that is to be trained in it."""
    differing = saved.differing_keys(recipe.saved(), found)
    if differing:
        what = f"{file.parent} holds a run of another recipe, which differs in {', '.join(differing)}"
        if file.parent.name == recipe.digest():  # a run's folder has the name of its recipe
            raise ResultsError(f"{file}: {what}. {remedy(file)}")
        raise TrainingError(f"{what}. Choose another folder.")


@contextmanager
def _buffers_of_whole_updates(model: nn.Module, parts: int) -> Iterator[None]:
    """Puts the buffers back where a stop comes between the parts of an update: batch norm changes its own in each."""
    before = [buffer.clone() for buffer in model.buffers()] if parts > 1 else []
    try:
        yield
    except StopRequestedError:
        for value, buffer in zip(before, model.buffers(), strict=False):
            buffer.copy_(value)
        raise
