"""`RDropSFTTrainer`: R-Drop in TRL's supervised fine-tuning has the gradient written out, and is TRL at alpha 0."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from gradient_agreement import PassScale, gradients_of, worst_difference
from peft import get_peft_model
from reward_agreement import (
    CHOICES,
    REWARD,
    RDropRewardTrainer,
    margins_loss_by_hand,
    reward_model,
    reward_trainer,
    rewarded,
)
from sft_agreement import (
    ALPHA,
    COEFFICIENT,
    OF_EVERY_MODEL,
    SFT,
    TURNS,
    adapted,
    by_hand,
    config,
    drawn,
    experts,
    llama,
    lora,
    rdrop,
    tokenizer,
    tune,
    whole,
    with_stand_in,
)
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from trl import RewardTrainer, SFTTrainer

from rdrop import bernoulli_kl
from rdrop.integrations.transformers import RDropMixin
from rdrop.integrations.trl import RDropSFTTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
BEST_FIT = "packed, best fit"
TEXT, PACKED, ANSWERS = SFT["plain text"], SFT[BEST_FIT], SFT["completions"]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
DROPOUT = {"attention_dropout": 0.3, "attn_implementation": "eager"}


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def same_bits(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, True) for name in SFT), ("completions", False), (BEST_FIT, False)]
)
def test_the_gradient_of_fine_tuning_is_that_of_every_sequence_alone(name: str, fused: bool, folder: str) -> None:
    found = rdrop(with_stand_in(drawn(llama())), SFT[name], folder, fused=fused)
    assert worst_difference(found.gradients[0], by_hand(with_stand_in(drawn(llama())), SFT[name])) < 1e-12


@pytest.mark.parametrize("case", [ANSWERS, SFT["padding-free"]], ids=["padded", "padding-free"])
def test_micro_batches_and_three_passes_of_fine_tuning_are_exact(case: Any, folder: str) -> None:
    method = {"micro_batches": 2, "passes": 3, "fused": True}
    found = rdrop(with_stand_in(drawn(llama()), 3), case, folder, **method)
    expected = by_hand(with_stand_in(drawn(llama()), 3), case, passes=3)
    assert worst_difference(found.gradients[0], expected) < 1e-12


def test_the_gradient_under_autocast_is_that_by_hand_to_its_rounding(folder: str) -> None:
    """bfloat16 is TRL's default."""
    found = rdrop(with_stand_in(drawn(llama(), torch.float32)), ANSWERS, folder, {"bf16": True}, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(with_stand_in(drawn(llama(), torch.float32)), ANSWERS)
    assert worst_difference(found.gradients[0], expected) < 0.03


@pytest.mark.parametrize("case", [ANSWERS, SFT["packed, best fit, completions"]], ids=["padded", "packed"])
def test_the_gradient_of_lora_with_checkpointing_and_micro_batches_is_exact(case: Any, folder: str) -> None:
    found = rdrop(adapted(), case, folder, {"activation_checkpointing": True}, micro_batches=2, fused=True)
    expected = by_hand(adapted(), case)
    assert found.gradients[0].keys() == expected.keys()
    assert all("lora_" in name for name in expected)
    assert worst_difference(found.gradients[0], expected) < 1e-12


@pytest.mark.parametrize("case", [TEXT, PACKED], ids=["padded", "packed"])
def test_checkpointing_draws_the_same_masks_again(case: Any, folder: str) -> None:
    kept, recomputed = (
        rdrop(drawn(llama(**DROPOUT)), case, folder, {"activation_checkpointing": again}, fused=True)
        for again in (False, True)
    )
    assert logged(kept, "divergence")[0] > 1e-3
    assert worst_difference(recomputed.gradients[0], kept.gradients[0]) < 1e-12


def gemma() -> Any:
    """Its logits are capped, so they cannot come from hidden states here."""
    settings = OF_EVERY_MODEL | {"final_logit_softcapping": 3.0, "head_dim": 4, "tie_word_embeddings": False}
    return with_stand_in(drawn(Gemma2ForCausalLM(Gemma2Config(**settings))))


def test_a_model_with_capped_logits_is_trained_from_logits(folder: str) -> None:
    found = rdrop(gemma(), ANSWERS, folder)
    assert worst_difference(found.gradients[0], by_hand(gemma(), ANSWERS)) < 1e-7  # it normalizes in float32
    with pytest.raises(ValueError, match="the model scales, caps or rearranges its logits"):
        rdrop(gemma(), ANSWERS, folder, fused=True)


# ------------------------------------------------------------------------------------------- a mixture of experts

IN_ORDER = {"train_sampling_strategy": "sequential", "router_aux_loss_coef": COEFFICIENT}


def router_loss_by_hand(model: Any, passes: int) -> Tensor:
    """The mean over the batches of two of all sequences, each padded."""
    losses = []
    sequences = [torch.tensor(whole(*turn)) for turn in TURNS]
    for some in (sequences[:2], sequences[2:4], sequences[4:]):
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).repeat(passes, 1)
        losses.append(model(input_ids=ids, attention_mask=(ids > 0).long(), output_router_logits=True).aux_loss)
    return COEFFICIENT * torch.stack(losses).mean()


