"""Several processes share the examples of a score, and find what one finds alone, to the bit.

Run as a script, this file is one of these processes: `test_share.py FILE` writes what it has found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from accelerate import PartialState
from tests.several_processes import outputs_of
from torch import nn

from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.tasks.digits import task as digits
from rdrop.experiments.tasks.image_classification import task as image_classification
from rdrop.experiments.tasks.language_modeling import task as language_modeling
from rdrop.experiments.tasks.share import ALONE, Share
from rdrop.experiments.tasks.task import KeepsPredictions, SharesEvaluation, ShowsLearning, Task, load_task
from rdrop.experiments.tasks.text_classification import task as text_classification

TASKS = ("digits", "image-classification", "language-modeling", "summarization", "text-classification", "translation")
SIZE = 7  # of the batches: the last is smaller, and there are enough for two
SIZES = (
    *((module, "EVALUATION_BATCH") for module in (digits, image_classification, text_classification)),
    (language_modeling, "LONGEST_EVALUATION_BATCH"),
)
Found = TypeVar("Found")


class OfAThread(Share):
    """A share whose processes are threads."""

    def __init__(self, process: int, parts: list[Any], barrier: Barrier) -> None:
        self.polls = 0
        super().__init__(process, len(parts), self.count)
        self.parts, self.barrier = parts, barrier

    def count(self) -> None:
        self.polls += 1

    def gather(self, own: list[Found]) -> list[list[Found]]:
        self.parts[self.process] = own
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found


def in_threads(size: int, function: Callable[[Share], Found]) -> tuple[list[Found], list[int]]:
    """What each of the threads finds with its share, and how often it polled."""
    parts, barrier = [None] * size, Barrier(size, timeout=600)
    shares = [OfAThread(process, parts, barrier) for process in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, shares)), [share.polls for share in shares]


@pytest.mark.parametrize("count", range(8))
def test_each_part_is_computed_once_and_all_have_all_in_order(count: int) -> None:
    computed: list[int] = []

    def square(part: int) -> int:
        computed.append(part)
        return part * part

    found, polls = in_threads(3, lambda share: share.map(square, range(count)))
    assert found == [[part * part for part in range(count)]] * 3
    assert sorted(computed) == list(range(count))
    assert len(set(polls)) == 1  # so that a poll may ask the others
    assert ALONE.map(square, range(count)) == found[0]


@pytest.mark.parametrize("name", TASKS)
def test_two_shares_are_the_scores_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, size in SIZES:
        monkeypatch.setattr(module, size, SIZE)
    tasks = [loaded(name) for _ in range(3)]
    alone = found_by(*tasks.pop(), ALONE)
    both, _ = in_threads(2, lambda share: found_by(*tasks[share.process], share))
    assert both[0]["found"] == both[1]["found"] == alone["found"]
    assert 0 < both[0]["computed"] < alone["computed"] == both[0]["computed"] + both[1]["computed"]


@pytest.mark.long
def test_two_processes_find_the_scores_of_one(tmp_path: Path) -> None:
    outputs_of(2, "-m", "tests.experiments.training.test_share", str(tmp_path))
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    alone = {name: found_by(*loaded(name), ALONE)["found"] for name in TASKS}
    assert first == second == json.loads(json.dumps(alone))


def loaded(name: str) -> tuple[Task, nn.Module]:
    """The task in its tiny form, and a new model."""
    recipe: Recipe = next(recipe for recipe in RECIPES.values() if recipe.task == name).tiny()
    task = load_task(recipe.replace(**{"decoding.batch_size": SIZE}) if hasattr(recipe, "decoding") else recipe)
    seed_all(0, "model")
    return task, task.build_model().eval()


def found_by(task: Task, model: nn.Module, share: Share) -> dict[str, Any]:
    """The scores, signs and predictions, and how many batches were computed for them."""
    assert isinstance(task, SharesEvaluation)
    task.share = share
    computed: list[None] = []
    logits = task.logits

    def counted(*arguments: Any) -> torch.Tensor:
        computed.append(None)
        return logits(*arguments)

    task.logits = counted  # type: ignore[method-assign]
    found: list[Any] = [task.evaluate(model, split) for split in ("valid", "test")]
    found += [task.signs] if isinstance(task, ShowsLearning) else []
    found += [list(task.predictions.rows)] if isinstance(task, KeepsPredictions) and task.predictions else []
    return {"found": found, "computed": len(computed)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    of_this_process = Share(state.process_index, state.num_processes)
    every = {name: found_by(*loaded(name), of_this_process)["found"] for name in TASKS}
    Path(sys.argv[1], str(state.process_index)).write_text(json.dumps(every))
