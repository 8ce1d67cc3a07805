"""How far the training is: bars in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from rdrop.experiments.recipe import Recipe

if TYPE_CHECKING:
    from rdrop.experiments.training import trainer

SECONDS_BETWEEN_LINES = 30.0
SPEED_WINDOW_SECONDS = 120.0  # spans several runs of an arm, so that the time left does not jump between the arms


class Display(Protocol):
    """Told of each run: `start`, `update` after some of its updates, `finish` with a line that stays."""

    def start(self, label: str, recipe: Recipe) -> None: ...
    def update(self, progress: trainer.Progress) -> None: ...
    def finish(self, line: str) -> None: ...


class Bars:
    """One bar for all runs, if there are several, and one for the current run; above them a line per finished run."""

    def __init__(self, console: Console, recipes: list[Recipe], waiting: list[Recipe]) -> None:
        self.live = Live(console=console, transient=True, refresh_per_second=8)
        self._bars = Progress(
            TextColumn("{task.description}"),
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
        self._current = self._bars.add_task("", total=None, count="")
        self._cost = 0.0

    def start(self, label: str, recipe: Recipe) -> None:
        self._cost = forward_examples(recipe)
        self._bars.reset(self._current, description=label, total=recipe.updates, count=f"0/{recipe.updates}")
        self._bars.update(self._overall, count=f"{self._finished_runs}/{self._runs}")
        self._show("loading the data, building the model")

    def update(self, progress: trainer.Progress) -> None:
        share = progress.step / progress.updates
        self._bars.update(self._current, completed=progress.step, count=f"{progress.step}/{progress.updates}")
        self._bars.update(self._overall, completed=self._finished_cost + share * self._cost)
        self._show(pace(progress))

    def finish(self, line: str) -> None:
        self._finished_runs += 1
        self._finished_cost += self._cost
        self.live.console.print(line, markup=False, highlight=False)

    def _show(self, text: str) -> None:
        self.live.update(Group(self._bars, Text(text, style="dim")))


class Lines:
    """A line for each finished run, and one in half a minute while a run is on, with the time left of that run."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._label = ""
        self._last = clock()

    def start(self, label: str, recipe: Recipe) -> None:
        self._label = label

    def update(self, progress: trainer.Progress) -> None:
        if self._clock() - self._last >= SECONDS_BETWEEN_LINES:
            line = f"{self._label}: {progress.step}/{progress.updates}, {time_left(progress)} left, {pace(progress)}"
            self._print(line)

    def finish(self, line: str) -> None:
        self._print(line)

    def _print(self, line: str) -> None:
        self._last = self._clock()
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
    extra_passes = recipe.method.extra_passes()
    return recipe.updates * (recipe.batch_size or recipe.batch_tokens or 0) * (1 + extra_passes)


def time_left(progress: trainer.Progress) -> str:
    """Until the last update, in whole seconds, minutes or tenths of hours: "45 s", "12 min", "3.5 h"."""
    seconds = (progress.updates - progress.step) * progress.seconds_per_step
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def pace(progress: trainer.Progress) -> str:
    """What changes from update to update, in one line."""
    parts = [f"{1 / progress.seconds_per_step:.3g} updates/s", f"loss {progress.loss:.4g}"]
    if progress.valid is not None:
        parts += [f"valid {metric} {score:.4g}" for metric, score in progress.valid.items()]
    return ", ".join(parts)
