"""Shows how far the runs are, one or several at a time: bars in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.training.progress import Progress

SECONDS_BETWEEN_LINES = 30.0
SPEED_WINDOW_SECONDS = 120.0  # spans several runs of an arm, so that the time left does not jump between the arms
UNKNOWN_EXAMPLES = 1000
"""What an epoch counts for in the time left before the data are loaded."""


class Display(Protocol):
    """Told of each run by its label: `start`, `update` after some of its updates, `finish` with a line that stays."""

    def start(self, label: str, recipe: Recipe) -> None: ...
    def update(self, label: str, progress: Progress) -> None: ...
    def finish(self, label: str, line: str | None) -> None: ...

    def drop(self, label: str) -> None:
        """Forgets a run that ended without a result."""

    def say(self, line: str) -> None:
        """Shows a line that stays."""

    def wait(self, reason: str) -> None:
        """Shows why nothing seems to happen."""


class Bars:
    """One bar for all runs, if there are several, and one for each that is on; above them a line per finished run."""

    def __init__(self, console: Console, recipes: list[Recipe], waiting: list[Recipe]) -> None:
        self.live = Live(console=console, transient=True, refresh_per_second=8)
        self._bars = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", justify="right"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )
        total = sum(map(forward_examples, recipes))
        self._runs = len(recipes)
        self._finished_runs = len(recipes) - len(waiting)
        self._finished_cost = total - sum(map(forward_examples, waiting))
        self._overall = self._bars.add_task(
            "all runs", total=total, completed=int(self._finished_cost), count="", visible=len(recipes) > 1
        )
        self._on: dict[str, _Bar] = {}
        self._reason = ""

    def start(self, label: str, recipe: Recipe) -> None:
        self._reason = ""
        count = "" if recipe.updates is None else f"0/{recipe.updates}"
        task = self._bars.add_task(label, total=recipe.updates, count=count)
        self._on[label] = _Bar(task, forward_examples(recipe))
        self._show()

    def update(self, label: str, progress: Progress) -> None:
        if progress.warning is not None:
            self.say(f"{label}: {progress.warning}")
        bar = self._on[label]
        bar.share, bar.pace = progress.step / progress.updates, pace(progress)
        count = f"{progress.step}/{progress.updates}"
        self._bars.update(bar.task, completed=progress.step, total=progress.updates, count=count)
        self._show()

    def finish(self, label: str, line: str | None) -> None:
        bar = self._on.get(label)
        self._finished_cost += bar.cost if bar is not None else 0.0
        self._finished_runs += 1
        self.drop(label)
        if line is not None:
            self.say(line)

    def drop(self, label: str) -> None:
        bar = self._on.pop(label, None)
        if bar is not None:
            self._bars.remove_task(bar.task)
        self._show()

    def say(self, line: str) -> None:
        self.live.console.print(line, markup=False, highlight=False)

    def wait(self, reason: str) -> None:
        self._reason = reason
        self._show()

    def _show(self) -> None:
        on = self._on.values()
        completed = self._finished_cost + sum(bar.share * bar.cost for bar in on)
        self._bars.update(self._overall, completed=completed, count=f"{self._finished_runs}/{self._runs}")
        paces = [bar.pace if len(on) == 1 else f"{label}: {bar.pace}" for label, bar in self._on.items()]
        lines = [self._reason] if self._reason else paces
        self.live.update(Group(self._bars, *(Text(line, style="dim") for line in lines)))


@dataclass
class _Bar:
    """A run that is on."""

    task: TaskID
    cost: float
    share: float = 0.0
    pace: str = "loading the data, building the model"


class Lines:
    """A line for each finished run, and in half a minute one for each that is on, with the time left of that run."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._on: dict[str, Progress | None] = {}
        self._reason = ""
        self._last = clock()

    def start(self, label: str, recipe: Recipe) -> None:
        self._on[label] = None

    def update(self, label: str, progress: Progress) -> None:
        if progress.warning is not None:
            self.say(f"{label}: {progress.warning}")
        self._on[label] = progress
        if self._clock() - self._last >= SECONDS_BETWEEN_LINES:
            for name, known in self._on.items():
                if known is not None:
                    self._print(f"{name}: {known.step}/{known.updates}, {time_left(known)} left, {pace(known)}")
            self._last = self._clock()

    def finish(self, label: str, line: str | None) -> None:
        self.drop(label)
        if line is not None:
            self.say(line)

    def drop(self, label: str) -> None:
        self._on.pop(label, None)

    def say(self, line: str) -> None:
        self._last = self._clock()
        self._print(line)

    def wait(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            self.say(reason)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def show_progress(console: Console, recipes: list[Recipe], waiting: list[Recipe]) -> Iterator[Display]:
    """A display for training those of the `recipes` that are `waiting`; the others are finished."""
    if not console.is_terminal:
        yield Lines(console)
        return
    bars = Bars(console, recipes, waiting)
    with bars.live:
        yield bars


def forward_examples(recipe: Recipe) -> float:
    """The cost of a run, for the time left: examples, or tokens, that go through the network in training."""
    passes = 1 + recipe.method.extra_passes()
    if recipe.updates is None:  # the size of an epoch is not known yet, and the same for all runs
        return (recipe.epochs or 0) * UNKNOWN_EXAMPLES * passes
    return recipe.updates * (recipe.batch_size or recipe.batch_tokens or 0) * passes


def time_left(progress: Progress) -> str:
    """Until the last update, in whole seconds, minutes or tenths of hours: "45 s", "12 min", "3.5 h"."""
    seconds = (progress.updates - progress.step) * progress.seconds_per_step
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def pace(progress: Progress) -> str:
    """Returns what changes from update to update, in one line."""
    parts = [f"{1 / progress.seconds_per_step:.3g} updates/s", f"loss {progress.loss:.4g}"]
    if progress.valid is not None:
        parts += [f"valid {metric} {score:.4g}" for metric, score in progress.valid.items()]
    return ", ".join(parts)


def summary(result: dict[str, Any], *, split: str = "test", cost: bool = True) -> str:
    """The outcome of a run in one line: "test accuracy 87.3 %, trained in 14 s"."""
    from rdrop.experiments.comparison.wording import NumberStyle, words

    metric = result["metric"]
    style = NumberStyle.of(metric, [])
    unit = " %" if style.percent else ""
    seconds = result["cost"]["train_seconds"] if cost else None
    trained = "" if seconds is None else f", trained in {seconds:.0f} s"
    return f"{split} {words(metric)} {style.score(result[split][metric])}{unit}{trained}"
