"""What is made ahead is what would have been made: values, errors, and nothing beyond the end."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.experiments.tiny_runs import RECIPE, TinyTask, final_state

from rdrop.experiments.training import prefetch, trainer
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.prefetch import Prefetched

SECONDS = 600  # far more than a thread needs; only a failure waits so long


def test_the_next_values_are_made_while_the_present_one_is_used() -> None:
    end = prefetch.AHEAD + 2
    made = {step: threading.Event() for step in range(end + prefetch.AHEAD)}

    def make(step: int) -> int:
        made[step].set()
        return step * step

    with Prefetched(make, end=end) as values:
        for step in range(end):
            assert values.at(step) == step * step
            assert all(made[later].wait(SECONDS) for later in range(step + 1, min(step + prefetch.AHEAD + 1, end)))
            assert not any(made[later].is_set() for later in range(step + prefetch.AHEAD + 1, len(made)))
    assert not any(made[step].is_set() for step in range(end, len(made)))


def test_a_value_that_takes_long_keeps_nobody_waiting_where_others_were_quick() -> None:
    """The values before a slow one are there at once, and the slow one had their time too."""
    slow = threading.Event()

    def make(step: int) -> int:
        assert step != prefetch.AHEAD or slow.wait(SECONDS)
        return step

    with Prefetched(make, end=99) as values:
        assert [values.at(step) for step in range(prefetch.AHEAD)] == [*range(prefetch.AHEAD)]
        slow.set()
        assert values.at(prefetch.AHEAD) == prefetch.AHEAD


def test_values_are_those_of_the_step_asked_for_whatever_was_made_ahead() -> None:
    calls: list[int] = []
    with Prefetched(lambda step: calls.append(step) or step, end=10) as values:
        assert [values.at(step) for step in (0, 1, 5, 6, 2)] == [0, 1, 5, 6, 2]
    assert calls[0] == 0
    assert set(calls) <= set(range(10))


def test_an_error_comes_when_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("line 7")
        return step

    with Prefetched(make, end=9) as values:
        assert values.at(0) == 0
        with pytest.raises(ValueError, match="line 7"):
            values.at(1)
    with Prefetched(make, end=9) as values:  # an error that nobody asks for is nobody's
        assert values.at(0) == 0


def test_no_two_values_are_made_at_once() -> None:
    at_work = threading.Lock()

    def make(step: int) -> int:
        assert at_work.acquire(blocking=False), step
        time.sleep(0.01)
        at_work.release()
        return step

    with Prefetched(make, end=20) as values:
        assert [values.at(step) for step in (0, 5, 10, 2, 3)] == [0, 5, 10, 2, 3]


def test_outside_the_context_there_is_no_thread() -> None:
    values = Prefetched(lambda step: threading.current_thread(), end=9)
    assert [values.at(step) for step in range(3)] == [threading.current_thread()] * 3
    with values:
        assert threading.current_thread() not in [values.at(step) for step in (3, 4)]
    assert values.at(5) is threading.current_thread()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rdrop-batches")]


def test_a_read_that_stalls_keeps_nobody_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE_SECONDS", 0.01)
    stalled = threading.Event()

    def leave(error: type[BaseException]) -> None:
        raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), Prefetched(lambda step: stalled.wait(SECONDS), end=9) as values:
            values.at(0, while_waiting=lambda error=error: leave(error))  # type: ignore[misc]
    assert not stalled.is_set()
    stalled.set()


@pytest.mark.parametrize("stalled_update", [0, 3])
def test_a_run_whose_read_stalls_is_saved_on_the_first_signal_and_goes_on_to_the_same_bits(
    stalled_update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    trainer.train(RECIPE, tmp_path / "whole")
    stalled, batches, train_batch = threading.Event(), [], TinyTask.train_batch

    def stall(task: TinyTask, *arguments: Any) -> Any:
        batches.append(None)
        if len(batches) == 1 + 2 * stalled_update + 1:  # after one for the fingerprint
            os.kill(os.getpid(), signal.SIGTERM)
            stalled.wait(SECONDS)
        return train_batch(task, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TinyTask, "train_batch", stall)
        with pytest.raises(Preempted, match=f"at step [0-{stalled_update}], saved"):  # it is ahead
            trainer.train(RECIPE, tmp_path / "stopped")
        assert not stalled.is_set()
        stalled.set()
    trainer.train(RECIPE, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_no_bit_of_a_run_depends_on_how_many_batches_are_made_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    for ahead in (0, 1, 99):
        monkeypatch.setattr(prefetch, "AHEAD", ahead)
        trainer.train(RECIPE, tmp_path / str(ahead))
    assert final_state(tmp_path / "0") == final_state(tmp_path / "1") == final_state(tmp_path / "99")


def test_training_makes_the_next_batch_during_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, waiting = threading.Semaphore(0), []
    train_batch, logits = TinyTask.train_batch, TinyTask.logits

    def counted(task: TinyTask, *arguments: Any) -> Any:
        batches.release()
        return train_batch(task, *arguments)

    # One for the fingerprint, then two microbatches an update.
    def needs_two_updates_batches(task: TinyTask, *arguments: Any) -> Any:
        if not waiting:
            waiting.append([batches.acquire(timeout=SECONDS) for _ in range(1 + 2 + 2)])
        return logits(task, *arguments)

    monkeypatch.setattr(trainer, "load_task", TinyTask)
    monkeypatch.setattr(TinyTask, "train_batch", counted)
    monkeypatch.setattr(TinyTask, "logits", needs_two_updates_batches)
    trainer.train(RECIPE, tmp_path)
    assert waiting == [[True] * 5]
