"""R-Drop in the Hugging Face Trainer (transformers 5.6 and later).

    from rdrop.integrations.transformers import RDropTrainer

    RDropTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()

`RDropMixin` turns the targets of a model (`targets.py`) into the loss of a training step. What it refuses stands in
`checks.py`, how it computes less in `forward.py`. Of evaluation and prediction only the labels are checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

from rdrop.alpha import AlphaSchedule, alpha_at, course_of
from rdrop.arguments import NonfiniteLossError, divide
from rdrop.integrations.requirements import (
    own_loss_is_known,
    require_randomness,
    warn_of_batch_norm,
    warn_where_alpha_stopped,
    why_gradient_is_wrong,
)
from rdrop.integrations.targets import (
    LANGUAGE_MODELS,
    Batch,
    Target,
    UnknownTargetError,
    head_of,
    router_loss,
    targets_of,
)
from rdrop.integrations.transformers.card import add_section
from rdrop.integrations.transformers.checks import (
    check_compute_loss,
    check_label_smoothing,
    check_method,
    check_trainer,
    why_not_fused,
)
from rdrop.integrations.transformers.forward import (
    EncoderOnce,
    Fused,
    fullest_example,
    same_randomness,
    whole,
    why_labels_stay,
    without_labels,
)
from rdrop.integrations.transformers.nonfinite import FiniteUpdates, OnNonfinite
from rdrop.integrations.transformers.observed import DivergenceSeen, LabelsSeen, TermMeans
from rdrop.integrations.transformers.packed import (
    by_pass,
    cut_packed,
    fullest_sequence,
    is_packed,
    repeat_packed,
    require_separate_passes,
)
from rdrop.integrations.transformers.unlabeled import UnlabeledBatches, UnlabeledOrder, with_labels
from rdrop.linear_loss import chunk_bytes
from rdrop.passes import repeat_batch, rows_of
from rdrop.terms import LossTerms

CHECKED_MICRO_BATCHES = 8

METHOD = ("alpha", "alpha_schedule", "passes", "every", "micro_batches", "fused", "encoder_once")
"""The arguments of `RDropMixin` that are attributes, and that a search may try."""


class RDropMixin(FiniteUpdates):
    """Adds R-Drop to a trainer of Hugging Face: write it before the trainer's class.

    Example::

        class MyTrainer(RDropMixin, TheirTrainer): ...

        MyTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()

    A training step runs one forward of the batch repeated `passes` times and minimizes
    `task_loss + alpha / 2 * divergence` of `rdrop_loss`; both terms are means over the labels that count in the whole
    update, over its accumulation steps and processes. `task_loss` and `divergence` are logged beside `loss`.

    Args:
        alpha: the paper's weight of the divergence; 0 is plain training, by the stock Trainer's own loss wherever that
            is the mean over the whole update, or what the model is trained with is not known. "auto" stands for 4 with
            the schedule "quadratic": a schedule, not an adaptation.
        alpha_schedule: the course of alpha (`alpha_at`): "constant"; or rising from 0 to alpha at the last update,
            "linear" or "quadratic". The last update is the one planned, also where training stops earlier.
        passes: m >= 2, dropout masks per example.
        every: k >= 1; only every k-th optimizer update is regularized, the others are plain.
        micro_batches: k >= 1; a regularized step runs as k forwards and backwards, each of 1/k of the batch, repeated.
            The gradient is the same, and with `micro_batches=passes` a forward is no larger than that of a plain step.
            Processes exchange gradients in the last backward only.
        fused: compute the loss of a language model from its hidden states, never storing the logits, in regularized
            steps (`linear_rdrop_loss`). None: where that is exact and the logits would be large. True: always, and
            where it cannot be, a `ValueError` says why. False: never.
        encoder_once: run the encoder of an encoder-decoder on one pass and repeat its output. None: where nothing in
            the encoder is random, so that all passes agree. True and False as for `fused`.
        unlabeled_dataset: examples without labels. Beside its batch, a regularized update has as many micro-batches of
            them, and alpha / 2 times the mean of their divergence is added to its loss. Collated as the others are.
            Where a model makes one prediction for each example they need no labels; else labels that only say which
            positions count, those not -100. Plain updates do not see them.
        unlabeled_batch_size: how many of them a micro-batch of a process has; None: `per_device_train_batch_size`.
        on_nonfinite: what becomes of an update whose loss or gradient is not finite, as `FiniteUpdates` has it: "stop",
            or "skip".

    Raises:
        NonfiniteUpdateError: from `train`, for an update whose loss or gradient is not finite.
        ValueError, TypeError: at construction, for what would make R-Drop act wrongly or not at all; at the first
            step, for a model in which nothing is random or whose loss is not the one `rdrop_targets` predicts.
    """

    # Our loss is a mean over the whole update already; releases before 5.20 need `training_step` below for that.
    loss_is_scaled_for_ga: bool | None = True

    _plain_trainer: ClassVar[type[Trainer]] = Trainer
    """The class behind this one whose `compute_loss` is that of plain training; any other would be replaced."""

    _unlabeled: UnlabeledBatches | None = None

    def __init__(
        self,
        *args: Any,
        alpha: float | Literal["auto"],
        alpha_schedule: AlphaSchedule = "constant",
        passes: int = 2,
        every: int = 1,
        micro_batches: int = 1,
        fused: bool | None = None,
        encoder_once: bool | None = None,
        unlabeled_dataset: Any = None,
        unlabeled_batch_size: int | None = None,
        on_nonfinite: OnNonfinite = "stop",
        **kwargs: Any,
    ) -> None:
        self.alpha, self.alpha_schedule = alpha, alpha_schedule
        self.passes, self.every, self.micro_batches = passes, every, micro_batches
        self.fused, self.encoder_once = fused, encoder_once
        self.unlabeled_dataset, self.unlabeled_batch_size = unlabeled_dataset, unlabeled_batch_size
        self._check_method()
        check_compute_loss(type(self), RDropMixin, self._plain_trainer)
        super().__init__(*args, on_nonfinite=on_nonfinite, **kwargs)
        check_trainer(self)
        self._begin()

    @property
    def alpha(self) -> Any:
        """The weight of the divergence at the last update: of "auto", what it stands for."""
        return course_of(self._given_alpha, self._given_schedule)[0]

    @alpha.setter
    def alpha(self, alpha: Any) -> None:
        self._given_alpha = alpha  # a float or "auto" once it is checked

    @property
    def alpha_schedule(self) -> AlphaSchedule:
        """The course of alpha: of the alpha "auto", its own."""
        return course_of(self._given_alpha, self._given_schedule)[1]

    @alpha_schedule.setter
    def alpha_schedule(self, schedule: AlphaSchedule) -> None:
        self._given_schedule: AlphaSchedule = schedule

    def rdrop_targets(self, inputs: Batch) -> list[Target]:
        """Returns what the model is trained with on `inputs`, before they are repeated. Override it for another loss.

        Overridden, it replaces the loss inside the model for training, plain steps included; evaluation still reports
        the model's own.
        """
        return self._targets_of_model(inputs)

    def _targets_of_model(self, inputs: Batch) -> list[Target]:
        """Returns what the model's own loss, or that of `_plain_trainer`, trains it with."""
        return targets_of(self._inner_model(), inputs)

    def auxiliary_loss(self, outputs: Any) -> Tensor | None:
        """Returns what the model adds to the loss of its targets, a scalar of one forward; None if nothing.

        `router_loss` unless overridden: that of a mixture of experts, which is in its outputs. The mean over the
        forwards of an update is minimized with the rest, in plain steps too. Not with `label_smoothing_factor`: the
        Trainer then takes the loss of the logits alone, and so does R-Drop. `outputs` are the model's own; where the
        loss is computed from hidden states, their logits are zeros.
        """
        return router_loss(self._inner_model(), outputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._unlabeled = None  # ends the workers of its loader
        self._labels_seen.require_some(self.state.global_step)
        warn_where_alpha_stopped(self.state.global_step, self.state.max_steps, self.alpha, self.alpha_schedule)
        return output

    def _hp_search_setup(self, trial: Any) -> None:
        """Takes the arguments of R-Drop from a trial, too. The Trainer sets those of its own, and warns of others."""
        own: dict[str, Any] = {}

        def without_own(found: dict[str, Any]) -> dict[str, Any]:
            own.update({name: found[name] for name in METHOD if name in found})
            return {name: value for name, value in found.items() if name not in METHOD}

        if trial is None or getattr(self, "hp_search_backend", None) is None:
            super()._hp_search_setup(trial)
        elif isinstance(trial, dict):  # of Ray and Weights & Biases: the values themselves
            super()._hp_search_setup(without_own(trial))
        else:
            space = self.hp_space
            self.hp_space = lambda trial: without_own(space(trial))
            try:
                super()._hp_search_setup(trial)
            finally:
                self.hp_space = space
        for name, value in own.items():
            setattr(self, name, value)
        self._check_method()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Called by `train`; and again, with a smaller batch, where `auto_find_batch_size` ran out of memory."""
        self._begin()
        return super()._inner_training_loop(*args, **kwargs)

    def _check_method(self) -> None:
        """Refuses settings that cannot be; they may have been set since the trainer was made."""
        check_method(self)
        if self._given_alpha != "auto":
            self._given_alpha = float(self._given_alpha)

    def _begin(self) -> None:
        self._check_method()
        self._term_means, self._labels_seen, self._divergence_seen = TermMeans(), LabelsSeen(), DivergenceSeen()
        self._checks_left = CHECKED_MICRO_BATCHES
        self._is_looked_at = self._is_packing_seen = False
        self._accumulation = 1
        self._left_over: list[Batch] = []
        self._is_epoch_over = True
        self._is_stock, self.loss_is_scaled_for_ga = False, True
        self._weight, self._forwards = 1.0, 0  # of the update; 0 until a training step
        self._divides_by_count: bool | None = None  # whether the stock loss does; None: not known yet
        self._unlabeled, self._unlabeled_parts = None, list[list[Batch]]()
        self._ways: tuple[EncoderOnce, Fused] | None = None  # of the model that is trained, which `train` may yet build

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Returns the micro-batches of one update, and their `Target.count` summed over all processes: `(targets, 2)`.

        In plain training of a model whose targets are not known the stock Trainer's count stands instead. The Trainer
        hands it on, as `num_items_in_batch`, to `training_step` and `compute_loss`.
        """
        update = self._next_update(epoch_iterator, num_batches)
        batches, stock_count = super().get_batch_samples(iter(update), len(update), device)
        if not batches:
            return batches, None
        self._accumulation = len(batches)
        try:
            counts = [self._counts_of(batch) for batch in batches]
        except UnknownTargetError:
            if self.alpha > 0:
                raise
            self._is_stock, self.loss_is_scaled_for_ga = True, None
            return batches, stock_count
        total = torch.stack([count.to(device) for count in counts]).sum(0)
        self._unlabeled_parts = self._unlabeled_of_update(batches)
        unlabeled = [self._counts_of(batch) for part in self._unlabeled_parts for batch in part]
        if unlabeled:
            total = torch.stack([total, torch.stack([count.to(device) for count in unlabeled]).sum(0)])
        if self._processes() > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        if unlabeled:
            total, self._unlabeled_counts = total
            self._labels_seen.add_unlabeled(self._unlabeled_counts[:, 0].sum())
        if self.state.global_step == 0:
            self._warn_without_regularized_update()
        self._labels_seen.add(total[:, 0].sum(), self.state.global_step, self.state.epoch)
        return batches, total

    def _next_update(self, epoch_iterator: Any, num_batches: int) -> list[Batch]:
        """Returns the micro-batches up to the Trainer's next step; none where the epoch ends before it.

        After what a stream without a length leaves over, the Trainer takes no step, and adds the gradient to that of
        the next update, whose labels are counted alone. Here it is the first part of that update.
        """
        found = list(islice(epoch_iterator, max(0, num_batches - len(self._left_over))))
        update = [*self._left_over, *found]
        if len(update) >= num_batches:
            self._left_over, self._is_epoch_over = update[num_batches:], False
            return update[:num_batches]
        if found and self._is_epoch_over:
            raise ValueError(
                f"an epoch of train_dataset has {len(found)} micro-batches, fewer than gradient_accumulation_steps "
                f"(={num_batches}), so the Trainer would never step: lower it, or let the dataset repeat its examples"
            )
        self._left_over, self._is_epoch_over = update, True
        return []

    def _counts_of(self, batch: Batch) -> Tensor:
        return torch.stack([target.count() for target in self.rdrop_targets(batch)])

    def _unlabeled_batches(self) -> UnlabeledBatches:
        args = self.args
        asked = self.unlabeled_batch_size or args.per_device_train_batch_size
        order = UnlabeledOrder(
            size=len(self.unlabeled_dataset),
            batch_size=max(1, asked * self._train_batch_size // args.train_batch_size),  # as auto_find_batch_size found
            per_update=args.gradient_accumulation_steps,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        dataset, collate = self.unlabeled_dataset, self.data_collator
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="unlabeled")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="unlabeled")  # type: ignore[no-untyped-call, unused-ignore]
        loader = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        return UnlabeledBatches(dataset, collate, order, **loader)

    def _warn_without_regularized_update(self) -> None:
        """Says where no update will use R-Drop. No error: a trial of a few updates is one of the same settings."""
        if self.alpha > 0 and self.every > self.state.max_steps > 0:
            warnings.warn(
                f"every (={self.every}) is more than the number of updates (={self.state.max_steps}): none of them "
                "uses R-Drop, so this is plain training",
                stacklevel=2,
            )

    def _unlabeled_of_update(self, batches: list[Batch]) -> list[list[Batch]]:
        """Returns for each micro-batch those without labels beside it: one, and beside the last all that are left."""
        if self.unlabeled_dataset is None or not self._is_regularized():
            return [[] for _ in batches]
        if self._unlabeled is None:
            self._unlabeled = self._unlabeled_batches()
        number = (self.state.global_step + 1) // self.every - 1
        decoder_reads = bool(getattr(getattr(self._inner_model(), "config", None), "is_encoder_decoder", False))
        found = [
            with_labels(batch, batches[0], self.label_names, decoder_reads=decoder_reads)
            for batch in self._unlabeled.of_update(number)
        ]
        last = len(batches) - 1
        return [*([batch] for batch in found[:last]), found[last:]]

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        if self._is_stock:
            self._weight, self._forwards = 1.0, self._accumulation
            return super().training_step(model, inputs, num_items_in_batch)
        parts = self._micro_batches_of(inputs)
        # Where the parameters are sharded every forward is joint: a process with fewer rows runs some of them twice.
        is_joint = self._is_cut() and self.accelerator.num_processes > 1
        repeats = self.micro_batches - len(parts) if is_joint else 0
        self._forwards = self._accumulation * len(parts)
        losses = []
        beside = self._unlabeled_parts.pop(0) if self._unlabeled_parts else []
        for part in [part for batch in beside for part in self._micro_batches_of(batch)]:
            with self.accelerator.no_sync(model):
                losses.append(self._unlabeled_step(model, part))
        for weight, part in [(0.0, parts[0])] * repeats + [(1.0, part) for part in parts[:-1]]:
            with self.accelerator.no_sync(model):
                losses.append(self._training_step(model, part, num_items_in_batch, weight))
        losses.append(self._training_step(model, parts[-1], num_items_in_batch, 1.0))
        return torch.stack(losses).sum()

    def _is_cut(self) -> bool:
        return self.micro_batches > 1 and self._is_regularized()

    def _micro_batches_of(self, inputs: Batch) -> list[Batch]:
        if not self._is_cut():
            return [inputs]
        if is_packed(self._inner_model(), inputs):
            return cut_packed(inputs, self.micro_batches)
        size = len(self.rdrop_targets(inputs)[0].labels)
        rows = torch.arange(size).tensor_split(min(self.micro_batches, size))
        return [rows_of(inputs, int(some[0]), int(some[-1]) + 1, batch_size=size) for some in rows]

    def _is_regularized(self) -> bool:
        return bool(self.alpha > 0) and (self.state.global_step + 1) % self.every == 0

    def _training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any, weight: float) -> Tensor:
        self._weight = weight
        self.current_gradient_accumulation_steps = 1  # by which the Trainer would divide the loss once more
        self._loss_was_computed = False
        with _labels_named(inputs):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self._loss_was_computed:
            raise TypeError(
                f"{type(self).__name__}.compute_loss does not call RDropMixin.compute_loss, so R-Drop is off. To add "
                "to the loss, start from super().compute_loss(...); to replace the task loss, override rdrop_targets"
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the R-Drop loss in training, or the plain one in updates without it; else the stock Trainer's."""
        if not model.training or self._is_stock:
            if not model.training:
                self._check_evaluated(inputs)
            with _labels_named(inputs):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise TypeError(
                "no counts of labels: compute_loss was called without num_items_in_batch, which an override must hand "
                "on; or get_batch_samples of this trainer does not call RDropMixin.get_batch_samples"
            )
        if not self._forwards:
            raise TypeError(
                f"{type(self).__name__}.training_step does not call RDropMixin.training_step, so what part of the "
                "update this is stays unknown: start from super().training_step(...)"
            )
        self._loss_was_computed = True
        inputs = dict(inputs)
        targets = self.rdrop_targets(inputs)
        if self._is_regularized():
            loss, outputs = self._regularized_step(model, inputs, targets, num_items_in_batch, return_outputs)
        else:
            loss, outputs = self._plain_step(model, inputs, targets, num_items_in_batch, return_outputs)
        return (loss, outputs) if return_outputs else loss

    def _check_evaluated(self, inputs: Batch) -> None:
        """Refuses labels of an evaluation that do not fit, as in training; warns where a batch has none."""
        if self._loss_is_overridden() or any(inputs.get(name) is None for name in self.label_names):
            return
        try:
            targets = self._targets_of_model(inputs)
        except UnknownTargetError:
            return
        if all(target.count()[0] == 0 for target in targets):
            warnings.warn(
                "a batch of the evaluation has no label that counts: all are -100. Its loss is 0 / 0, so that of the "
                "evaluation is NaN: leave such examples out",
                stacklevel=2,
            )

    # ------------------------------------------------------------------------- with R-Drop

    def _regularized_step(
        self, model: nn.Module, inputs: Batch, targets: list[Target], counts: Tensor, outputs_wanted: bool
    ) -> tuple[Tensor, Any]:
        if self._checks_left == CHECKED_MICRO_BATCHES:
            self._look_at(self.model_wrapped)
        alpha = self._alpha()
        options = {"alpha": alpha, "label_smoothing": self._label_smoothing(inputs, targets)}
        num_items = [count[0] / self._processes() for count in counts]
        weighed = [target.weighed_by(count) for target, count in zip(targets, counts, strict=True)]
        if self._ways is None:
            self._ways = EncoderOnce(self._inner_model(), self.passes), Fused(self._inner_model())
        encoder_once, fused = self._ways
        packed = is_packed(self._inner_model(), inputs)
        if packed:
            repeated = repeat_packed(inputs, self.passes)
            self._look_at_packed(fused, repeated)
        else:
            repeated = repeat_batch(inputs, self.passes, batch_size=len(targets[0].labels))
        encodes_once = self._encodes_once(encoder_once, inputs, targets[0])
        is_fused = self._is_fused(fused, model, inputs, targets, outputs_wanted)
        forward = partial(model, **(without_labels(self._inner_model(), repeated) if is_fused else repeated))
        if encodes_once:
            forward = partial(encoder_once.run, forward)
        if is_fused:
            (hidden, bias), outputs = fused.run(forward)
            weight = whole(fused.layer.weight, hidden.dtype)
            hidden = by_pass(hidden, self.passes) if packed else hidden
            self._check_hidden(hidden, weight)
            compute = partial(weighed[0].linear_rdrop_loss, hidden, weight, bias, num_items=num_items[0], **options)
            with self.accelerator.autocast():
                self._scored(targets[0], hidden, partial(F.linear, weight=weight, bias=bias))
                terms = [self._terms_or_nan(compute, hidden, weight)]
        else:
            outputs = by_pass(forward(), self.passes) if packed else forward()
            logits = [target.logits(outputs) for target in weighed]
            self._scored(targets[0], logits[0], lambda logits: logits)
            terms = [
                self._terms_or_nan(partial(target.rdrop_loss, values, num_items=count, **options), values)
                for target, values, count in zip(weighed, logits, num_items, strict=True)
            ]
            self._check_model(outputs, targets)
        shares = [[target.share * term for term in terms_] for target, terms_ in zip(targets, terms, strict=True)]
        loss, task_loss, divergence = (self._weight * torch.stack(term).sum() for term in zip(*shares, strict=True))
        self._term_means.add(self.state.global_step, task_loss=task_loss, divergence=divergence)
        self._divergence_seen.add(self.state.global_step)
        self._alpha_used = alpha
        auxiliary = self._auxiliary(outputs)
        return loss if auxiliary is None else loss + auxiliary, outputs

    def _unlabeled_step(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Runs forward and backward of the divergence alone; labels only say which positions count."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[assignment, unused-ignore]
        inner = self._inner_model()
        with self.compute_loss_context_manager():
            targets = self.rdrop_targets(inputs)
            if is_packed(inner, inputs):
                outputs = by_pass(model(**repeat_packed(inputs, self.passes)), self.passes)
            else:
                outputs = model(**repeat_batch(inputs, self.passes, batch_size=len(targets[0].labels)))
            terms = []
            for target, (positions, _) in zip(targets, self._unlabeled_counts, strict=True):
                logits = target.logits(outputs)
                options = {"alpha": self._alpha(), "num_items": positions / self._processes(), "task_passes": ()}
                loss, _, divergence = self._terms_or_nan(partial(target.rdrop_loss, logits, **options), logits)
                terms.append(target.share * torch.stack([loss, divergence]))
            loss, divergence = torch.stack(terms).sum(0).unbind()
        self._term_means.add(self.state.global_step, unlabeled_divergence=divergence.detach())
        self.accelerator.backward(loss)
        return loss.detach()

    def _alpha(self) -> float:
        return alpha_at(self.state.global_step, self.state.max_steps, self.alpha, self.alpha_schedule)

    def _scored(self, target: Target, rows: Tensor, project: Callable[[Tensor], Tensor]) -> None:
        """Hears of the logits `project(rows)` of all passes, `(passes*N, ...)`, for trainers that log more of them."""

    def _look_at_packed(self, fused: Fused, repeated: Batch) -> None:
        if not self._is_packing_seen:
            require_separate_passes(self._unwrapped_model(), fused, without_labels(fused.inner, repeated), self.passes)
            self._is_packing_seen = True

    def _terms_or_nan(self, compute: Callable[[], LossTerms], *sources: Tensor) -> LossTerms:
        """Returns what is computed; on a CPU, where the loss refuses what is not finite, NaN from the same sources.

        So every process ends its backward, and `FiniteUpdates` decides for all of them.
        """
        try:
            return compute()
        except NonfiniteLossError as error:
            self._nonfinite_at = f" ({error})"
            loss = torch.nan * torch.stack([source.float().sum() for source in sources]).sum()
            return LossTerms(loss, loss.detach(), loss.detach())

    def _look_at(self, model: nn.Module) -> None:
        """Looks, before the first regularized step, at the modules."""
        if why := why_gradient_is_wrong(model):
            raise ValueError(why)
        if not self._is_looked_at:
            warn_of_batch_norm(model)
            self._is_looked_at = True

    def part_of_update(self, term: Tensor) -> Tensor:
        """Returns a term's part in the mean over the forwards of the update, for an override of `compute_loss` to add.

        An update has `gradient_accumulation_steps` times `micro_batches` forwards, whose losses are added up::

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                found = super().compute_loss(model, inputs, return_outputs, **kwargs)
                term = self.part_of_update(0.01 * model.head.weight.square().sum())
                return (found[0] + term, found[1]) if return_outputs else found + term

        In evaluation it is the term itself, as the stock Trainer's loss of a batch is that of the batch.
        """
        if not self._unwrapped_model().training:
            return term
        return self._weight * term / self._forwards

    def _auxiliary(self, outputs: Any) -> Tensor | None:
        """Returns this forward's part of the mean of the auxiliary loss over the update."""
        auxiliary = self._minimized_auxiliary(outputs)
        if auxiliary is None:
            return None
        part = self.part_of_update(auxiliary)
        self._term_means.add(self.state.global_step, auxiliary_loss=part.detach())
        return part

    def _minimized_auxiliary(self, outputs: Any) -> Tensor | None:
        """Returns the auxiliary loss; None with label smoothing, which the Trainer computes from the logits alone."""
        return self.auxiliary_loss(outputs) if self.label_smoother is None else None

    def _encodes_once(self, encoder_once: EncoderOnce, inputs: Batch, target: Target) -> bool:
        def forward() -> Any:
            example, its_target = fullest_example(inputs, target)
            return self._unwrapped_model()(**repeat_batch(example, self.passes, batch_size=len(its_target.labels)))

        if self.encoder_once is False:
            return False
        reason = encoder_once.reason() or encoder_once.reason_seen(forward)
        return self._granted("encoder_once", encoder_once, reason)

    def _is_fused(
        self, fused: Fused, model: nn.Module, inputs: Batch, targets: list[Target], outputs_wanted: bool
    ) -> bool:
        if self.fused is False:
            return False
        if head_of(self._inner_model()) not in LANGUAGE_MODELS:
            reason: str | None = "it is no language model of transformers (causal, masked or encoder-decoder)"
        else:
            reason = why_not_fused(self, model, targets, outputs_wanted) or fused.reason()
            reason = reason or why_labels_stay(fused.inner, inputs)
        if reason is None and self.fused is None and not self._logits_are_large(fused.layer.weight, targets[0]):
            return False
        return self._granted("fused", fused, reason or self._inspect_head(fused, inputs, targets[0]))

    def _granted(self, argument: str, way: Fused | EncoderOnce, reason: str | None) -> bool:
        if reason is not None and getattr(self, argument):
            model = type(self._inner_model()).__name__
            raise ValueError(f"{argument}=True: {way.refusal.format(model=model, reason=reason)}")
        return reason is None

    def _logits_are_large(self, weight: Tensor, target: Target) -> bool:
        """Whether they would fill more than the chunk of memory in which `linear_rdrop_loss` works through them."""
        logits_bytes = self.passes * target.labels.numel() * len(weight) * weight.dtype.itemsize
        return logits_bytes > chunk_bytes(weight.device.type)

    def _inspect_head(self, fused: Fused, inputs: Batch, target: Target) -> str | None:
        """Looks, in the first micro-batches, by one example: is it exact, is the model's own loss what we compute?"""
        if self._checks_left == 0:
            return None
        model, inner = self._unwrapped_model(), self._inner_model()
        fullest = fullest_sequence if is_packed(inner, inputs) else fullest_example
        example, its_target = fullest(inputs, target)
        with same_randomness():
            outputs = model(**example)
        logits = its_target.logits(outputs)
        reason = fused.reason_seen(logits, lambda: model(**without_labels(inner, example)).logits)
        if logits.isnan().any():
            return None  # nothing can be seen by them; all processes have run the forward that FSDP makes joint
        if reason is None and its_target.count()[0] > 0:
            self._check_own_loss(outputs, [its_target])
        return reason

    def _check_hidden(self, hidden: Tensor, weight: Tensor) -> None:
        if not (hidden.requires_grad or weight.requires_grad):
            raise ValueError(
                "neither the hidden states nor the output layer carry a gradient in training: their parameters are "
                "frozen. Let requires_grad be True for what is to be trained"
            )
        if self._checks_left > 0:
            require_randomness(self._unwrapped_model(), [hidden], self.passes)

    # ------------------------------------------------------------------------- without

    def _plain_step(
        self, model: nn.Module, inputs: Batch, targets: list[Target], counts: Tensor, outputs_wanted: bool
    ) -> tuple[Tensor, Any]:
        """Runs one pass: the stock Trainer's loss where that is the mean over the whole update, else that mean."""
        label_smoothing = self._label_smoothing(inputs, targets)
        if getattr(getattr(self._inner_model(), "config", None), "return_dict", True) is False:
            inputs = {**inputs, "return_dict": True}
        alone = self._accumulation == 1 and self._processes() == 1
        if not self._loss_is_overridden() and (alone or self._divides_by_count is not False):
            loss, outputs = self._stock_loss(model, inputs, counts[0, 0] if len(targets) == 1 else None)
            # The model adds an auxiliary loss in every micro-batch, whatever divides the rest.
            stock = alone or (self._divides_by_count and self._minimized_auxiliary(outputs) is None)
            is_added = type(self).auxiliary_loss is not RDropMixin.auxiliary_loss and self.label_smoother is None
            if alone and self._checks_left and is_added:
                self._check_own_loss(outputs, targets)
        else:
            outputs, stock = model(**inputs), False
            self._check_model(outputs, targets)
        if not stock or len(targets) > 1:
            means = [
                target.share * divide(target.plain_loss(target.logits(outputs), label_smoothing), weight)
                for target, (_, weight) in zip(targets, counts, strict=True)
            ]
            mean = torch.stack(means).sum() * self._processes()
            loss = torch.where(counts[:, 0].min() > 0, loss, mean) if stock else mean  # a mean of no starts is 0 / 0
        loss = torch.where(counts.sum() > 0, loss, 0.0)  # of no label: 0 / 0 in the stock Trainer
        task_loss, auxiliary = loss.detach(), self._auxiliary(outputs)
        if auxiliary is not None and stock:
            task_loss = task_loss - auxiliary.detach()
        elif auxiliary is not None:
            loss = loss + auxiliary
        self._term_means.add(self.state.global_step, task_loss=task_loss)
        return loss, outputs

    def _stock_loss(self, model: nn.Module, inputs: Batch, count: Tensor | None) -> tuple[Tensor, Any]:
        """Computes the stock Trainer's loss, and sees once whether `count`, the labels of the whole update, divides it.

        Many models accept a count and ignore it. The signature does not tell; the graph of the loss does.
        """
        count = count if self.model_accepts_loss_kwargs else None
        if count is not None:
            count = count.clone().requires_grad_(self._divides_by_count is None)
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=count)
        if self._divides_by_count is None:
            self._divides_by_count = count is not None and _depends_on(loss, count)
        return loss, outputs

    # ------------------------------------------------------------------------- with both

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._term_means.pop(self.accelerator))
        self._labels_seen.warn(self.state.global_step)
        if "divergence" in logs:
            logs["alpha"] = self._alpha_used  # of the last regularized update
            self._divergence_seen.warn(logs["divergence"])
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the Trainer's model card, with a section that states R-Drop's settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(Path(str(self.args.output_dir)) / "README.md", self._settings())

    def _settings(self) -> dict[str, Any]:
        """Returns what a model card says, by its name here."""
        settings = {name: getattr(self, name) for name in METHOD if getattr(self, name) is not None}
        if self.unlabeled_dataset is not None:
            settings["unlabeled_dataset"] = f"{len(self.unlabeled_dataset)} examples"
            settings["unlabeled_batch_size"] = self.unlabeled_batch_size or self.args.per_device_train_batch_size
        return settings

    def _processes(self) -> int:
        """Returns over how many processes the mean of an update is taken; their gradients are averaged afterwards."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _unwrapped_model(self) -> Any:
        """Returns the model without DDP and torch.compile around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _inner_model(self) -> PreTrainedModel:
        """Returns the model without DDP, torch.compile and LoRA around it."""
        model = self._unwrapped_model()
        inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inner

    def _loss_is_overridden(self) -> bool:
        return type(self).rdrop_targets is not RDropMixin.rdrop_targets

    def _label_smoothing(self, inputs: Batch, targets: Sequence[Target]) -> float:
        if self.label_smoother is None:
            return 0.0
        check_label_smoothing(self.label_smoother.epsilon, self._inner_model(), inputs, targets)
        return float(self.label_smoother.epsilon)

    def _check_model(self, outputs: Any, targets: list[Target]) -> None:
        """Looks, in the first micro-batches: is anything random in the model, and is its loss the one we compute?"""
        if self._checks_left == 0 or any(target.count()[0] == 0 for target in targets):
            return
        if self.alpha > 0:
            require_randomness(self._unwrapped_model(), [target.logits(outputs) for target in targets], self.passes)
        self._check_own_loss(outputs, targets)

    def _check_own_loss(self, outputs: Any, targets: list[Target]) -> None:
        auxiliary = self.auxiliary_loss(outputs)
        if self._loss_is_overridden() or own_loss_is_known(self._inner_model(), outputs, targets, auxiliary):
            self._checks_left = max(0, self._checks_left - 1)


