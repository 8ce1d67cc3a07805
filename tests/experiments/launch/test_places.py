"""How many runs train at a time, and what each is given of the machine."""

import io
from typing import Any

import pytest
from rich.console import Console

from rdrop.experiments.launch import cli, places


def found_and_said(
    monkeypatch: pytest.MonkeyPatch, jobs_asked: int | None, cores: int, **environment: str
) -> tuple[Any, str]:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places, "_cores", lambda: cores)
    console = Console(record=True, width=200, file=io.StringIO())
    return places.find_places(jobs_asked, console), console.export_text()


def test_each_run_has_a_gpu_of_its_own_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"CUDA_VISIBLE_DEVICES": "2,GPU-7"}
    own = [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "GPU-7"}]
    assert found_and_said(monkeypatch, None, 8, **gpus)[0] == own
    assert found_and_said(monkeypatch, 3, 8, **gpus)[0] == [*own, own[0]]


def test_without_a_gpu_auto_is_as_many_as_the_cores_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    assert found_and_said(monkeypatch, None, 8, OMP_NUM_THREADS="1", **cpu)[0] == [{}] * 8
    found, said = found_and_said(monkeypatch, None, 8, **cpu)
    assert found == [{"OMP_NUM_THREADS": "2"}] * 4
    assert said == "4 runs at a time, OMP_NUM_THREADS=2 each\n"
    assert found_and_said(monkeypatch, None, 1, **cpu) == ([{}], "")


def test_runs_that_would_share_cores_are_told_how_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    found, said = found_and_said(monkeypatch, 2, 4, **cpu)
    assert found == [{}, {}]  # the threads that each would have alone
    assert "2 runs at a time, with 4 threads each, share 4 cores" in said
    assert "OMP_NUM_THREADS=2 before the command" in said
    assert found_and_said(monkeypatch, 2, 4, OMP_NUM_THREADS="2", **cpu)[1] == ""


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "1000", "٣"])
def test_what_is_no_number_of_jobs_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", "digits-vit", f"--jobs={text}"]) == 2
    assert "neither a number of runs, such as 2, nor auto" in capsys.readouterr().err
