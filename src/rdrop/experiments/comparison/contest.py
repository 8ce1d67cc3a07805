"""A contest: an arm against its reference, judged together with the other contests of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.paired import PairedDifference
from rdrop.experiments.comparison.statistics import LEVEL, holm, is_shown, least_seeds, seeds_needed


class Outcome(Enum):
    """The verdict that the paired differences allow about an arm."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    SURVIVORS = "a difference on the seeds alone on which the arm that is ahead has not diverged"
    TOO_FEW = "fewer seeds than can show a difference"
    EQUAL = "equal on every seed"
    UNDECIDED = "no interval, nothing shown"
    NO_SEEDS = "no seed in common"
    NOT_LEARNED = "no run learned anything"


@dataclass(frozen=True)
class Contest:
    """An arm against its reference over the seeds that both have, with what the verdict on them depends on."""

    arm: Arm
    reference: Arm
    difference: PairedDifference
    p_value: float | None
    """Of the sign-flip test, after all corrections; None with fewer than two seeds in common."""
    contests: int = 1
    """How many contests are judged together, this one included."""
    looks: tuple[int, ...] = ()
    """How many seeds the earlier looks that count had, ascending."""
    p_values_of_others: tuple[float, ...] = ()
    """Of the contests that are judged together with it, before any correction."""

    @property
    def tests(self) -> int:
        """The factor of the smallest p: the number of contests, doubled for each earlier look."""
        return self.contests * (1 << len(self.looks))

    @property
    def tests_of_later(self) -> int:
        """The factor for a verdict on more seeds: this one is a look then, if it could have told the arms apart."""
        is_look = len(self.difference.seeds) >= least_seeds(self.contests)
        return self.contests * (1 << len(self.looks) + is_look)

    @property
    def least_seeds(self) -> int:
        """The least number of seeds that can show a difference here, the other contests being what they are.

        By Holm's method the others may leave fewer seeds enough than their number alone would.
        """
        return next(seeds for seeds in count(least_seeds()) if self._least_p(seeds) <= LEVEL)

    def _least_p(self, seeds: int) -> float:
        """Returns the least p that so many seeds can have, after all corrections."""
        return holm([2 / 2**seeds, *self.p_values_of_others])[0] * (1 << len(self.looks))

    @property
    def outcome(self) -> Outcome:
        """The strongest honest statement."""
        difference = self.difference
        if not difference.seeds:
            return Outcome.NO_SEEDS
        if not any(
            set(difference.seeds).difference(side.seeds_without_learning) for side in (self.arm, self.reference)
        ):
            return Outcome.NOT_LEARNED
        if len(difference.seeds) > 1 and not any(difference.per_seed):
            return Outcome.EQUAL
        if difference.mean is None or difference.interval is None:
            return Outcome.UNDECIDED
        if not is_shown(difference.interval, self.p_value):
            return Outcome.TOO_FEW if len(difference.seeds) < self.least_seeds else Outcome.NOT_SHOWN
        return Outcome.SURVIVORS if self.lost_seeds else _direction(difference)

    @property
    def ahead(self) -> Arm:
        """The side with the better mean."""
        return self.arm if _direction(self.difference) is Outcome.BETTER else self.reference

    @property
    def lost_seeds(self) -> tuple[int, ...]:
        """The seeds on which the side that is ahead has diverged without a score, and the other has not."""
        behind = self.reference if self.ahead is self.arm else self.arm
        return tuple(sorted(set(self.ahead.failures).difference(behind.failures)))

    @property
    def seeds_needed(self) -> int | None:
        """The number of seeds that would show the difference that was seen, with 80 % power; None without a spread, or
        if 1,000 are not enough.
        """
        difference = self.difference
        if difference.mean is None or difference.spread is None:
            return None
        return seeds_needed(difference.mean, difference.spread, self.tests_of_later)


Entry = tuple[Arm, Arm, PairedDifference]
"""An arm, its reference, and their scores."""


def judged(entries: Sequence[Entry], looks: Iterable[Sequence[frozenset[int]]] = ()) -> tuple[Contest, ...]:
    """Returns the contests of some arms with their references, their p values corrected for one another.

    Holm's correction for the number of contests comes first. Then p is doubled for each earlier look that counts:
    looks at 5, 2.5, 1.25 % and so on are together wrong in less than 10 %, however many there are. (A first look at the
    whole level leaves no correction that would keep all of them within it.) `looks` has for each earlier one, oldest
    first, the seeds of each contest that it was about.

    A look counts if it could have told the arms apart, until one has shown the difference that is there now. For
    whoever stops at the first verdict that shows something has had the tries up to it and no others; who adds seeds
    even so gains none.
    """
    counted: list[set[frozenset[int]]] = [set() for _ in entries]
    settled = [False] * len(entries)
    for seen in looks:
        own = [(arm, other, scores.of(seeds)) for (arm, other, scores), seeds in zip(entries, seen, strict=True)]
        needed = least_seeds(max(1, sum(map(bool, seen))))
        for place, contest in enumerate(_corrected(own, counted)):
            settled[place] |= contest.outcome is _direction(entries[place][-1])
            if len(seen[place]) >= needed and not settled[place]:
                counted[place].add(seen[place])
    return _corrected(entries, counted)


def _corrected(entries: Sequence[Entry], looks: Sequence[Iterable[frozenset[int]]]) -> tuple[Contest, ...]:
    """`looks` are those that count for each contest; the ones at fewer seeds than it has are its earlier ones."""
    raw = {place: p for place, (*_, difference) in enumerate(entries) if (p := difference.p_value) is not None}
    corrected = dict(zip(raw, holm([*raw.values()]), strict=True))
    contests = []
    for place, ((arm, reference, difference), own) in enumerate(zip(entries, looks, strict=True)):
        earlier = tuple(sorted(len(seeds) for seeds in own if len(seeds) < len(difference.seeds)))
        p_value = min(1.0, 2 ** len(earlier) * corrected[place]) if place in raw else None
        others = tuple(p for at, p in raw.items() if at != place)
        contests.append(Contest(arm, reference, difference, p_value, len(others) + 1, earlier, others))
    return tuple(contests)


def _direction(difference: PairedDifference) -> Outcome:
    """Returns what a difference is, if it is shown."""
    is_above = difference.mean is not None and difference.mean > 0
    return Outcome.BETTER if is_above == difference.higher_is_better else Outcome.WORSE
