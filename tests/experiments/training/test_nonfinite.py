"""NaN and infinity wherever they may come from: noticed in their update, never applied, never saved, and survived."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tests.experiments.tiny_runs import RECIPE, TinyRecipe, TinyTask, final_state
from tests.outcomes import in_parts
from torch import Tensor, nn

from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import trainer
from rdrop.experiments.training.checkpoints import CheckpointWarning, load_newest_good
from rdrop.experiments.training.trainer import DivergedError, RefusedError, TrainingError, train

SHORT = RECIPE.replace(updates=4, checkpoint_every=1, keep_checkpoints=1)
WHERE = ("a logit", "a row of logits", "all logits", "a gradient", "all gradients", "a weight", "a score")


class Poison(NamedTuple):
    where: str
    value: float
    update: int  # counted from 1
    alpha: float
    precision: str
    place: int  # which of the elements

    @property
    def recipe(self) -> TinyRecipe:
        return SHORT.replace(alpha=self.alpha, precision=self.precision)


POISONS = st.builds(
    Poison,
    st.sampled_from(WHERE),
    st.sampled_from([math.nan, math.inf]),
    st.integers(1, SHORT.updates),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from(["fp32", "bf16"]),
    st.integers(0, 1_000),
)


@pytest.mark.parametrize(("examples", "part"), [(4, 0), *in_parts(500)])
def test_what_is_not_finite_is_told_in_its_update_and_reaches_no_weight(
    examples: int, part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    whole: dict[tuple[float, str], Any] = {}
    tried = []

    @seed(part)
    @settings(max_examples=examples)
    @given(POISONS)
    def check(poison: Poison) -> None:
        kind = poison.alpha, poison.precision
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with pytest.MonkeyPatch.context() as clean:
            clean.setattr(trainer, "load_task", TinyTask)
            if kind not in whole:
                train(poison.recipe, tmp_path / "whole")
                whole[kind] = final_state(tmp_path / "whole")
                shutil.rmtree(tmp_path / "whole")
            with pytest.MonkeyPatch.context() as spoiled:
                spoil(spoiled, poison)
                step = poison.update + poison.update % 2 if poison.where == "a score" else poison.update
                with pytest.raises(TrainingError, match=rf"step {step}\b"):
                    train(poison.recipe, tmp_path / "run")
            assert_nothing_of_it_is_kept(tmp_path / "run", poison)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # of a first update there is none to go on from
                train(poison.recipe, tmp_path / "run")  # the cause removed
            assert final_state(tmp_path / "run") == whole[kind]
        tried.append(poison)

    check()
    record_property("injections", len(tried))


def test_a_process_that_diverges_alone_writes_why_into_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    monkeypatch.setenv("RANK", "1")  # which leaves all other files to the first
    poison = Poison("a logit", math.nan, update=2, alpha=2.0, precision="fp32", place=0)
    spoil(monkeypatch, poison)
    with pytest.raises(DivergedError, match="step 2"):
        train(poison.recipe, tmp_path)
    why = RunFolder(tmp_path).failure()
    assert why is not None
    assert "step 2" in why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"Lower learning_rate \(=0\.05\) or clip_norm \(=1\), and look at the data\.$"),
        ({"clip_norm": None}, r"Lower learning_rate \(=0\.05\) or set clip_norm, and look"),
        ({"precision": "bf16"}, r"or clip_norm \(=1\), set precision \(=bf16\) to fp32, and look"),
    ],
)
def test_what_is_advised_after_a_divergence_is_not_so_already(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    poison = Poison("all gradients", math.nan, update=1, alpha=0.0, precision="fp32", place=0)
    spoil(monkeypatch, poison)
    with pytest.raises(DivergedError, match=words):
        train(poison.recipe.replace(**changes), tmp_path)


def test_a_score_that_is_not_finite_beside_a_finite_loss_points_at_the_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = TinyTask.evaluate
    monkeypatch.setattr(TinyTask, "evaluate", lambda *given: evaluate(*given) | {"accuracy": math.nan})
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    with pytest.raises(DivergedError, match=r"valid split: accuracy is nan\. Look at how TinyTask computes it\.$"):
        train(SHORT, tmp_path)


def test_an_infinite_score_of_a_finite_loss_is_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = TinyTask.evaluate
    monkeypatch.setattr(TinyTask, "evaluate", lambda *given: evaluate(*given) | {"perplexity": math.inf})
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    with pytest.raises(DivergedError, match=r"valid split: perplexity is inf\..*Lower learning_rate"):
        train(SHORT, tmp_path)


@pytest.mark.parametrize(
    ("scores", "missing", "found"),
    [({"accuracy": 0.5}, "loss", "accuracy"), ({"loss": 1.0}, "accuracy", "loss"), ({}, "loss", "nothing")],
)
def test_a_score_that_is_missing_is_refused(
    scores: dict[str, float], missing: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyTask, "evaluate", lambda *given: scores)
    monkeypatch.setattr(TinyTask, "metric", "accuracy")
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    with pytest.raises(RefusedError, match=rf"TinyTask\.evaluate returns no '{missing}', but {found}; add it"):
        train(SHORT, tmp_path)


def assert_nothing_of_it_is_kept(folder: Path, poison: Poison) -> None:
    newest = load_newest_good(folder / "checkpoints")
    if newest is None:
        assert poison.update == 1
    else:
        model = TinyTask(poison.recipe).build_model()
        newest.restore_model(model)
        assert all(weight.isfinite().all() for weight in model.parameters())
        assert newest.state["step"] == poison.update - 1 or poison.where == "a score"
    if poison.where not in ("a weight", "a score"):
        last = RunFolder(folder).metrics()[-1]
        assert (last["kind"], last["step"]) == ("train", poison.update)
        assert not math.isfinite(last["loss"] + last["gradient_norm"])


def spoil(patch: pytest.MonkeyPatch, poison: Poison) -> None:
    """Puts the value into one update: into its first microbatch, its weights, or the score that follows."""
    forwards: list[None] = []

    def logits(self: TinyTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        forwards.append(None)
        found: Tensor = model(batch["inputs"])
        if len(forwards) != 2 * poison.update - 1:
            return found
        if "gradient" in poison.where:
            found.register_hook(lambda gradient: spoiled(gradient, batch["labels"], poison))
            return found
        return spoiled(found, batch["labels"], poison)

    def step(self: torch.optim.AdamW, *_: Any) -> None:
        with torch.no_grad():
            weight = self.param_groups[0]["params"][0].view(-1)
            weight[poison.place % len(weight)] = poison.value

    if poison.where == "a weight":
        updates: list[None] = []
        update = torch.optim.AdamW.step

        def poisoned_step(self: torch.optim.AdamW, *arguments: Any) -> Any:
            updates.append(None)
            return step(self) if len(updates) == poison.update else update(self, *arguments)

        patch.setattr(torch.optim.AdamW, "step", poisoned_step)
    elif poison.where == "a score":
        scores: list[None] = []
        evaluate = TinyTask.evaluate

        def poisoned_score(self: TinyTask, model: nn.Module, split: str) -> dict[str, float]:
            scores.append(None)
            is_it = len(scores) == (poison.update + 1) // 2
            return {"loss": poison.value} if is_it else evaluate(self, model, split)

        patch.setattr(TinyTask, "evaluate", poisoned_score)
    else:
        patch.setattr(TinyTask, "logits", logits)


def spoiled(values: Tensor, labels: Tensor, poison: Poison) -> Tensor:
    """The value in one element of a position that has a label, in all of the position, or everywhere."""
    values = values.clone()
    if poison.where.startswith("all"):
        return values + poison.value
    rows = (labels != -100).nonzero()
    example, position = rows[poison.place % len(rows)].tolist()
    if poison.where == "a row of logits":
        values[example, position] = poison.value
    else:
        values[example, position, poison.place % values.shape[-1]] = poison.value
    return values
