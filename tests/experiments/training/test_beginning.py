"""Whether a training has begun: what is said of it, when, and how often."""

from pathlib import Path
from typing import Any

import pytest
from tests.experiments.tiny_runs import RECIPE, TinyTask
from torch import nn

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import beginning, trainer
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.trainer import Progress, train

LONG = RECIPE.replace(updates=1000, warmup_updates=100)
PLAIN = LONG.replace(alpha=0.0)


def rows(*found: tuple[int, float, float], sign: str = "source_use") -> list[dict[str, Any]]:
    """Rows of (update, sign, valid loss)."""
    return [{"kind": "valid", "step": step, "loss": loss, sign: value} for step, value, loss in found]


def complaints(
    found: list[dict[str, Any]], recipe: Recipe, constant: dict[str, float] | None = None
) -> list[str | None]:
    return beginning.complaints(found, recipe, constant or {})


def test_a_run_without_any_use_of_its_source_whose_loss_falls_is_told_to_lower_the_learning_rate() -> None:
    (said,) = complaints(rows((300, 0.0, 5.0), (400, 0.0002, 4.0)), LONG)
    assert said == (
        "the model does not use its sources after 400 updates: with those of other examples the valid loss is the "
        "same; it has collapsed though the valid loss falls: lower learning_rate (=0.05) or raise warmup_updates (=100)"
    )


def test_a_run_that_uses_its_source_a_little_more_each_time_is_told_to_delay_alpha() -> None:
    (said,) = complaints(rows((300, 0.01, 5.0), (400, 0.02, 4.9)), LONG)
    assert said is not None
    assert said.endswith(
        "it is slow to begin and this grows: delay alpha (alpha_schedule=quadratic) or lower alpha (=2), lower "
        "learning_rate (=0.05), or train longer than 1000 updates"
    )
    (said,) = complaints(rows((300, 0.02, 5.0), (400, 0.01, 4.9)), LONG.replace(alpha_schedule="quadratic"))
    assert said is not None
    assert said.endswith(
        "it is slow to begin: lower alpha (=2), lower learning_rate (=0.05), or train longer than 1000 updates"
    )


def test_plain_training_is_not_told_to_change_alpha() -> None:
    (said,) = complaints(rows((300, 0.01, 5.0), (400, 0.02, 4.9)), PLAIN)
    assert said is not None
    assert said.endswith(
        "it is slow to begin and this grows: lower learning_rate (=0.05), or train longer than 1000 updates"
    )


def test_a_run_that_patience_ended_is_told_to_raise_it_and_not_to_train_for_more_updates() -> None:
    recipe, found = PLAIN.replace(patience=3), rows((300, 0.01, 5.0), (400, 0.02, 4.9))
    said = beginning.note_on_beginning(found, recipe, {})["has begun"]
    assert said.endswith("lower learning_rate (=0.05), or raise patience (=3), which ended training after 400 updates")
    assert (beginning.new_warning(found, recipe, {}) or "").endswith("or train longer than 1000 updates")
    found += rows((1000, 0.02, 4.9))
    assert beginning.note_on_beginning(found, recipe, {})["has begun"].endswith("or train longer than 1000 updates")


def test_a_sign_that_is_no_number_says_nothing() -> None:
    found = [{"kind": "valid", "step": step, "loss": 1.0, "prediction_spread": None} for step in (300, 400)]
    assert complaints(found, LONG) == [None]


def test_predictions_that_hardly_differ_are_named() -> None:
    (said,) = complaints(rows((300, 0.02, 2.0), (400, 0.05, 1.9), sign="prediction_spread"), LONG)
    assert said is not None
    assert said.startswith(
        "the model predicts nearly the same for all valid examples after 400 updates: its predictions (of classes the "
        "probabilities) spread 5.0 % as far as the labels do; 10 % is a beginning; it is slow to begin and this grows: "
        "train longer than 1000 updates, change learning_rate "
    )


def test_predictions_that_differ_more_and_more_from_none_at_all_have_not_collapsed() -> None:
    (said,) = complaints(rows((300, 0.0, 2.0), (400, 0.0006, 1.9), sign="prediction_spread"), LONG)
    assert said is not None
    assert "it is slow to begin and this grows: train longer than 1000 updates, change" in said
    (said,) = complaints(rows((300, 0.0, 2.0), (400, 0.0, 1.9), sign="prediction_spread"), LONG)
    assert said is not None
    assert "it has collapsed though the valid loss falls: lower" in said


