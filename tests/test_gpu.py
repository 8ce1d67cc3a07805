"""What `make gpu` runs, rehearsed in small on a CPU by Triton's interpreter; its failures and its time."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks import gpu
from benchmarks.gpu import Part, do, parts, run

from rdrop.bench import peers
from rdrop.bench.records import read
from rdrop.bench.table import LAYOUTS
from rdrop.experiments.recipe import override
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.run_folder import RunFolder
from rdrop.kernels import triton


def test_the_rehearsal_leaves_every_file_and_all_of_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{root}")
    summary = run(parts(tmp_path, rehearse=True), tmp_path, rehearse=True)
    logs = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.log")}
    assert {name: part["state"] for name, part in summary["parts"].items()} == dict.fromkeys(
        ("checks", "logits", "hidden", "shapes", "steps", "multi30k-baseline", "multi30k-r-drop"), "done"
    ), logs
    rows = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert len(rows) == 12 + 2
    assert all(row["holds"] for row in rows)
    assert [row["check"] for row in rows[12:]] == [
        f"without a wait for the device, {way}" for way in ("eager", "autocast")
    ]
    assert {record["benchmark"] for record in read(tmp_path / "gpu.jsonl")} == {"rows", "linear", "steps"}
    *measured, best = [json.loads(line) for line in (tmp_path / "shapes.jsonl").read_text().splitlines()]
    assert best["best"] in [{key: row[key] for key in ("max_block", "classes_per_warp")} for row in measured]
    trained = [json.loads(line) for line in (tmp_path / "multi30k.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["step"]) for row in trained] == [("baseline", 2), ("r-drop", 2)]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_part_that_fails_or_takes_too_long_is_recorded_and_the_next_ones_run(tmp_path: Path):
    listed = [
        Part("fails", ["-c", "raise SystemExit(3)"], 60),
        Part("hangs", ["-c", "import time; time.sleep(600)"], 1),
        Part("works", ["-c", "print('done')"], 60),
    ]
    summary = run(listed, tmp_path)
    states = {name: part["state"] for name, part in summary["parts"].items()}
    assert states == {"fails": "failed with exit status 3", "hangs": "out of time", "works": "done"}
    assert (tmp_path / "works.log").read_text() == "done\n"


def test_a_rehearsal_takes_the_time_it_takes(tmp_path: Path):
    summary = run([Part("late", ["-c", "print('done')"], 0)], tmp_path, budget=0, rehearse=True)
    assert summary["parts"]["late"]["state"] == "done"


def test_what_the_budget_leaves_no_time_for_is_said_and_not_begun(tmp_path: Path):
    summary = run([Part("late", ["-c", "print('done')"], 60)], tmp_path, budget=0)
    assert summary["parts"] == {"late": {"state": "out of time", "seconds": 0.0}}
    assert not (tmp_path / "late.log").exists()


def test_a_check_that_does_not_hold_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu.DOING, "checks", lambda *, rehearse: iter([{"holds": True}, {"holds": rehearse}]))
    assert do("checks", tmp_path, rehearse=True)
    assert not do("checks", tmp_path, rehearse=False)
    assert len((tmp_path / "checks.jsonl").read_text().splitlines()) == 2


def test_the_parts_of_a_card_fit_into_the_budget_but_for_the_training_at_the_end(tmp_path: Path):
    listed = parts(tmp_path, rehearse=False, data=tmp_path)
    measured = [part for part in listed if not part.name.startswith("multi30k")]
    assert listed[: len(measured)] == measured
    assert sum(part.seconds for part in measured) <= gpu.BUDGET
    assert listed[0].name == "checks"


def test_the_arms_of_the_training_share_what_is_left_and_the_recipe_takes_their_settings(tmp_path: Path):
    *_, baseline, method = parts(tmp_path, rehearse=False, data=tmp_path)
    assert (baseline.shares, method.shares) == (2, 1)
    for name, settings in gpu.ARMS.items():
        recipe = override(find_recipe("multi30k-en-de"), [*settings, f"data.folder={tmp_path}"])
        assert recipe.method.is_plain == (name == "baseline")
        assert recipe.updates == find_recipe("multi30k-en-de").updates
    summary = run([Part("half", ["-c", "import time; time.sleep(600)"], 600, shares=600)], tmp_path, budget=610)
    assert summary["parts"]["half"]["state"] == "out of time"


def test_a_training_that_was_cut_off_has_left_its_last_score_and_its_speed(tmp_path: Path):
    run_folder = RunFolder(tmp_path / "multi30k/r-drop/multi30k-en-de/0123456789ab")
    run_folder.write_recipe(find_recipe("multi30k-en-de").saved())
    for step in (500, 1000):
        run_folder.append_metrics(
            {"kind": "valid", "step": step, "epoch": 1.0, "seconds": step / 50, "bleu": step / 100}
        )
    gpu.write_trainings(tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "multi30k.jsonl").read_text().splitlines()]
    assert (row["arm"], row["step"], row["bleu"]) == ("r-drop", 1000, 10.0)
    assert (row["updates_per_second"], row["most_tokens_per_second"]) == (50.0, 50 * 4096)


def test_peers_that_are_not_here_are_named_with_the_reason_and_those_that_are_become_forms(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(peers.FROM_LOGITS, "quack", peers.Peer("torch.nn.functional:cross_entropy", smooths=True))
    assert "liger_kernel.transformers.functional cannot be imported" in peers.missing(peers.FROM_LOGITS)["liger"]
    assert list(peers.from_logits(0.1)) == ["quack"]
    assert set(peers.FROM_LOGITS) <= set(LAYOUTS["rows"].words)
    assert set(peers.FROM_HIDDEN) <= set(LAYOUTS["linear"].words)


def test_a_shape_that_was_found_for_a_card_is_used_on_it_and_on_no_other(monkeypatch):
    torch = pytest.importorskip("torch")
    shape = triton.Shape(4096, 512)
    monkeypatch.setitem(triton.SHAPES, "A card", shape)
    monkeypatch.setattr(triton, "_card", lambda device: {0: "A card", 1: "Another"}[device.index])
    assert triton.shape_on(torch.device("cuda", 0)) == shape
    assert triton.shape_on(torch.device("cuda", 1)) == triton.shape_on(torch.device("cpu")) == triton.DEFAULT_SHAPE