@pytest.mark.parametrize("fused", [True, False])
def test_the_routers_loss_is_added_once_with_trls_coefficient(fused: bool, folder: str) -> None:
    found = rdrop(with_stand_in(experts()), TEXT, folder, IN_ORDER, fused=fused)
    model = with_stand_in(experts())
    by_hand(model, TEXT)
    auxiliary = router_loss_by_hand(model, passes=2)
    auxiliary.backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-12
    assert logged(found, "auxiliary_loss") == [pytest.approx(auxiliary.item())]
    assert logged(found, "aux_loss") == [pytest.approx(auxiliary.item() / COEFFICIENT)]


SMOOTHED = {"max_steps": 1, "label_smoothing_factor": 0.1, "train_sampling_strategy": "sequential"}


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_label_smoothing_the_routers_loss_is_neither_minimized_nor_part_of_the_task_loss(
    accumulation: int, folder: str
) -> None:
    """As in TRL, which takes a smoothed loss of the logits alone."""

    def settings(coefficient: float) -> dict[str, Any]:
        return SMOOTHED | {"gradient_accumulation_steps": accumulation, "router_aux_loss_coef": coefficient}

    for alpha in (ALPHA, 0.0):
        found, without = (
            rdrop(with_stand_in(experts()), TEXT, folder, settings(coefficient), alpha=alpha, every=1)
            for coefficient in (COEFFICIENT, 0.0)
        )
        assert worst_difference(found.gradients[0], without.gradients[0]) < 1e-12
        assert logged(found, "auxiliary_loss") == []
        (loss,), (task_loss,) = logged(found, "loss"), logged(found, "task_loss")
        assert loss == pytest.approx(task_loss + alpha / 2 * sum(logged(found, "divergence")))
        assert logged(found, "aux_loss") != []  # TRL's metric stays
    stock = tune(SFTTrainer, with_stand_in(experts()), TEXT, folder, settings(COEFFICIENT))
    assert same_bits(stock.model, found.model)


# ------------------------------------------------------------------------------------------------- TRL, where plain

OF_BOTH = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")


@pytest.mark.parametrize(
    ("model", "case", "method"),
    [
        (lambda: drawn(llama(**DROPOUT)), TEXT, {"alpha": 0.0}),
        (lambda: drawn(llama(**DROPOUT)), SFT["packed, best fit, completions"], {"alpha": 0.0}),
        (lambda: experts(**DROPOUT), TEXT, {"alpha": 0.0}),
        (lambda: drawn(llama(**DROPOUT)), ANSWERS, {"every": 4, "micro_batches": 2}),
        (lambda: adapted_with_dropout(), ANSWERS, {"alpha": 0.0}),
    ],
    ids=["text", "packed", "experts", "updates that every leaves out", "LoRA with checkpointing"],
)
@pytest.mark.filterwarnings(r"ignore:every \(=\d\) is more than the number of updates")
def test_at_alpha_zero_fine_tuning_is_trls_to_the_bit(model: Any, case: Any, method: Any, folder: str) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "activation_checkpointing": case is ANSWERS}
    stock = tune(SFTTrainer, model(), case, folder, settings)
    ours = rdrop(model(), case, folder, settings, **method)
    assert same_bits(stock.model, ours.model)
    for name in OF_BOTH:
        assert logged(ours, name) == logged(stock, name) != []


WITH_DROPOUT = {
    "Llama": lambda: drawn(llama(**DROPOUT)),
    "LoRA": lambda: adapted_with_dropout(),
    "experts": lambda: experts(**DROPOUT),
}


def adapted_with_dropout() -> Any:
    return get_peft_model(drawn(llama(attn_implementation="eager")), lora(lora_dropout=0.3))


@pytest.mark.parametrize("model", WITH_DROPOUT)
def test_the_evaluation_of_fine_tuning_is_trls(model: str, folder: str) -> None:
    made = WITH_DROPOUT[model]()

    def evaluated(trainer_class: type, **method: Any) -> dict[str, float]:
        trainer = trainer_class(
            model=made,
            args=config(folder, packing=model == "Llama", max_length=12),
            train_dataset=Dataset.from_list(TEXT.rows[:2]),
            eval_dataset=Dataset.from_list(TEXT.rows),
            processing_class=tokenizer(),
            **method,
        )
        return {name: trainer.evaluate()[f"eval_{name}"] for name in ("loss", "entropy", "mean_token_accuracy")}

    assert evaluated(RDropSFTTrainer, alpha=1.0) == evaluated(SFTTrainer)


