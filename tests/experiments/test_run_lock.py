"""A run folder belongs to one process; one that is gone is followed by one other, never by two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rdrop.experiments.run_folder import RunFolder, RunTakenOverWarning, StorageError, find_runs
from rdrop.experiments.run_folder import lock as run_lock
from rdrop.experiments.run_folder.lock import (
    FILE,
    SILENCE_SECONDS,
    Holder,
    LockLostError,
    RunLock,
    RunLockedError,
    holder_of,
)

RACERS, ROUNDS = 6, 40


def held_by(folder: Path, holder: Holder, age_seconds: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(asdict(holder)))
    renewed = time.time() - age_seconds
    os.utime(folder / FILE, (renewed, renewed))


@pytest.fixture
def holder(tmp_path: Path) -> Holder:
    """This process, as a lock names it."""
    lock, _ = RunLock.acquire(tmp_path / "other")
    found = holder_of(tmp_path / "other")
    lock.release()
    assert found is not None
    return found


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_run_that_is_held_is_refused_and_its_process_named(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).held(),
        pytest.raises(
            RunLockedError, match=rf"being trained by process {os.getpid()} on .*stop it: kill {os.getpid()}"
        ),
        RunFolder(tmp_path).held(),
    ):
        pass
    assert os.listdir(tmp_path) == []
    with RunFolder(tmp_path).held():
        assert os.listdir(tmp_path) == [FILE]


def test_the_report_says_who_trains_an_unfinished_run(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").write_recipe({"name": "digits"})
    with RunFolder(tmp_path / "a").held():
        assert f"It is being trained by process {os.getpid()} on" in str(find_runs(tmp_path)[0].problem)
    assert "Run it again to resume it" in str(find_runs(tmp_path)[0].problem)


def test_the_run_of_a_process_that_is_gone_is_taken_over_with_a_word(tmp_path: Path, holder: Holder) -> None:
    gone = dead_process()
    held_by(tmp_path / "run", replace(holder, pid=gone))
    assert holder_of(tmp_path / "run") is None
    found = []
    with (
        pytest.warns(RunTakenOverWarning, match=f"taken over from process {gone} on .*, which is gone"),
        RunFolder(tmp_path / "run").held(),
    ):
        found.append(holder_of(tmp_path / "run"))
    assert [now.pid for now in found if now is not None] == [os.getpid()]


def test_another_process_with_the_id_of_the_dead_one_is_not_taken_for_it(tmp_path: Path, holder: Holder) -> None:
    held_by(tmp_path / "run", replace(holder, started=f"{holder.started}0"))
    with pytest.warns(RunTakenOverWarning), RunFolder(tmp_path / "run").held():
        pass


def test_a_process_on_another_machine_is_gone_when_it_has_been_silent_for_long(tmp_path: Path, holder: Holder) -> None:
    elsewhere = replace(holder, host="node7", machine="another boot", pid=dead_process())
    held_by(tmp_path / "run", elsewhere, age_seconds=SILENCE_SECONDS / 2)
    with (
        pytest.raises(RunLockedError, match=r"on node7, since .*the run is free 180 s after its last heartbeat"),
        RunFolder(tmp_path / "run").held(),
    ):
        pass
    held_by(tmp_path / "run", elsewhere, age_seconds=SILENCE_SECONDS + 5)
    with pytest.warns(RunTakenOverWarning, match="node7"), RunFolder(tmp_path / "run").held():
        pass


def test_a_lock_from_the_future_says_which_file_to_delete(tmp_path: Path, holder: Holder) -> None:
    elsewhere = replace(holder, host="node7", machine="another boot")
    held_by(tmp_path / "my run", elsewhere, age_seconds=-1e6)
    with pytest.raises(RunLockedError, match="dated in the future") as refused, RunFolder(tmp_path / "my run").held():
        pass
    subprocess.run(str(refused.value).rpartition("If that process is gone: ")[2], shell=True, check=True)
    with RunFolder(tmp_path / "my run").held():
        pass


def test_a_process_that_is_not_shown_is_judged_by_its_heartbeat(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, where processes are hidden and there is no ps."""

    def refuse(*what: object, **more: object) -> None:
        raise PermissionError

    monkeypatch.setattr(run_lock.os, "kill", refuse)
    monkeypatch.setattr(run_lock.subprocess, "run", refuse)
    hidden = replace(holder, pid=2**31 - 1, started="then")  # of which /proc has nothing
    held_by(tmp_path, hidden)
    assert holder_of(tmp_path) == hidden
    held_by(tmp_path, hidden, age_seconds=SILENCE_SECONDS + 5)
    assert holder_of(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b'{"pid": 1}', b"\xff", b"[" * 5000, b'"' + b"x" * 9000),
        b'{"token": "a/b", "host": "a", "machine": "b", "pid": 7, "started": "c", "since": "d"}',
    ],
)
def test_a_damaged_lock_is_respected_until_it_has_been_silent_for_long(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunLockedError, match="an unknown host"), RunFolder(tmp_path).held():
        pass
    os.utime(tmp_path / FILE, (1, 1))
    with pytest.warns(RunTakenOverWarning), RunFolder(tmp_path).held():
        pass
    assert os.listdir(tmp_path) == []


