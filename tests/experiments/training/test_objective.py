"""The variants of the method in the training loop: each is the loss written out in plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experiments.tiny_runs import RECIPE, VOCABULARY, TinyRecipe, TinyTask, final_state
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from rdrop import rdrop_loss, repeat_batch
from rdrop.dropout import dropout_rate
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import trainer
from rdrop.experiments.training.objective import Objective, ObjectiveError
from rdrop.experiments.training.trainer import TrainingError, train
from rdrop.integrations.targets import Target
from rdrop.terms import kl_from_first, squared_difference
from rdrop.views import perturb_batch, views_of

BASE = RECIPE.replace(alpha=3.0)


class BartTask(TinyTask):
    """The tiny task as translation, by a BART of two layers: tokens to cut, an encoder, an output layer."""

    encoder_dropout = 0.2

    def build_model(self) -> nn.Module:
        halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in SIZES.items()}
        config = BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            max_position_embeddings=16,
            dropout=0.2,
            scale_embedding=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            **halves,
        )
        model = BartForConditionalGeneration(config)
        for module in model.get_encoder().modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = self.encoder_dropout
        return model

    def train_batch(self, indices: list[int], epoch: int) -> dict[str, Tensor]:
        inputs = self.inputs[indices]
        mask = torch.ones_like(inputs)
        return {
            "input_ids": inputs,
            "attention_mask": mask,
            "decoder_input_ids": inputs.flip(1),
            "labels": self.targets[indices],
        }

    def special_ids(self) -> frozenset[int]:
        return frozenset({0, 1, 2})

    def unknown_id(self) -> int:
        return 2

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return {"loss": self.logits(model, self.train_batch([28, 29], 0)).logsumexp(-1).mean().item()}


SIZES = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}


def loss_and_gradient(recipe: TinyRecipe, task: TinyTask, loss: Callable[[nn.Module, dict], Tensor]) -> tuple:
    seed_all(0, "model")
    model = task.build_model().train()
    batch = task.train_batch([0, 1, 2, 3], 0)
    seed_all(0, "masks")
    value = loss(model, batch)
    value.backward()
    return value.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def terms_of_loop(recipe: TinyRecipe, task: TinyTask) -> Callable[[nn.Module, dict], Tensor]:
    def loss(model: nn.Module, batch: dict) -> Tensor:
        method = Objective(recipe, task, model, lambda repeated: task.logits(model, repeated))
        return method.terms(batch, 0, torch.tensor(7)).loss

    return loss


def assert_same(found: tuple, expected: tuple, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_two_dropout_rates_are_a_forward_for_each() -> None:
    recipe, task = BASE.replace(dropout=[0.1, 0.6]), TinyTask(BASE)

    def by_hand(model: nn.Module, batch: dict) -> Tensor:
        with dropout_rate(model, 0.1):
            first = model(batch["inputs"])
        with dropout_rate(model, 0.6):
            second = model(batch["inputs"])
        logits = torch.cat([first, second])
        return rdrop_loss(logits, batch["labels"], alpha=3.0, label_smoothing=0.1, num_items=7).loss

    assert_same(loss_and_gradient(recipe, task, terms_of_loop(recipe, task)), loss_and_gradient(recipe, task, by_hand))


@pytest.mark.parametrize("kind", ["token", "span", "feature", "unknown", "embedding"])
def test_a_cutoff_cuts_every_pass_but_the_first(kind: str) -> None:
    recipe, task = BASE.replace(cutoff=kind, cutoff_ratio=0.4), BartTask(BASE)

    def by_hand(model: nn.Module, batch: dict) -> Tensor:
        views = views_of(kind, 0.4)
        repeated, perturbed = perturb_batch(batch, views, special_ids={0, 1, 2}, unknown_id=2)
        with perturbed(model):
            logits = task.logits(model, repeated)
        return rdrop_loss(logits, batch["labels"], alpha=3.0, label_smoothing=0.1, num_items=7).loss

    cut = loss_and_gradient(recipe, task, terms_of_loop(recipe, task))
    assert_same(cut, loss_and_gradient(recipe, task, by_hand))
    plain = BASE.replace(cutoff=None)
    assert not torch.equal(cut[0], loss_and_gradient(plain, task, terms_of_loop(plain, task))[0])


def test_simcut_learns_from_the_clean_pass_and_pulls_the_cut_one_to_it() -> None:
    simcut = {"cutoff": "embedding", "cutoff_ratio": 0.4, "task_passes": "first", "divergence": "from-first"}
    recipe, task = BASE.replace(**simcut), BartTask(BASE)

    def by_hand(model: nn.Module, batch: dict) -> Tensor:
        repeated, perturbed = perturb_batch(batch, views_of("embedding", 0.4, "first"), special_ids={0, 1, 2})
        with perturbed(model):
            clean, cut = task.logits(model, repeated).chunk(2)
        labels = batch["labels"]
        valid = labels != -100
        p, q = clean[valid].log_softmax(-1), cut[valid].log_softmax(-1)
        nll = nn.functional.cross_entropy(clean[valid], labels[valid], label_smoothing=0.1, reduction="sum")
        return (nll + 3.0 / 2 * (p.exp() * (p - q)).sum()) / 7

    assert_same(
        loss_and_gradient(recipe, task, terms_of_loop(recipe, task)), loss_and_gradient(recipe, task, by_hand), 1e-6
    )


def test_fused_and_encoder_once_change_neither_loss_nor_gradient() -> None:
    task = BartTask(BASE)
    fused = BASE.replace(fused=True)
    assert_same(
        loss_and_gradient(fused, task, terms_of_loop(fused, task)),
        loss_and_gradient(BASE, task, terms_of_loop(BASE, task)),
        1e-6,
    )
    task.encoder_dropout = 0.0
    once = BASE.replace(encoder_once=True)

    def by_hand(model: nn.Module, batch: dict) -> Tensor:
        logits = task.logits(model, repeat_batch(batch))
        return rdrop_loss(logits, batch["labels"], alpha=3.0, label_smoothing=0.1, num_items=7).loss

    assert_same(loss_and_gradient(once, task, terms_of_loop(once, task)), loss_and_gradient(BASE, task, by_hand), 1e-6)


def test_the_output_layer_computes_in_the_precision_of_the_recipe_when_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, task, seen = BASE.replace(fused=True, precision="bf16"), BartTask(BASE), []
    computed = Target.linear_rdrop_loss

    def seeing(*args: Any, **options: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return computed(*args, **options)

    monkeypatch.setattr(Target, "linear_rdrop_loss", seeing)
    loss_and_gradient(recipe, task, terms_of_loop(recipe, task))
    recipe = recipe.replace(precision="fp32")
    loss_and_gradient(recipe, task, terms_of_loop(recipe, task))
    assert seen == [torch.bfloat16, False]


def test_the_encoder_runs_on_one_pass_only_when_asked() -> None:
    task = BartTask(BASE)
    task.encoder_dropout = 0.0
    seen: list[int] = []
    for recipe in (BASE, BASE.replace(encoder_once=True)):
        model = task.build_model().train()
        model.get_encoder().layers[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        terms_of_loop(recipe, task)(model, task.train_batch([0, 1, 2, 3], 0))
    assert seen == [8, 2, 4]  # the 2: one example, by which it is seen that nothing else in the encoder is random


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused": True}, r"fused \(=true\) must be false: "),
        ({"encoder_once": True}, r"encoder_once \(=true\) must be false: the model is none of transformers"),
        ({"views": "each"}, r'views \(="each"\) must be "same": tiny does not change its inputs at random'),
        ({"cutoff": "token", "cutoff_ratio": 0.1}, r"cutoff \(='token'\) must be null: tiny has no tokens to cut"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    with pytest.raises(TrainingError, match=message):
        train(BASE.replace(**changes), tmp_path)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its name changes in v6
def test_checkpointing_that_loses_the_masks_is_refused_before_the_first_step() -> None:
    task = BartTask(BASE)
    model = task.build_model()
    model.gradient_checkpointing_enable({"preserve_rng_state": False, "use_reentrant": True})
    with pytest.raises(ObjectiveError, match=r"asks for R-Drop, but .*checkpoint"):
        terms_of_loop(BASE, task)(model, {})


def test_an_encoder_with_dropout_is_not_run_once() -> None:
    with pytest.raises(ObjectiveError, match=r"encoder_once .*dropout is on in the encoder"):
        terms_of_loop(BASE.replace(encoder_once=True), BartTask(BASE))(BartTask(BASE).build_model(), {})


def test_a_divergence_of_the_task_s_own_cannot_go_from_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTask, "divergence", staticmethod(squared_difference))
    with pytest.raises(ObjectiveError, match=r'divergence \(="from-first"\) must be "symmetric"'):
        terms_of_loop(BASE.replace(divergence="from-first"), TinyTask(BASE))(TinyTask(BASE).build_model(), {})


def test_from_first_takes_the_divergence_from_the_first_pass() -> None:
    recipe, task = BASE.replace(divergence="from-first"), TinyTask(BASE)

    def by_hand(model: nn.Module, batch: dict) -> Tensor:
        options = {"alpha": 3.0, "label_smoothing": 0.1, "num_items": 7, "divergence": kl_from_first}
        return rdrop_loss(model(repeat_batch(batch["inputs"])), batch["labels"], **options).loss

    assert_same(loss_and_gradient(recipe, task, terms_of_loop(recipe, task)), loss_and_gradient(recipe, task, by_hand))


# ---------------------------------------------------------------------------------------------- in the loop


VARIANTS: dict[str, dict[str, Any]] = {
    "token batches": {"batch_size": None, "batch_tokens": 20},
    "two rates": {"dropout": [0.1, 0.4]},
    "cutoff": {"cutoff": "embedding", "cutoff_ratio": 0.3, "task_passes": "first", "divergence": "from-first"},
    "fused": {"fused": True},
    "averaging": {"average_last": 3},
    "sgd": {"optimizer": "nag", "learning_rate": 0.1},
    "inverse-sqrt": {"schedule": "inverse-sqrt"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_every_update_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = BASE.replace(updates=5, **VARIANTS[name])
    monkeypatch.setattr(trainer, "load_task", BartTask)
    train(recipe, tmp_path / "whole")
    seen: list[int] = []

    def stop_once(progress: trainer.Progress) -> None:
        if progress.step not in seen:
            seen.append(progress.step)
            raise KeyboardInterrupt

    for _ in range(recipe.updates + 1):
        try:
            train(recipe, tmp_path / "stopped", on_progress=stop_once)
        except KeyboardInterrupt:
            continue
    assert seen == [1, 2, 3, 4, 5]
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_the_mean_of_the_last_weights_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    scored: list[dict[str, Tensor]] = []

    def evaluate(self: TinyTask, model: nn.Module, split: str) -> dict[str, float]:
        scored.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss": 1.0}

    monkeypatch.setattr(TinyTask, "evaluate", evaluate)
    result = train(BASE.replace(average_last=3), tmp_path)
    assert result["averaged_steps"] == [4, 6, 8]
    for name, mean in scored[-1].items():
        expected = torch.stack([weights[name].double() for weights in scored[1:4]]).mean(0).float()
        assert torch.equal(mean, expected)


def test_training_ends_when_the_score_has_not_improved_for_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    scores = iter([3.0, 1.0, 2.0, 1.0, 0.5])  # the last two: valid and test of the best
    monkeypatch.setattr(TinyTask, "evaluate", lambda self, model, split: {"loss": next(scores)})
    result = train(BASE.replace(patience=1, updates=100), tmp_path)
    assert (result["updates"], result["best_step"]) == (6, 4)
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == [2, 2, 4, 4, 6, 6]


def test_trackers_are_told_what_the_rows_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    train(BASE, tmp_path, trackers=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    told = {event.step: event.value for event in events.Scalars("train/divergence")}
    rows = {row["step"]: row["divergence"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"}
    assert told == pytest.approx(rows)
