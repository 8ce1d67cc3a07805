"""The outcomes of the long tests: what has passed is left out, until something changes that it depends on."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import outcomes
from tests.outcomes import ROOT, Outcomes, in_parts, read

TESTS = ("tests/test_alpha.py::test_one[1-a::b]", "tests/test_alpha.py::test_two", "tests/test_check.py::test_three")


def report(test: str, outcome: str, when: str = "call") -> Any:
    counted = [("kills", 3)]
    return SimpleNamespace(
        nodeid=test, outcome=outcome, passed=outcome == "passed", when=when, duration=1.25, user_properties=counted
    )


def left(file: Path) -> list[str]:
    """The tests that would run."""
    left_out: list[Any] = []
    items: list[Any] = [SimpleNamespace(nodeid=test, path=ROOT / test.partition("::")[0]) for test in TESTS]
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(hook=hook)
    Outcomes(file, config).pytest_collection_modifyitems(config, items)
    assert len(items) + len(left_out) == len(TESTS)
    return [item.nodeid for item in items]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    config: Any = SimpleNamespace()
    kept = Outcomes(tmp_path / "new/long.jsonl", config)
    for when in ("setup", "call", "teardown"):
        kept.pytest_runtest_logreport(report(TESTS[0], "passed", when))
    kept.pytest_runtest_logreport(report(TESTS[1], "failed"))
    kept.pytest_runtest_logreport(report(TESTS[2], "skipped", "setup"))
    return kept.file


def test_what_has_passed_is_left_out_and_what_failed_or_was_skipped_is_not(file: Path) -> None:
    assert [line["outcome"] for line in read(file)] == ["passed", "failed", "skipped"]
    assert left(file) == [*TESTS[1:]]
    assert left(file.with_name("another")) == [*TESTS]


def test_what_has_passed_runs_again_when_its_sources_have_changed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "sources", lambda path: "others")
    assert left(file) == [*TESTS]


def test_make_test_long_goes_on_from_the_file_that_it_has_begun(file: Path) -> None:
    planned = subprocess.run(["make", "-n", "test-long"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (words,) = (shlex.split(line) for line in planned.splitlines() if "pytest" in line)
    arguments = [word.replace("build/long.jsonl", str(file)) for word in words[words.index("pytest") + 1 :]]
    assert any(str(file) in argument for argument in arguments)
    # An argument that is a file that exists is one of tests to run for pytest, whatever stands before it.
    command = [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q", "--ignore-glob=*/test_*.py"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, found.stderr


def test_sources_are_the_package_what_tests_share_and_the_test_itself() -> None:
    digests = {outcomes.sources(ROOT / "tests" / name) for name in ("test_alpha.py", "test_check.py", "conftest.py")}
    assert len(digests) == 3
    shared = {path.name for path in outcomes._shared()}
    assert {"loss.py", "rows.cpp", "kills.py", "accuracy.py"} <= shared
    assert not any(name.startswith("test_") for name in shared)


def test_an_outcome_says_what_was_counted_where_and_when(file: Path) -> None:
    first = read(file)[0]
    assert first["counted"] == {"kills": 3}
    assert all(first[key] for key in ("seconds", "device", "versions", "commit", "date", "sources"))


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(workerinput={})
    worker = Outcomes(tmp_path / "long.jsonl", config)
    worker.pytest_runtest_logreport(report(TESTS[0], "passed"))
    assert read(worker.file) == []


def test_the_parts_of_a_long_test_have_all_its_cases() -> None:
    parts = [part.values for part in in_parts(500)]
    assert sum(count for count, _ in parts) == 500
    assert len({seed for _, seed in parts}) == len(parts)