@pytest.mark.parametrize("case", [ANSWERS, SFT["padding-free"]], ids=["padded", "padding-free"])
@pytest.mark.parametrize("method", [{"fused": True}, {"fused": False}, {"fused": True, "micro_batches": 2}])
def test_trls_metrics_are_those_of_the_first_pass(case: Any, method: Any, folder: str) -> None:
    """The stand-in leaves the first pass as evaluation has it."""
    found = rdrop(with_stand_in(drawn(llama())), case, folder, {"per_device_train_batch_size": 5}, **method)
    model = drawn(llama()).eval()
    entropies, right, tokens = [], [], 0
    for ids, labels in case.sequences():
        tokens += len(ids)
        predicted = torch.tensor(labels[1:])
        probabilities = model(input_ids=torch.tensor([ids])).logits[0, :-1][predicted != -100].softmax(-1)
        entropies += (-(probabilities * probabilities.log()).sum(-1)).tolist()
        right += (probabilities.argmax(-1) == predicted[predicted != -100]).tolist()
    assert logged(found, "num_tokens") == [tokens]
    assert logged(found, "entropy") == [pytest.approx(sum(entropies) / len(entropies))]
    assert logged(found, "mean_token_accuracy") == [pytest.approx(sum(right) / len(right))]


@pytest.mark.parametrize("model", WITH_DROPOUT)
def test_fine_tuning_resumes_to_the_same_bits(model: str, folder: str) -> None:
    """With an alpha that rises."""
    case = PACKED if model == "Llama" else ANSWERS
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    settings["activation_checkpointing"] = model == "LoRA"
    torch.manual_seed(0)
    whole_run = rdrop(WITH_DROPOUT[model](), case, folder, settings, alpha="auto")
    torch.manual_seed(0)
    made = WITH_DROPOUT[model]()
    if model == "experts":  # whose weights have other names in files, and which the Trainer therefore does not load
        eager = {"experts_implementation": "eager", "attn_implementation": "eager", "dtype": torch.float64}
        made = type(made).from_pretrained(f"{folder}/checkpoint-2", **eager)
    resumed = RDropSFTTrainer(
        model=made,
        args=config(folder, **(case.settings | settings)),
        train_dataset=Dataset.from_list(case.rows),
        processing_class=tokenizer(),
        alpha="auto",
    )
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert same_bits(resumed.model, whole_run.model)
    assert logged(resumed, "alpha") == [0.25, 1.0, 2.25, 4.0]


# ------------------------------------------------------------------------------------------------------ what is refused


def refuses(message: str, folder: str, settings: Any = None, **method: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rdrop(llama(), TEXT, folder, settings, **method)


def test_losses_that_r_drop_would_replace_are_refused_by_name(folder: str) -> None:
    refuses("loss_type (='dft') weighs each token by its own probability", folder, {"loss_type": "dft"})
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        refuses("compute_loss_func would be ignored", folder, compute_loss_func=lambda *_, **__: 0)
    arguments = config(folder)
    arguments.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel replaces layers of the model, which was not tried"):
        RDropSFTTrainer(model=llama(), args=arguments, train_dataset=Dataset.from_list(TEXT.rows), alpha=1.0)


def test_a_model_without_dropout_is_refused_and_either_remedy_works(folder: str) -> None:
    with pytest.raises(
        ValueError, match=r"Set attention_dropout=0\.1 in the LlamaConfig .* lora_dropout serves as well"
    ):
        rdrop(llama(), TEXT, folder)
    own = rdrop(drawn(llama(attention_dropout=0.1)), TEXT, folder)
    assert logged(own, "divergence")[0] > 0
    settings = {"max_steps": 2, "learning_rate": 0.1}
    adapters = rdrop(llama(), TEXT, folder, settings, peft_config=lora(lora_dropout=0.1))
    first, second = logged(adapters, "divergence")
    assert first == 0  # LoRA's update starts at 0
    assert second > 0


def test_sequences_that_a_model_does_not_keep_apart_are_refused(folder: str) -> None:
    model = with_stand_in(drawn(llama()))
    attend = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: attend(*args, **kwargs)
    with pytest.raises(ValueError, match="does not keep the sequences of a packed row apart"):
        rdrop(model, PACKED, folder)


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RewardTrainer"])
def test_the_mixin_before_a_trainer_of_trl_is_refused_by_name(name: str) -> None:
    class Mine(RDropMixin, getattr(trl, name)):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=rf"{name}\.compute_loss computes a loss of its own"):
        Mine(model=llama(), alpha=1.0)


