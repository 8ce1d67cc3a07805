"""A run that starts from the weights of another: which ones, and when it is refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rdrop.experiments.launch import cli
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.run_folder import ResultsError, RunFolder, find_runs
from rdrop.experiments.tasks.digits.recipes import DIGITS
from rdrop.experiments.tasks.language_modeling.recipes import FROM_SCRATCH, WIKITEXT_103_ADAPTIVE
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.tasks.translation.recipes import TRANSLATION
from rdrop.experiments.training import checkpoints, trainer
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.start import start_from

BOTH = TRANSLATION.tiny().replace(updates=4, warmup_updates=1, evaluate_every=2, **{"data.bidirectional": True})


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of both directions for each of two seeds."""
    folder = tmp_path_factory.mktemp("both")
    for seed in (0, 1):
        trainer.train(BOTH.replace(seed=seed), folder / str(seed))
    return folder


def second(start: Path, **changes: object) -> Recipe:
    return BOTH.replace(init_from=str(start), **({"data.bidirectional": False} | changes))


def weights_of(run: Path) -> list[torch.Tensor]:
    result = RunFolder(run).result()
    assert result is not None
    model = load_task(BOTH).build_model()
    checkpoints.restore_final(run / "checkpoints", result["best_step"], result["averaged_steps"], model)
    return list(model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_of_several_runs_the_one_with_this_seed_is_the_start(started: Path, seed: int) -> None:
    recipe = second(started, seed=seed)
    task = load_task(recipe)
    model = task.build_model()
    note = start_from(recipe, task, model)
    assert all(map(torch.equal, model.parameters(), weights_of(started / str(seed))))
    assert note["started from"].startswith(f"{BOTH.name}, seed {seed}, update ")


def test_one_run_named_itself_starts_any_seed_and_the_result_says_so(started: Path, tmp_path: Path) -> None:
    recipe = second(started / "1", seed=7, learning_rate=1e-12, updates=1, warmup_updates=1)
    result = trainer.train(recipe, tmp_path)
    assert f"{BOTH.name}, seed 1" in result["notes"]["started from"]
    assert all(
        torch.allclose(a, b, atol=1e-9) for a, b in zip(weights_of(tmp_path), weights_of(started / "1"), strict=True)
    )


@pytest.mark.parametrize("of", [WIKITEXT_103_ADAPTIVE, FROM_SCRATCH], ids=["words", "pieces"])
def test_a_language_model_starts_from_one_with_its_vocabulary_alone(of: Recipe, tmp_path: Path) -> None:
    recipe = of.tiny().replace(updates=2, warmup_updates=1, evaluate_every=2)
    trainer.train(recipe, tmp_path / "start")
    onward = recipe.replace(init_from=str(tmp_path / "start"), learning_rate=1e-9, updates=1)
    notes = trainer.train(onward, tmp_path / "onward")["notes"]
    assert notes["started from"].startswith(f"{recipe.name}, seed 0, update 2")
    other = {"data.train_lines": 20} if of.data.tokens == "words" else {"data.vocabulary": 280}
    with pytest.raises(ResultsError, match="has another vocabulary or other classes"):
        trainer.train(onward.replace(**other), tmp_path / "other")


def test_a_resumed_run_needs_its_start_no_more_and_ends_in_the_same_bits(started: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(started / "0", start)
    recipe = second(start)
    whole = trainer.train(recipe, tmp_path / "whole")

    def stop(progress: trainer.Progress) -> None:
        if progress.step == 3:
            raise Preempted(15, 3, tmp_path)

    with pytest.raises(Preempted):
        trainer.train(recipe, tmp_path / "run", on_progress=stop)
    shutil.rmtree(start)
    result = trainer.train(recipe, tmp_path / "run")
    assert result["notes"] == whole["notes"]
    assert all(map(torch.equal, weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda runs: second(runs, seed=5), "holds no finished run with seed 5; train it first"),
        (lambda runs: second(runs / "nowhere"), r"init_from \(=.*nowhere\) is no folder; name that of a finished run"),
        (lambda runs: second(runs, **{"data.vocabulary": 50}), "has another vocabulary or other classes"),
        (lambda runs: second(runs, **{"model.hidden_size": 16}), "does not fit the model of this recipe"),
        (lambda runs: DIGITS.tiny().replace(init_from=str(runs)), "init_from .* must be null: digits does not say"),
    ],
)
def test_a_start_that_means_something_else_is_refused(recipe, message: str, started: Path, tmp_path: Path) -> None:
    with pytest.raises((ResultsError, checkpoints.CheckpointError), match=message):
        trainer.train(recipe(started), tmp_path)
    assert find_runs(tmp_path) == []


def test_a_run_is_not_taken_for_one_from_other_weights_than_its_own(started: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(started / "0", start)
    recipe, finished, begun = second(start), tmp_path / "finished", tmp_path / "begun"
    run = Run("the second", recipe, finished)
    trainer.train(recipe, finished)

    def stop(progress: trainer.Progress) -> None:
        if progress.step == 3:
            raise Preempted(15, 3, tmp_path)

    with pytest.raises(Preempted):
        trainer.train(recipe, begun, on_progress=stop)
    shutil.rmtree(start)
    trainer.train(BOTH.replace(learning_rate=0.02), start)

    for ask in (lambda: trainer.train(recipe, finished), run.result, lambda: trainer.train(recipe, begun)):
        with pytest.raises(ResultsError, match=r"this run started from .*, seed 0, update .* holds .* now") as refused:
            ask()
        remedy = str(refused.value).rpartition(": ")[2]
        assert remedy in (f"rm -r {finished}", f"rm -r {begun}")
    shutil.rmtree(finished)
    trainer.train(recipe, finished)
    assert run.result() is not None


def test_a_run_is_not_taken_for_one_from_weights_that_were_trained_again_on_other_data(
    started: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(started / "0", start)
    recipe = second(start)
    result = trainer.train(recipe, tmp_path / "second")
    assert trainer.train(recipe, tmp_path / "second") == result
    for weights in start.glob("checkpoints/*/model.safetensors"):  # the same update of the same recipe
        weights.write_bytes((started / "1").joinpath(weights.relative_to(start)).read_bytes())
    with pytest.raises(ResultsError, match=r"model\.safetensors: changed after a run had been trained with it"):
        trainer.train(recipe, tmp_path / "second")
    shutil.rmtree(start)
    assert trainer.train(recipe, tmp_path / "second") == result


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "Start from a run with the same seed$"),
        ({"data.split_seed": 1}, r"Start from a run with the same data\.split_seed$"),
        ({"data.folds": None}, r"Start from a run with the same data\.folds$"),
    ],
)
def test_a_start_that_has_learned_what_this_run_is_tested_on_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings_of_all = ["tiny=true", "data.tiny=false", "alpha=0", "updates=2", "evaluate_every=2", "data.folds=3"]
    recipe = override(RECIPES["text-classification"], settings_of_all)
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"word{row} {['bad', 'good'][row % 2]},{row % 2}\n" for row in range(60)))
    recipe = recipe.replace(**{"data.train": str(file)})
    trainer.train(recipe, tmp_path / "first")
    other = recipe.replace(init_from=str(tmp_path / "first"), **settings)
    with pytest.raises(ResultsError, match=f"has learned from examples that this run is scored on. {words}"):
        trainer.train(other, tmp_path / "second")
    assert trainer.train(recipe.replace(init_from=str(tmp_path / "first"), learning_rate=1e-5), tmp_path / "third")


