"""The sentences of a comparison: its verdict, and what a reader should know beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.contest import Contest, Outcome
from rdrop.experiments.comparison.examples import ExampleDifference
from rdrop.experiments.comparison.hints import folds_of
from rdrop.experiments.comparison.learning import source_use
from rdrop.experiments.comparison.paired import PairedDifference
from rdrop.experiments.comparison.sections import Section
from rdrop.experiments.comparison.wording import NumberStyle, counted, listed, p_words, words


def verdict(contest: Contest, metric: str, style: NumberStyle) -> str:
    """Says in one sentence what the paired seeds show, and no more than they show."""
    difference, arm, reference = contest.difference, contest.arm.phrase, contest.reference.phrase
    n = len(difference.seeds)
    amount = f"{words(metric)} {style.difference(difference.mean)}{style.points}"
    interval = f"95 % interval {style.interval(difference.interval)}, {p_words(contest.p_value)}"
    match contest.outcome:
        case Outcome.NO_SEEDS:
            sentence = f"Nothing to compare: {arm} and {reference} have no scored seed in common."
        case Outcome.NOT_LEARNED:
            sentence = f"Nothing to compare: no run of {arm} or of {reference} learned anything."
        case Outcome.EQUAL if n < contest.least_seeds:
            sentence = (
                f"Too few seeds: {words(metric)} of {arm} and {reference} is equal on all {n} seeds; "
                f"{contest.least_seeds} are the least that can show a difference."
            )
        case Outcome.EQUAL:
            sentence = f"No difference between {arm} and {reference}: {words(metric)} is equal on all {n} seeds."
        case Outcome.UNDECIDED if n == 1:
            sentence = (
                f"One seed shows nothing: {arm} against {reference} is {amount} on seed {difference.seeds[0]}, "
                f"and {contest.least_seeds} are the least that can show a difference."
            )
        case Outcome.UNDECIDED:
            sentence = (
                f"Nothing shown: {arm} against {reference} is {amount} on each of {n} seeds, "
                "and equal differences have no spread to build an interval from."
            )
        case Outcome.TOO_FEW:
            sentence = (
                f"Too few seeds: {arm} against {reference} is {amount} ({interval}), {_wins(difference)}; "
                f"{contest.least_seeds} are the least that can show a difference."
            )
        case Outcome.NOT_SHOWN:
            sentence = f"No difference shown between {arm} and {reference}: {amount} ({interval}, {_wins(difference)})."
        case Outcome.SURVIVORS:
            ahead, lost = contest.ahead.phrase, contest.lost_seeds
            sentence = (
                f"Nothing shown: {ahead} diverged on {counted(len(lost), 'seed')} ({listed(lost)}) and has no score "
                f"there. On the others {arm} against {reference} is {amount} ({interval}, {_wins(difference)})."
            )
        case Outcome.BETTER | Outcome.WORSE as outcome:
            sentence = f"{arm} is {outcome.value} than {reference}: {amount} ({interval}, {_wins(difference)})."
    return sentence[0].upper() + sentence[1:]


def corrections(contests: Sequence[Contest], added: Sequence[Arm] = ()) -> list[str]:
    """Says for what the p values of a verdict are corrected; nothing for a single contest at its first look.

    `added` are the arms that came after a verdict on the others.
    """
    sentences = []
    silent = (Outcome.NO_SEEDS, Outcome.NOT_LEARNED, Outcome.EQUAL, Outcome.UNDECIDED)  # which say no p
    if all(contest.outcome in silent for contest in contests):
        return []
    of_contests = dict.fromkeys(contest.looks for contest in contests)
    judged = sum(contest.p_value is not None for contest in contests)
    if judged > 1:
        chance = (
            ": where none has a difference, and all arms were planned before the first verdict, the chance that any of "
            "them seems to have one is at most 5 %"
        )
        is_planned = not (added or any(of_contests))
        sentences.append(f"p is corrected for {judged} comparisons by Holm's method{chance if is_planned else ''}.")
    if added:
        sentences.append(
            f"Added after a verdict on the other arms had been seen: {'; '.join(arm.label for arm in added)}. Each arm "
            "is a further chance, so all verdicts together may be wrong about equal arms more often than in 5 %."
        )
    where = "" if len(of_contests) == 1 else ", in the comparisons of which they had shown nothing"
    for looks in filter(None, of_contests):
        sentences.append(
            f"Seeds were added after the verdict on {listed(looks)} seeds had been seen. Each look is a chance for a "
            f"false verdict, so p is doubled for each look before this one{where}. However many there are, the chance "
            f"that one of them is wrong about equal arms stays below 10 %{', had no arm been added' if added else ''}."
        )
    return sentences


def seeds_needed(contest: Contest, style: NumberStyle) -> str | None:
    """Says how many seeds would show a difference as large as the one that was seen; None where that is not open."""
    difference = contest.difference
    if contest.outcome not in (Outcome.TOO_FEW, Outcome.NOT_SHOWN) or not difference.mean:
        return None
    needed = contest.seeds_needed
    number = "more than 1,000" if needed is None else str(needed)
    size = f"{style.difference(abs(difference.mean)).lstrip('+')}{style.points}"
    folds = max((count for run in contest.arm.runs if (count := folds_of(run)) is not None), default=None)
    own_parts = "" if folds is None or (needed or folds + 1) <= folds else f"; {folds} have a part of their own"
    few = len(difference.seeds) < contest.least_seeds
    roughly = f"; {len(difference.seeds)} seeds tell the spread only roughly" if few else ""
    return (
        f"With this spread, {number} seeds would show a difference of {size} between {contest.arm.phrase} and "
        f"{contest.reference.phrase} (80 % power{roughly}{own_parts})."
    )


def without_learning(arm: Arm) -> str | None:
    """Says which runs of an arm did not learn; None where none is known to be such a run."""
    seeds = arm.seeds_without_learning
    if not seeds:
        return None
    noun = "seed" if len(seeds) == 1 else "seeds"
    runs = f"{len(seeds)} of {counted(len(arm.runs), f'{arm.label} run')}"
    ignored = any(source_use(run) is not None for run in arm.runs if run.seed in seeds)
    what = "they hardly read their sources" if ignored else "no better than a constant prediction"
    return f"{runs} did not learn ({noun} {listed(seeds)}): {what}."


def diverged_runs(arm: Arm) -> str | None:
    """Says which runs of an arm have diverged, with a score or without one; None where none has."""
    found = arm.diverged
    if not found:
        return None
    noun = "seed" if len(found) == 1 else "seeds"
    runs = f"{len(found)} of {counted(len(arm.runs) + len(arm.failures), f'{arm.label} run')}"
    seed, seen = next(iter(found.items()))
    which = "" if len(found) == 1 else f" (seed {seed})"
    advice = ""
    if len(found) > len(arm.failures):  # of those without a score the list of unfinished runs has what each was advised
        advice = f" Lower learning_rate (={arm.recipe['learning_rate']:g}), or lengthen the warm-up."
    return f"{runs} diverged ({noun} {listed(tuple(found))}): {seen}{which}.{advice}"


def on_these_examples(contest: Contest, found: ExampleDifference, metric: str, style: NumberStyle) -> str:
    """Says whether the models differ on this test set, whatever other seeds would give."""
    differ = len(found.differing_seeds)
    evidence = f"paired bootstrap over the {found.examples:,} test examples"
    names = f"{contest.arm.phrase} and {contest.reference.phrase}"
    if len(found.seeds) == 1:
        verb = "differ" if differ else "do not differ"
        return (
            f"On this test set the two models of seed {found.seeds[0]}, {names}, {verb} ({evidence}: {words(metric)} "
            f"{style.interval(found.interval)}). That is about these two models, not about the method."
        )
    return (
        f"On this test set the models of {names} differ on {differ} of {len(found.seeds)} seeds, each looked at alone. "
        f"For 95 % of redrawn test sets, the mean over the seeds is {style.interval(found.interval)}{style.points} "
        f"({evidence})."
    )


def robust_averages(section: Section, subject: Arm | None) -> str | None:
    """Says the interquartile means, and how likely a run of each arm is better than one of the baseline.

    With a subject: how likely a run of it is better than one of each other arm.

    None where no arm has as many seeds as that takes.
    """
    rows = [row for row in section.rows if row.interquartile_mean is not None]
    if not rows:
        return None
    style = section.style
    means = "; ".join(f"{row.arm.label} {style.score(row.interquartile_mean)}" for row in rows)
    sentence = f"Interquartile mean of {section.split} {style.heading(section.metric)}: {means}."
    improvements = [f"{row.arm.label} {row.improvement:.2f}" for row in rows if row.improvement is not None]
    if not improvements:
        return sentence
    what = "Probability of improvement" + ("" if subject is None else f" of {subject.label}")
    over = "over the baseline: " if subject is None else "over "
    return f"{sentence} {what} {over}{'; '.join(improvements)}."


def _wins(difference: PairedDifference) -> str:
    return f"better on {difference.wins_ties_losses[0]} of {len(difference.seeds)} seeds"