def test_unlabeled_text_is_refused(folder: str) -> None:
    refuses("a text is its own label: add it to train_dataset", folder, unlabeled_dataset=TEXT.rows)


def test_the_model_card_of_trl_states_the_settings_of_r_drop(folder: str) -> None:
    found = rdrop(drawn(llama(**DROPOUT)), TEXT, folder, alpha=2.0, alpha_schedule="linear")
    found.create_model_card()
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert "This model was trained with SFT." in card
    assert "| alpha | 2.0 |\n| alpha_schedule | linear |\n| passes | 2 |" in card


def test_alpha_rises_in_fine_tuning(folder: str) -> None:
    found = rdrop(drawn(llama(**DROPOUT)), TEXT, folder, {"max_steps": 2}, alpha="auto")
    assert logged(found, "alpha") == [1.0, 4.0]
    assert ALPHA > 4


# ------------------------------------------------------------------------------------------------------- the programs


def test_the_example_of_fine_tuning_learns_with_and_without_rdrop(capsys: Any) -> None:
    example = runpy.run_path(str(EXAMPLES / "trl_sft.py"))
    for alpha in (0.0, 1.0):
        assert example["train"](alpha, updates=60)["eval_mean_token_accuracy"] > 0.75  # 0.5 are the ends
        assert ("divergence" in capsys.readouterr().out) == (alpha > 0)


def test_the_example_of_reward_modeling_learns_with_and_without_rdrop() -> None:
    for alpha in (0.0, 1.0):
        assert REWARD["train"](alpha)["eval_accuracy"] > 0.8


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_reward_modeling_is_that_of_the_margins_by_hand(accumulation: int, folder: str) -> None:
    """Of the mean over the pairs; with accumulation too, where batches have as many pairs."""
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    found = rewarded(folder, settings)
    model = reward_model(PassScale(2))
    margins_loss_by_hand(model, CHOICES).backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6  # the margins are float32


def rewarding(trainer_class: Any, folder: str, settings: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**(OF_EVERY_MODEL | DROPOUT | {"num_labels": 1})))
    return reward_trainer(trainer_class, model, folder, {"per_device_train_batch_size": 2} | settings, **options)


def reward_bert() -> Any:
    sizes = {name: OF_EVERY_MODEL[name] for name in ("vocab_size", "pad_token_id", "hidden_size", "intermediate_size")}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    return BertForSequenceClassification(BertConfig(**sizes, **layers))


def test_reward_modeling_refuses_to_have_its_dropout_switched_off_and_the_remedy_works(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose dropout is in modules, which TRL sets to 0 unless told not to."""
    seen: list[float] = []

    def watched(passes: Tensor) -> Tensor:
        seen.append(bernoulli_kl(passes).mean().item())
        return bernoulli_kl(passes)

    monkeypatch.setitem(RDropRewardTrainer.compute_loss.__globals__, "bernoulli_kl", watched)
    switched_off = {"disable_dropout": True, "max_steps": 2}
    with pytest.raises(ValueError, match=r"RewardConfig\(disable_dropout=False\)"):
        reward_trainer(RDropRewardTrainer, reward_bert(), folder, switched_off, alpha=1.0)
    reward_trainer(
        RDropRewardTrainer, reward_bert(), folder, switched_off | {"disable_dropout": False}, alpha=1.0
    ).train()
    assert len(seen) == 2
    assert min(seen) > 0
    reward_trainer(RDropRewardTrainer, reward_bert(), folder, switched_off, alpha=0.0).train()


def test_reward_modeling_of_a_model_without_dropout_is_refused(folder: str) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**(OF_EVERY_MODEL | {"num_labels": 1})))
    with pytest.raises(ValueError, match="nothing is random in LlamaForSequenceClassification"):
        reward_trainer(RDropRewardTrainer, model, folder, {}, alpha=1.0).train()


def test_at_alpha_zero_and_in_evaluation_reward_modeling_is_trls_to_the_bit(folder: str) -> None:
    stock = rewarding(RewardTrainer, folder, {"max_steps": 2})
    stock.train()
    ours = rewarding(RDropRewardTrainer, folder, {"max_steps": 2}, alpha=0.0)
    ours.train()
    assert same_bits(ours.model, stock.model)
    ours.alpha = 1.0
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


def test_reward_modeling_resumes_to_the_same_bits(folder: str) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole_run = rewarding(RDropRewardTrainer, folder, settings, alpha=1.0)
    whole_run.train()
    resumed = rewarding(RDropRewardTrainer, folder, settings, alpha=1.0)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert same_bits(resumed.model, whole_run.model)