@pytest.mark.parametrize(
    "damage",
    [
        *({key: None} for key in ("best_step", "averaged_steps", "digest", "recipe")),
        *({"recipe": "x"}, {"best_step": "x"}, {"averaged_steps": 5}),
    ],
)
def test_a_damaged_start_is_named_and_a_run_that_started_from_it_stands(
    damage: dict[str, object], started: Path, tmp_path: Path
) -> None:
    start, file = tmp_path / "start", tmp_path / "start/result.json"
    shutil.copytree(started / "0", start)
    recipe = second(start)
    result = trainer.train(recipe, tmp_path / "finished")
    content = json.loads(file.read_text()) | damage
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(ResultsError, match=r"holds no finished run with seed 0.*result.json: .*rm "):
        trainer.train(recipe, tmp_path / "new")
    assert trainer.train(recipe, tmp_path / "finished") == result


def test_bi_simcut_in_two_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick: Sequence[str] = ("tiny=true", "updates=4", "warmup_updates=1", "evaluate_every=2")
    assert cli.run(["train", "iwslt14-de-en-both", *quick]) == 0
    assert RECIPES["iwslt14-de-en-bi-simcut"].tiny().init_from is None  # as docs/tasks/translation.md says
    folder = "runs/iwslt14-de-en-both-tiny"
    assert cli.run(["train", "iwslt14-de-en-bi-simcut", *quick, f"init_from={folder}"]) == 0
    notes = [run.result["notes"] for run in find_runs("runs/iwslt14-de-en-bi-simcut-tiny") if run.result]
    assert "iwslt14-de-en-both-tiny, seed 0" in notes[0]["started from"]
