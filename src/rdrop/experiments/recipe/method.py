"""The method: how R-Drop is applied, as one frozen section of a recipe.

All that the project says of a key of the method stands here: its rule, what it is in plain training, whether it tells
two arms of a comparison apart, and what a reader calls the arm. `training.objective` does what the keys ask for.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rdrop.alpha import AlphaSchedule, alpha_at
from rdrop.experiments.recipe.settings import Count, Probability, RecipeError, Section, added

_TIMES = {2: "twice", 3: "three times", 4: "four times"}


def times(count: int) -> str:
    """Returns "twice", "three times", ... as a reader says it."""
    return _TIMES.get(count, f"{count} times")


class Method(Section):
    """R-Drop as in the paper, where nothing else is said; plain training with `alpha=0`."""

    alpha: float = Field(
        ge=0,
        description="Weight of the divergence between the passes, as in the paper. 0 is plain single-pass training.",
    )
    alpha_schedule: AlphaSchedule = added(
        "constant",
        "Course of alpha over the updates: constant; or rising from 0 to alpha at the last update, linearly or with "
        "the square of progress.",
    )
    passes: int = Field(
        2,  # the paper's method; on IWSLT14 De-En 3 gave 37.30 BLEU instead of 37.25
        ge=2,
        le=64,
        description="Forward passes per example, each with its own dropout masks. Unused when alpha is 0.",
    )
    every: Count = Field(
        1,  # the paper's best of 1, 2, 5 and 10
        description="Apply R-Drop at every this many updates; the others are plain. Unused when alpha is 0.",
    )
    # Lax for the tuple alone: JSON has lists.
    dropout: Annotated[tuple[Probability, ...], Field(strict=False)] | None = Field(
        None,
        description="A dropout rate for each pass, which then has a forward of its own. null: the model's own rates.",
    )
    cutoff: Literal["token", "span", "feature", "unknown", "embedding"] | None = Field(
        None,
        description="What is cut from the input of every pass but the first. null: nothing, which is plain R-Drop.",
    )
    cutoff_ratio: Probability = Field(
        0.0, description="Share of the tokens, or of the features, that the cutoff takes."
    )
    views: Literal["same", "each"] = added(
        "same",
        "Whether all passes have the same augmented input, as in the paper; or each has one of its own.",
    )
    task_passes: Literal["all", "first"] = Field(
        "all",
        description="Which passes carry the task loss: all; or the first, which is SimCut where the others are cut.",
    )
    divergence: Literal["symmetric", "from-first"] = Field(
        "symmetric",
        description="Between which passes: all pairs, both ways, as in the paper; or from the first to each of the "
        "others, as in SimCut.",
    )
    fused: bool = Field(
        False,
        description="Compute R-Drop's loss of a language model from its hidden states: the logits are never stored.",
    )
    encoder_once: bool = Field(
        False,
        description="Run an encoder in which nothing is random once for all passes, instead of once for each.",
    )

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.dropout is not None and len(self.dropout) != self.passes:
            raise RecipeError("dropout", f"must have passes (={self.passes}) rates, one for each", value=self.dropout)
        if self.dropout is not None and self.cutoff is not None:
            raise RecipeError("dropout", "must be null with a cutoff, whose passes share a forward", value=self.dropout)
        if self.cutoff is None and self.cutoff_ratio > 0:
            raise RecipeError("cutoff_ratio", "must be 0 without a cutoff; set cutoff too", value=self.cutoff_ratio)
        if self.cutoff is not None and self.cutoff_ratio == 0:
            raise RecipeError("cutoff_ratio", f"must be above 0 for cutoff (={self.cutoff})", value=0)
        if not self.is_plain and self.dropout is not None and not any(self.dropout) and self.views == "same":
            raise RecipeError(
                "dropout", "must have a rate above 0, or all passes would be the same", value=self.dropout
            )
        if self.fused and (self.dropout is not None or self.task_passes != "all" or self.divergence != "symmetric"):
            rule = 'must be false where dropout is set, task_passes is not "all" or divergence not "symmetric"'
            raise RecipeError("fused", rule, value=True)
        if self.views == "each" and self.cutoff is not None:
            raise RecipeError("views", 'must be "same" with a cutoff, which is a view of its own', value=self.views)
        if self.encoder_once and (self.dropout is not None or self.cutoff is not None or self.views == "each"):
            rule = 'must be false with dropout, a cutoff or views="each": passes differ before the encoder'
            raise RecipeError("encoder_once", rule, value=True)
        return self

    @property
    def is_plain(self) -> bool:
        """Whether this is plain single-pass training."""
        return self.alpha == 0

    def plain(self) -> Method:
        """Returns the baseline of this method. R-Drop, R-Drop + Cutoff and SimCut of one recipe share its runs."""
        return Method(alpha=0.0, passes=self.passes)

    def arm(self) -> Method:
        """Returns what tells arms apart: all of it; of plain training nothing, whatever the unused keys say."""
        return Method(alpha=0.0) if self.is_plain else self

    def acts_at(self, step: int) -> bool:
        """Whether the update after `step` updates has several passes: updates k, 2k, ... of k-step R-Drop."""
        return not self.is_plain and (step + 1) % self.every == 0

    def views_at(self, step: int) -> int:
        """Returns how many views of its examples the batch of the update after `step` updates has: 1, or `passes`."""
        return self.passes if self.views == "each" and self.acts_at(step) else 1

    def alpha_at(self, step: int, updates: int) -> float:
        """Returns the weight of the divergence in the update after `step` of `updates` updates."""
        return alpha_at(step, updates, self.alpha, self.alpha_schedule)

    def extra_passes(self) -> float:
        """Returns the forward passes of an example beyond the first, as a mean over the updates."""
        return 0.0 if self.is_plain else (self.passes - 1) / self.every

    def name(self) -> str:
        """Returns the method's name in the literature: "R-Drop", "SimCut", ...; "baseline" for plain training."""
        if self.is_plain:
            return "baseline"
        if self.cutoff is None:
            return "R-Drop"
        if self.cutoff == "embedding" and self.task_passes == "first":
            return "SimCut"
        return f"R-Drop + {self.cutoff} cutoff"

    def label(self, times_the_batch: int = 1) -> str:
        """Returns the arm's name for a reader: "R-Drop (alpha 1)"; "baseline, twice the batch"."""
        if not self.is_plain:
            return f"{self.name()} ({', '.join(self._details())})"
        if times_the_batch == 1:
            return self.name()
        return f"{self.name()}, {times(times_the_batch)} the batch"

    def order(self) -> tuple[object, ...]:
        """Returns a key by which arms are sorted: plain training first, then by alpha."""
        return (self.alpha, self.passes, self.every, self._details()[1:], self.name())

    def _details(self) -> list[str]:
        details = [f"alpha {self.alpha:g}"]
        if self.alpha_schedule != "constant":
            details.append(self.alpha_schedule)
        if self.passes != 2:
            details.append(f"{self.passes} passes")
        if self.every != 1:
            details.append(f"every {self.every} updates")
        if self.cutoff is not None:
            details.append(f"cutoff {self.cutoff_ratio:g}")
        if self.views == "each":
            details.append("a view per pass")
        if self.task_passes == "first" and self.name() != "SimCut":
            details.append("task loss of the first pass")
        if self.divergence != "symmetric":
            details.append("KL from the first pass")
        if self.dropout is not None:
            details.append(f"dropout {' and '.join(f'{rate:g}' for rate in self.dropout)}")
        if self.fused:
            details.append("fused")
        if self.encoder_once:
            details.append("encoder once")
        return details