class RDropTrainer(RDropMixin, Trainer):
    """Trains with R-Drop as `transformers.Trainer` does without; `RDropMixin` has the arguments.

    Example::

        RDropTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()
    """


class RDropSeq2SeqTrainer(RDropMixin, Seq2SeqTrainer):
    """Trains with R-Drop as `transformers.Seq2SeqTrainer` does without; `RDropMixin` has the arguments.

    Example::

        args = Seq2SeqTrainingArguments("out", label_smoothing_factor=0.1)
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        RDropSeq2SeqTrainer(model=model, args=args, data_collator=collator, train_dataset=train, alpha=5.0).train()
    """


@contextmanager
def _labels_named(inputs: Batch) -> Iterator[None]:
    """Turns what the model's own cross-entropy raises on a CPU for a label that is no class into words about it."""
    try:
        yield
    except IndexError as error:
        labels = inputs.get("labels")
        if "out of bounds" not in str(error) or not isinstance(labels, Tensor):
            raise
        raise ValueError(
            f"labels {tuple(labels.shape)} from {labels.min()} to {labels.max()}: one of them is no class of the "
            f"model ({error}). Classes count from 0, and -100 stands for no label; a tokenizer with more tokens "
            "than the model needs model.resize_token_embeddings(len(tokenizer))"
        ) from error


def _depends_on(loss: Tensor, count: Tensor) -> bool:
    return torch.autograd.grad(loss, count, retain_graph=True, allow_unused=True)[0] is not None
