"""The arguments of R-Drop in the Trainer: the course of alpha, a search over them; losses that a model adds."""

import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_agreement import (
    ALPHA,
    CASES,
    HEADS_OF_EXPERTS,
    arguments,
    bert_classifier,
    build,
    gradients_of,
    loss_by_hand,
    only_item,
    train,
    worst_difference,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer
from transformers.trainer_utils import HPSearchBackend

from rdrop.integrations.transformers import RDropTrainer
from rdrop.integrations.transformers.forward import same_randomness

CLASSIFY = CASES["sequence classification"]
TAG = CASES["token classification"]
LLAMA = CASES["causal LM, Llama"]


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


# --------------------------------------------------------------------------------------------- the course of alpha


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", [2, 2, 2, 2]), ("linear", [0.5, 1, 1.5, 2]), ("quadratic", [0.125, 0.5, 1.125, 2])],
)
def test_alpha_rises_to_its_value_at_the_last_update(schedule: Any, weights: list[float], folder: str) -> None:
    trained = train(RDropTrainer, build(TAG), TAG.batches, folder, {"max_steps": 4}, alpha=2.0, alpha_schedule=schedule)
    assert logged(trained, "alpha") == weights
    terms = zip(*(logged(trained, name) for name in ("loss", "task_loss", "divergence")), weights, strict=True)
    for loss, task_loss, divergence, alpha in terms:
        assert loss == pytest.approx(task_loss + alpha / 2 * divergence, rel=1e-5)


def test_auto_is_four_that_rises_with_the_square(folder: str) -> None:
    trained = train(RDropTrainer, build(TAG), TAG.batches, folder, {"max_steps": 2}, alpha="auto")
    assert logged(trained, "alpha") == [1.0, 4.0]
    with pytest.raises(ValueError, match=r"alpha_schedule \(='linear'\) must be left out with alpha='auto'"):
        train(RDropTrainer, build(TAG), TAG.batches, folder, alpha="auto", alpha_schedule="linear")
    with pytest.raises(ValueError, match="must be 'constant', 'linear' or 'quadratic'"):
        train(RDropTrainer, build(TAG), TAG.batches, folder, alpha=1.0, alpha_schedule="cosine")


def test_a_rising_alpha_resumes_to_the_same_bits(tmp_path: Any) -> None:
    def trainer() -> RDropTrainer:
        torch.manual_seed(0)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return RDropTrainer(
            model=bert_classifier(num_labels=3, hidden_dropout_prob=0.2),
            args=arguments(str(tmp_path), **settings),
            train_dataset=CLASSIFY.batches * 2,
            data_collator=only_item,
            alpha=3.0,
            alpha_schedule="quadratic",
        )

    uninterrupted, resumed = trainer(), trainer()
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name in ("loss", "divergence", "alpha"):
        assert logged(resumed, name) == logged(uninterrupted, name)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )


