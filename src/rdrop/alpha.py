"""Alpha, the weight of the divergence: its course over the updates, and what it is in other implementations.

The same symbol means other things elsewhere. Most mix a mean cross-entropy with a sum (or another mean) of the KL, so
the strength they really apply follows the batch, or the number of classes. docs/alpha.md has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

AlphaSchedule = Literal["constant", "linear", "quadratic"]

AUTO_ALPHA: tuple[float, AlphaSchedule] = (4.0, "quadratic")
"""What `alpha="auto"` stands for: a schedule, not an adaptation."""


def alpha_at(step: int, steps: int, alpha: float, schedule: AlphaSchedule = "constant") -> float:
    """Returns the weight of the divergence in the update after `step` of `steps` updates.

    `alpha` at every update, if `constant`; else it rises from 0 to `alpha` at the last update: with progress
    `(step + 1) / steps`, if `linear`, or with its square, if `quadratic`. Nothing else enters, so a resumed training
    goes on as if it had not been stopped. It rises no further after `steps` updates.
    """
    if schedule not in ("constant", "linear", "quadratic"):
        raise ValueError(f"the schedule of alpha (={schedule!r}) must be 'constant', 'linear' or 'quadratic'")
    if schedule == "constant":
        return alpha
    if steps < 1:
        raise ValueError(
            f"a {schedule} schedule of alpha rises over all updates, and their number (={steps}) is not known: give "
            "the training a number of updates (max_steps, say), or take the schedule 'constant'"
        )
    progress = min(1.0, (step + 1) / steps)
    return alpha * (progress if schedule == "linear" else progress**2)


def course_of(alpha: Any, schedule: AlphaSchedule) -> tuple[Any, AlphaSchedule]:
    """Returns an alpha and its schedule as they are, or what the alpha "auto" stands for, which has its own."""
    if alpha != "auto":
        return alpha, schedule
    if schedule not in ("constant", AUTO_ALPHA[1]):
        raise ValueError(
            f"alpha_schedule (={schedule!r}) must be left out with alpha='auto', which is a schedule itself"
        )
    return AUTO_ALPHA


@dataclass(frozen=True)
class LegacyForm:
    """The paper's alpha is `factor * alpha`, times the rows of a step, divided by the classes, where those apply."""

    what: str
    factor: float = 1.0
    times_rows: bool = False
    by_classes: bool = False
    note: str = ""


LEGACY_FORMS: dict[str, LegacyForm] = {
    "official-fairseq": LegacyForm("official code, translation and summarization (fairseq)"),
    "official-readme-sum": LegacyForm("official README snippet, KL by sum", 2, times_rows=True),
    "official-readme-mean": LegacyForm("official README snippet, changed to a batch mean", 2),
    "official-bert": LegacyForm(
        "official code, BERT", times_rows=True, note="alpha is a constant 0.5 in the model file"
    ),
    "official-roberta": LegacyForm(
        "official code, RoBERTa",
        4,
        times_rows=True,
        note="alpha is a constant 0.7 in the model file; the second pass's cross-entropy is dead code; approximate",
    ),
    "official-vit": LegacyForm("official code, ViT", 2, times_rows=True, note="alpha is 0.3; rows of a micro-batch"),
    "bert4keras": LegacyForm("bojone's bert4keras example"),
    "bert4torch": LegacyForm("bert4torch, and many an `RDropTrainer`", by_classes=True, note="mean over the classes"),
    "paddlenlp": LegacyForm(
        "PaddleNLP PromptTrainer", 2, times_rows=True, note="the polarity of its pad_mask is inverted"
    ),
    "fairseq-main": LegacyForm(
        "fairseq main, label_smoothed_cross_entropy_with_rdrop", note="also active in validation, where it crashes"
    ),
}


def legacy_alpha(implementation: str, alpha: float, *, rows: int | None = None, classes: int | None = None) -> float:
    """Returns the paper's alpha that `implementation` really applies when told `alpha`: pass it to `rdrop_loss`.

    Example: a BERT run of the official code with 32 rows on a device, `legacy_alpha("official-bert", 0.5, rows=32)`, is
    R-Drop with alpha 16.

    Args:
        implementation: a key of `LEGACY_FORMS`.
        alpha: the setting there.
        rows: rows (examples, or tokens for a sequence model) in one step of one device, where the form follows them.
        classes: number of classes, where the form follows them.
    """
    if implementation not in LEGACY_FORMS:
        raise ValueError(f"implementation (={implementation!r}) must be one of {', '.join(LEGACY_FORMS)}")
    form = LEGACY_FORMS[implementation]
    if form.times_rows:
        alpha *= _given("rows", rows, implementation)
    if form.by_classes:
        alpha /= _given("classes", classes, implementation)
    return form.factor * alpha


def _given(name: str, value: int | None, implementation: str) -> int:
    if value is None or value < 1:
        raise ValueError(f"{name} (={value}) must be a positive number: the strength of {implementation!r} follows it")
    return value
