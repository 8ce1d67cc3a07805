"""Models whose weights are bfloat16 or float16, as `from_pretrained` loads them from such a checkpoint."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from gradient_agreement import (
    ALPHA,
    CASES,
    ENCODER_DECODERS,
    SIZES,
    VOCABULARY,
    Case,
    build,
    cast,
    gradients_of,
    loss_by_hand,
    train,
    worst_difference,
)
from torch import Tensor, nn

from rdrop.integrations.requirements import own_loss_is_known
from rdrop.integrations.targets import targets_of
from rdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer

HALF = (torch.bfloat16, torch.float16)
LLAMA = CASES["causal LM, Llama"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def of_family(name: str, head: str = "ForCausalLM", **settings: Any) -> nn.Module:
    sizes = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 16} | TOKENS
    config = getattr(transformers, f"{name}Config")(**(sizes | settings))
    model: nn.Module = getattr(transformers, name + head)(config)
    return model


HEADS_OF_TWO = {"num_key_value_heads": 2, "head_dim": 4}


def gemma() -> nn.Module:
    settings = SIZES | TOKENS | HEADS_OF_TWO
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(vocab_size=VOCABULARY, **settings))


MODERN = {"cls_token_id": 1, "sep_token_id": 1}
LANGUAGE_MODELS: dict[str, Case] = {
    "GPT-2": CASES["causal LM"],
    "Llama": LLAMA,
    "Qwen3": replace(LLAMA, model=lambda: of_family("Qwen3", **HEADS_OF_TWO)),
    "Gemma3": replace(LLAMA, model=gemma),
    "BERT": CASES["masked LM"],
    "ModernBERT": replace(CASES["masked LM"], model=lambda: of_family("ModernBert", "ForMaskedLM", **MODERN)),
    "T5": CASES["sequence to sequence"],
    "BART": CASES["sequence to sequence, BART"],
    "Marian": replace(CASES["sequence to sequence, label smoothing"], label_smoothing=0.0),
}


def one_update(case: Case, dtype: torch.dtype, folder: str, **method: Any) -> Any:
    trainer_class = RDropSeq2SeqTrainer if case.head in ENCODER_DECODERS else RDropTrainer
    batches = [cast(batch, dtype) for batch in case.batches[:1]]
    return train(trainer_class, build(case, dtype=dtype), batches, folder, alpha=ALPHA, **method)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_in_half_precision_has_the_gradient_of_the_loss_by_hand(
    name: str, dtype: torch.dtype, fused: bool, folder: str
) -> None:
    case = LANGUAGE_MODELS[name]
    found = one_update(case, dtype, folder, fused=fused)
    model = build(case, dtype=dtype)
    exact = gradients_by_hand(case, copy.deepcopy(model).double(), torch.float64)
    by_hand = worst_difference(gradients_by_hand(case, model, dtype), exact)
    assert worst_difference(found.gradients[0], exact) < 1.5 * by_hand + torch.finfo(dtype).eps


def gradients_by_hand(case: Case, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    loss, *_ = loss_by_hand(case, model, [cast(batch, dtype) for batch in case.batches[:1]], alpha=ALPHA, passes=2)
    loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.head.startswith(("Bert", "ViT"))])
def test_a_model_of_any_other_head_in_half_precision_trains(name: str, dtype: torch.dtype, folder: str) -> None:
    case = replace(CASES[name], label_smoothing=0.0)
    found = one_update(case, dtype, folder)
    assert all(row["divergence"] > 0 for row in found.state.log_history if "divergence" in row)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_own_loss_of_many_models_and_batches_is_the_known_one(name: str, dtype: torch.dtype) -> None:
    """A tolerance that most of them keep would refuse one model in ten."""
    case = LANGUAGE_MODELS[name]
    for seed in range(10):
        torch.manual_seed(seed)
        model: Any = case.model().to(dtype)
        batch = case.batches[seed % 4]
        own_loss_is_known(model, model(**batch), targets_of(model, batch))


def scaled(model: nn.Module) -> nn.Module:
    """The model, its own loss a twentieth more than the mean of the cross-entropy."""

    def forward(self: Any, **inputs: Any) -> Any:
        output = super(changed, self).forward(**inputs)
        output.loss = None if output.loss is None else 1.05 * output.loss
        return output

    changed = model.__class__ = type("Scaled", (type(model),), {"forward": forward})
    return model


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, False) for name in LANGUAGE_MODELS), ("Llama", True), ("BERT", True), ("T5", True)]
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_another_loss_is_still_refused(name: str, dtype: torch.dtype, fused: bool, folder: str) -> None:
    case = LANGUAGE_MODELS[name]
    with pytest.raises(ValueError, match="Scaled reports a loss of"):
        one_update(replace(case, model=lambda: scaled(case.model())), dtype, folder, fused=fused)