def test_training_that_ends_early_says_how_far_alpha_rose(folder: str) -> None:
    class StopsAfterTwo(RDropTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.control.should_training_stop = self.state.global_step == 1
            return super().training_step(*args, **kwargs)

    method = {"alpha": 2.0, "alpha_schedule": "linear"}
    with pytest.warns(
        UserWarning, match=r"after 2 of 4 updates, when alpha had risen to 1 of 2: alpha \(=2\) is nominal"
    ):
        train(StopsAfterTwo, build(TAG), TAG.batches, folder, {"max_steps": 4}, **method)


# ----------------------------------------------------------------------------------------------- a search over it


class Watched(RDropTrainer):
    used: ClassVar[list[tuple[float, int]]] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.used.append((self.alpha, self.passes))
        return super().training_step(*args, **kwargs)


def searching(folder: str) -> Watched:
    Watched.used.clear()
    return Watched(
        model_init=lambda: bert_classifier(num_labels=3, hidden_dropout_prob=0.1).double(),
        args=arguments(folder),
        train_dataset=CLASSIFY.batches[1:2],
        data_collator=only_item,
        alpha=1.0,
    )


def test_every_trial_of_a_search_trains_with_its_own_alpha(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # which looks for the libraries that search
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = searching(folder)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    for alpha, passes in ((0.5, 2), (3.0, 3)):
        params = {"alpha": alpha, "passes": passes, "learning_rate": 0.1 * alpha}
        trainer.train(trial=SimpleNamespace(params=params, number=0))
        assert trainer.args.learning_rate == 0.1 * alpha
    assert Watched.used == [(0.5, 2), (3.0, 3)]


def test_a_trial_of_optuna_sets_them_without_a_warning_of_unknown_fields(folder: str, caplog: Any) -> None:
    trainer = searching(folder)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = space = lambda trial: {"alpha": trial.params["alpha"], "learning_rate": 0.5}
    trainer._hp_search_setup(SimpleNamespace(params={"alpha": 2.5}))
    assert (trainer.alpha, trainer.args.learning_rate) == (2.5, 0.5)
    assert trainer.hp_space is space
    assert "no corresponding field" not in caplog.text
    with pytest.raises(ValueError, match=r"alpha \(=-1.0\) must be a finite number >= 0"):
        trainer._hp_search_setup(SimpleNamespace(params={"alpha": -1.0}))
    trainer.hp_search_backend = HPSearchBackend.RAY
    trainer._hp_search_setup({"alpha": 1.5, "learning_rate": 0.25})
    assert (trainer.alpha, trainer.args.learning_rate) == (1.5, 0.25)


def test_what_auto_stands_for_ends_with_it(folder: str) -> None:
    trainer = searching(folder)
    trainer.hp_search_backend = HPSearchBackend.RAY
    for trial, expected in (
        ({"alpha": "auto"}, (4.0, "quadratic")),
        ({"alpha": 1.0}, (1.0, "constant")),
        ({"alpha": 2.0, "alpha_schedule": "linear"}, (2.0, "linear")),
    ):
        trainer._hp_search_setup(trial)
        assert (trainer.alpha, trainer.alpha_schedule) == expected
    with pytest.raises(ValueError, match=r"alpha_schedule \(='linear'\) must be left out with alpha='auto'"):
        trainer._hp_search_setup({"alpha": "auto"})


def test_a_search_by_optuna_trains_every_trial_with_its_own_alpha(folder: str) -> None:
    pytest.importorskip("optuna", reason="no extra has it: pip install optuna")
    trainer = searching(folder)
    trainer.eval_dataset = CLASSIFY.batches[1:2]
    space = {"hp_space": lambda trial: {"alpha": trial.suggest_float("alpha", 0.1, 5.0)}, "backend": "optuna"}
    best = trainer.hyperparameter_search(direction="minimize", n_trials=2, **space)
    used = [alpha for alpha, _ in Watched.used]
    assert len(set(used)) == 2
    assert best.hyperparameters["alpha"] in used


def test_alpha_among_the_arguments_of_the_trainer_is_refused_with_what_to_write(folder: str) -> None:
    """As the best trial is often set: `for name, value in best.hyperparameters.items(): setattr(args, name, value)`."""
    trainer = searching(folder)
    trainer.args.alpha = 3.0
    with pytest.raises(ValueError, match=r"args.alpha \(=3.0\) is not read.* Set trainer.alpha = 3.0"):
        trainer.train()
    trainer.alpha = 3.0
    trainer.train()
    assert Watched.used == [(3.0, 2)]


# ------------------------------------------------------------------------------------- what a model adds to its loss


def mixture() -> MixtralForCausalLM:
    router = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 5.0,
    }
    router["experts_implementation"] = "eager"  # the other is not for float64
    return MixtralForCausalLM(MixtralConfig(vocab_size=13, max_position_embeddings=16, **HEADS_OF_EXPERTS, **router))


MIXTRAL = replace(LLAMA, model=mixture)


def mixture_by_hand(model: Any, batches: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Gradient of R-Drop's loss of all batches and the mean of their routers' losses."""
    passes = 2 if alpha else 1
    loss, *_ = loss_by_hand(MIXTRAL, model, batches, alpha=alpha, passes=passes)
    for batch in batches:
        output = model(**{key: torch.cat([value] * passes) for key, value in batch.items()})
        loss = loss + 5.0 * output.aux_loss / len(batches)
    loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("method", [{"alpha": ALPHA}, {"alpha": 0.0}, {"alpha": ALPHA, "fused": True}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_of_a_router_is_its_mean_over_the_update(method: Any, accumulation: int, folder: str) -> None:
    batches = MIXTRAL.batches[:accumulation]
    settings = {"gradient_accumulation_steps": accumulation}
    found = train(RDropTrainer, build(MIXTRAL), batches, folder, settings, **method)
    expected = mixture_by_hand(build(MIXTRAL), batches, method["alpha"])
    assert worst_difference(found.gradients[0], expected) < 1e-6  # the router's softmax is one of float32
    assert float(expected["model.layers.0.mlp.gate.weight"].norm()) > 1e-3
    (loss,), (task_loss,), (auxiliary,) = (logged(found, name) for name in ("loss", "task_loss", "auxiliary_loss"))
    divergence = sum(logged(found, "divergence"))
    assert loss == pytest.approx(task_loss + method["alpha"] / 2 * divergence + auxiliary, rel=1e-5)


@pytest.mark.parametrize("method", [{"alpha": ALPHA}, {"alpha": 0.0}, {"alpha": ALPHA, "fused": True}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_label_smoothing_no_alpha_minimizes_or_logs_the_loss_of_a_router(
    method: Any, accumulation: int, folder: str
) -> None:
    """As the stock Trainer, which takes a smoothed loss of the logits alone."""
    batches, alpha = MIXTRAL.batches[:accumulation], method["alpha"]
    settings = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": 0.1}
    found = train(RDropTrainer, build(MIXTRAL), batches, folder, settings, **method)
    model: Any = build(MIXTRAL)
    passes = 2 if alpha else 1
    loss, *_ = loss_by_hand(MIXTRAL, model, batches, alpha=alpha, passes=passes, label_smoothing=0.1)
    loss.backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6
    assert logged(found, "auxiliary_loss") == []
    (logged_loss,), (task_loss,) = logged(found, "loss"), logged(found, "task_loss")
    assert logged_loss == pytest.approx(loss.item(), rel=1e-5)
    assert logged_loss == pytest.approx(task_loss + alpha / 2 * sum(logged(found, "divergence")), rel=1e-5)
    if alpha == 0:
        stock = train(Trainer, build(MIXTRAL), batches, folder, settings)
        assert all(map(torch.equal, found.model.parameters(), stock.model.parameters()))


def test_an_auxiliary_loss_of_ones_own_is_left_out_with_label_smoothing_at_alpha_zero_too(folder: str) -> None:
    kind = type("LlamaForCausalLM", (WithPenalty,), {})  # by that name the stock Trainer shifts the labels
    case = replace(LLAMA, model=lambda: kind(LLAMA.model().config))

    class Remedied(RDropTrainer):
        def auxiliary_loss(self, outputs: Any) -> Tensor:
            return penalty(outputs)

    for alpha, passes in ((ALPHA, 2), (0.0, 1)):
        settings = {"label_smoothing_factor": 0.1}
        found = train(Remedied, build(case), case.batches[:1], folder, settings, alpha=alpha, fused=False)
        model: Any = build(case)
        loss, *_ = loss_by_hand(case, model, case.batches[:1], alpha=alpha, passes=passes, label_smoothing=0.1)
        loss.backward()
        assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6


def test_micro_batches_share_the_loss_of_a_router(folder: str) -> None:
    batch = MIXTRAL.batches[1]
    found = train(RDropTrainer, build(MIXTRAL), [batch], folder, alpha=ALPHA, micro_batches=3)
    model: Any = build(MIXTRAL)
    loss, *_ = loss_by_hand(MIXTRAL, model, [batch], alpha=ALPHA, passes=2)
    for row in range(3):
        output = model(**{key: torch.cat([value[row : row + 1]] * 2) for key, value in batch.items()})
        loss = loss + 5.0 * output.aux_loss / 3
    loss.backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6


def test_the_loss_of_a_router_stays_where_the_targets_are_overridden(folder: str) -> None:
    class Overridden(RDropTrainer):
        def rdrop_targets(self, inputs: Any) -> Any:
            return super().rdrop_targets(inputs)

    batches = MIXTRAL.batches
    found = train(Overridden, build(MIXTRAL), batches, folder, {"gradient_accumulation_steps": 4}, alpha=ALPHA)
    expected = mixture_by_hand(build(MIXTRAL), batches, ALPHA)
    assert worst_difference(found.gradients[0], expected) < 1e-6


class WithPenalty(LlamaForCausalLM):
    """Adds to its loss the mean square of its logits."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        if output.loss is not None:
            output.loss = output.loss + penalty(output)
        return output


def penalty(output: Any) -> Tensor:
    return 0.1 * output.logits.square().mean()


def test_the_remedy_for_an_auxiliary_loss_does_what_it_says(folder: str) -> None:
    case = replace(LLAMA, model=lambda: WithPenalty(LLAMA.model().config))
    with pytest.raises(ValueError, match=r"What is added to that.* let auxiliary_loss\(self, outputs\) return"):
        train(RDropTrainer, build(case), case.batches, folder, alpha=ALPHA)

    class Remedied(RDropTrainer):
        def auxiliary_loss(self, outputs: Any) -> Tensor:
            return penalty(outputs)

    settings = {"gradient_accumulation_steps": 4}
    for alpha, passes in ((ALPHA, 2), (0.0, 1)):
        found = train(Remedied, build(case), case.batches, folder, settings, alpha=alpha, fused=False)
        model: Any = build(case)
        loss, *_ = loss_by_hand(case, model, case.batches, alpha=alpha, passes=passes)
        for batch in case.batches:
            output = model(**{key: torch.cat([value] * passes) for key, value in batch.items()})
            loss = loss + penalty(output) / 4
        loss.backward()
        assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6


@pytest.mark.parametrize("alpha", [ALPHA, 0.0])
def test_an_auxiliary_loss_that_the_model_does_not_add_is_refused(alpha: float, folder: str) -> None:
    class Mistaken(RDropTrainer):
        def auxiliary_loss(self, outputs: Any) -> Tensor:
            return penalty(outputs)

    with pytest.raises(ValueError, match="LlamaForCausalLM reports a loss of"):
        train(Mistaken, build(LLAMA), LLAMA.batches[:1], folder, alpha=alpha, fused=False)


# ---------------------------------------------------------------------------------------------- what it warns of


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.Sequential(nn.Embedding(13, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **other: Any) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.layers(input_ids).mean(1)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ForAnyModel(RDropTrainer):
    def rdrop_targets(self, inputs: Any) -> Any:
        from rdrop.integrations.transformers import Target

        return [Target(inputs["labels"])]


def test_batch_normalization_is_warned_of_once_in_the_words_of_the_check(folder: str) -> None:
    with pytest.warns(UserWarning, match="BatchNorm") as caught:
        train(ForAnyModel, Normalized(), CLASSIFY.batches[:2], folder, {"max_steps": 2}, alpha=1.0)
    (warning,) = [str(one.message) for one in caught if "BatchNorm" in str(one.message)]
    assert warning.endswith("use GroupNorm or LayerNorm, or freeze the statistics (module.eval()).")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ForAnyModel, Normalized(), CLASSIFY.batches[:1], folder, alpha=0.0)


def test_a_batch_whose_examples_have_several_images_is_not_cut(folder: str) -> None:
    """It trains as it is (`gradient_agreement.CASES`); which image belongs to which example is not known."""
    case = CASES["images and text"]
    with pytest.raises(ValueError, match=r"'pixel_values'\] has 3 rows for 2 examples.* Leave micro_batches at 1"):
        train(RDropTrainer, build(case), [rows_of_images(case, 1)], folder, alpha=ALPHA, micro_batches=2)


def rows_of_images(case: Any, index: int) -> dict[str, Tensor]:
    batch = case.batches[index]  # three examples, with none, one and two images
    kept = slice(1, 3)
    return {name: value if name == "pixel_values" else value[kept] for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------- the model card


def card_of(folder: str, name: str = "sequence classification", **method: Any) -> str:
    trained = train(RDropTrainer, build(CASES[name]), CASES[name].batches, folder, **method)
    for _ in range(2):  # a second one replaces the first
        trained.create_model_card(model_name="tiny")
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def test_the_model_card_states_the_settings_of_r_drop(folder: str) -> None:
    method = {"alpha": "auto", "passes": 3, "unlabeled_dataset": CLASSIFY.batches[:3]}
    card = card_of(folder, **method)
    assert card.startswith("---")  # the Trainer's own
    assert "### Training hyperparameters" in card
    _, section = card.split("\n## R-Drop\n")
    assert dict(re.findall(r"^\| (\w+) \| (.+) \|$", section, re.MULTILINE)) == {
        "setting": "value",
        "alpha": "4.0",
        "alpha_schedule": "quadratic",
        "passes": "3",
        "every": "1",
        "micro_batches": "1",
        "unlabeled_dataset": "3 examples",
        "unlabeled_batch_size": "1",
    }


def test_the_model_card_of_plain_training_says_nothing_of_r_drop(folder: str) -> None:
    assert "R-Drop" not in card_of(folder, alpha=0.0)


def test_looking_at_a_model_leaves_every_generator_as_it_was() -> None:
    """SpecAugment draws from numpy, so a look that consumed its numbers would change what training sees."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with same_randomness():
        inside = drawn()
    assert drawn() == inside