def test_a_model_with_half_of_the_errors_of_a_constant_prediction_has_begun_however_alike_its_probabilities() -> None:
    found = rows((300, 0.01, 0.69), (400, 0.02, 0.68), sign="prediction_spread")
    for accuracy, is_told in ((0.5, True), (0.74, True), (0.75, False), (1.0, False)):
        found[-1]["accuracy"] = accuracy
        assert [text is not None for text in complaints(found, LONG, {"accuracy": 0.5})] == [is_told]
        assert all(complaints(found, LONG)), "without a constant prediction nothing is known"


@pytest.mark.parametrize(
    "found",
    [
        rows((50, 0.0, 5.0), (90, 0.0, 4.0)),  # within the warm-up
        rows((100, 0.0, 5.0), (190, 0.0, 4.0)),  # in the first fifth
        rows((300, 0.0, 5.0)),  # the first score
        rows((300, 0.0, 5.0), (400, 0.06, 4.0)),  # it has begun
        rows((300, 0.0, 5.0), (400, 0.11, 4.0), sign="prediction_spread"),
        rows((300, 0.0, 5.0), (400, float("nan"), 4.0)),
        rows((300, 0.0, 5.0), (400, 0.0, 4.0), sign="accuracy"),  # a task that does not measure it
    ],
)
def test_nothing_is_said_where_it_is_too_early_or_the_model_has_begun(found: list[dict[str, Any]]) -> None:
    assert not any(complaints(found, LONG))


class SlowTask(TinyTask):
    """Begins to use its source at the `begins`-th score; what it seems to do at the `seems`-th does not last."""

    begins, seems = 4, 0

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self.scores = getattr(self, "scores", 0) + (split == "valid")
        uses = self.scores >= self.begins or self.scores == self.seems
        self.signs = {"source_use": 1.0 if uses else 0.001 * self.scores}
        return super().evaluate(model, split)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(trainer, "load_task", SlowTask)
    return []


def test_a_late_beginning_is_that_after_which_all_is_well(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowTask, "seems", 1)
    result = train(RECIPE.replace(evaluate_every=1), tmp_path)
    assert result["notes"]["has begun"] == "late, by the score after 4 of 8 updates"


def test_the_warning_is_said_once_and_a_late_beginning_noted(said: list[str], tmp_path: Path) -> None:
    def listen(progress: Progress) -> None:
        said.extend(filter(None, [progress.warning]))

    result = train(RECIPE.replace(evaluate_every=1), tmp_path, on_progress=listen)
    assert [warning.split(":")[0] for warning in said] == ["the model does not use its sources after 2 updates"]
    assert result["notes"]["has begun"] == "late, by the score after 4 of 8 updates"
    assert result["source_use"] == 1.0
    assert [row["source_use"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "valid"][:4] == [
        0.001,
        0.002,
        0.003,
        1.0,
    ]


def test_a_run_that_never_begins_says_so_in_its_result(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowTask, "begins", 100)
    result = train(RECIPE, tmp_path)
    assert result["notes"]["has begun"].startswith("no: the model does not use its sources after 8 updates: ")


def test_a_resumed_run_does_not_repeat_the_warning(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowTask, "begins", 100)

    def listen(progress: Progress) -> None:
        said.extend(filter(None, [progress.warning]))
        if progress.step == 6 and not stopped:
            stopped.append(True)
            raise Preempted(15, 6, tmp_path)

    stopped: list[bool] = []
    recipe = RECIPE.replace(evaluate_every=1, checkpoint_every=1)
    with pytest.raises(Preempted):
        train(recipe, tmp_path, on_progress=listen)
    assert len(said) == 1
    train(recipe, tmp_path, on_progress=listen)
    assert len(said) == 1


def test_a_run_that_began_in_time_has_no_note(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowTask, "begins", 1)
    assert "has begun" not in train(RECIPE, tmp_path)["notes"]


def test_a_run_that_diverged_says_so_in_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverging(SlowTask):
        begins = 100

        def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
            super().evaluate(model, split)
            return {"loss": 0.7 if self.scores == 1 or split == "test" else 7262.0}

    monkeypatch.setattr(trainer, "load_task", Diverging)
    notes = train(RECIPE, tmp_path)["notes"]
    assert notes == {
        "diverged": "the valid loss ended at 7,262, and its first is 0.7; lower learning_rate (=0.05) or raise "
        "warmup_updates (=2)"
    }