def test_a_heartbeat_renews_the_lock_and_notices_who_took_it(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with RunFolder(tmp_path / "run").held() as lock:
        os.utime(tmp_path / "run" / FILE, (1, 1))
        wait_until(lambda: (tmp_path / "run" / FILE).stat().st_mtime > 1)
        lock.require_held()
        held_by(tmp_path / "run", replace(holder, token="another", host="node7"))
        wait_until(lambda: lock._lost)
        with pytest.raises(LockLostError, match=r"has been taken over by process .* on node7"):
            lock.require_held()
    assert (tmp_path / "run" / FILE).exists()  # the other's


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*lock.json"), RunFolder(tmp_path / "file" / "run").held():
        pass


def test_where_there_are_no_hard_links_one_of_two_still_has_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(run_lock.os, "link", no_links)
    with RunFolder(tmp_path).held(), pytest.raises(RunLockedError), RunFolder(tmp_path).held():
        pass
    assert os.listdir(tmp_path) == []


RACER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])  # not the package, which would import torch
import lock as run_lock
folder, number, rounds = run_lock.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for turn in range(rounds):
    run = folder / f"run-{turn}"
    while not (run / "go").exists():
        time.sleep(0.001)
    try:
        lock, predecessor = run_lock.RunLock.acquire(run)
    except run_lock.RunLockedError:
        outcome = "refused"
    else:
        outcome = "held" if predecessor is None else "took over"
    (run / f"outcome-{number}.tmp").write_text(outcome)
    os.replace(run / f"outcome-{number}.tmp", run / f"outcome-{number}")
time.sleep(3600)  # it is killed: a process that is gone would be taken over from
"""


def test_of_many_that_find_one_stale_lock_one_takes_it(tmp_path: Path, holder: Holder) -> None:
    stale = replace(holder, pid=dead_process())
    for turn in range(ROUNDS):
        held_by(tmp_path / f"run-{turn}", replace(stale, token=f"stale{turn}"))
    script = [sys.executable, "-c", RACER, str(Path(run_lock.__file__).parent), str(tmp_path)]
    racers = [subprocess.Popen([*script, str(number), str(ROUNDS)]) for number in range(RACERS)]
    try:
        for turn in range(ROUNDS):
            run = tmp_path / f"run-{turn}"
            (run / "go").touch()
            wait_until(lambda run=run: len(list(run.glob("outcome-?"))) == RACERS)  # type: ignore[misc]
            outcomes = [path.read_text() for path in run.glob("outcome-?")]
            assert sorted(outcomes) == ["refused"] * (RACERS - 1) + ["took over"]
            assert sorted(path.name for path in run.glob("lock*")) == [FILE]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # pytest's timeout ends it
        time.sleep(0.002)
