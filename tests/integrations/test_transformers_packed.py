"""Packed rows, which hold several sequences: R-Drop has the gradient of every sequence run alone."""

import re
from typing import Any

import pytest
import torch
from gradient_agreement import (
    ALPHA,
    CASES,
    VOCABULARY,
    PassScaleOfRows,
    arguments,
    build,
    gpt2_config,
    gradients_of,
    llama_config,
    loss_by_hand,
    only_item,
    train,
    worst_difference,
)
from torch import Tensor
from transformers import BertForMaskedLM, DataCollatorWithFlattening, GPT2LMHeadModel, LlamaForCausalLM, Trainer

from rdrop.integrations.transformers import RDropTrainer
from rdrop.integrations.transformers.packed import cut_packed

LLAMA = CASES["causal LM, Llama"]
LENGTHS = (5, 3, 2, 6, 4)


def sequences() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": some} for some in ids]


def packed_row(start: int = 0, stop: int = len(LENGTHS)) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return dict(collator(sequences()[start:stop], return_tensors="pt"))


def two_rows() -> list[dict[str, Any]]:
    return [packed_row(0, 2), packed_row(2)]


def alone() -> list[dict[str, Tensor]]:
    """Every sequence as a batch of its own."""
    ids = [torch.tensor([one["input_ids"]]) for one in sequences()]
    return [{"input_ids": some, "labels": some, "attention_mask": torch.ones_like(some)} for some in ids]


def model_of(model_class: Any, config: Any, passes: int = 2) -> Any:
    torch.manual_seed(0)
    model = model_class(config).double()
    stand_in = model.stand_in = PassScaleOfRows(passes)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: stand_in(output))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


def llama(passes: int = 2) -> Any:
    return model_of(LlamaForCausalLM, llama_config(), passes)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ({}, {}),
        ({"fused": True}, {}),
        ({"passes": 3}, {}),
        ({"micro_batches": 2}, {}),
        ({"micro_batches": 9, "fused": True}, {}),
        ({"fused": True}, {"label_smoothing_factor": 0.1}),
    ],
)
def test_a_packed_row_has_the_gradient_of_its_sequences(method: Any, settings: Any, folder: str) -> None:
    passes = method.get("passes", 2)
    found = train(RDropTrainer, llama(passes), [packed_row()], folder, settings, alpha=ALPHA, **method)
    model, smoothing = llama(passes), settings.get("label_smoothing_factor", 0.0)
    loss, *_ = loss_by_hand(LLAMA, model, alone(), alpha=ALPHA, passes=passes, label_smoothing=smoothing)
    loss.backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-12


def test_packed_rows_of_an_update_have_the_gradient_of_all_their_sequences(folder: str) -> None:
    """Two accumulation steps, of 2 and of 3 sequences."""
    settings = {"gradient_accumulation_steps": 2}
    found = train(RDropTrainer, llama(), two_rows(), folder, settings, alpha=ALPHA)
    model = llama()
    loss_by_hand(LLAMA, model, alone(), alpha=ALPHA, passes=2)[0].backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-12


def with_dropout() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(attention_dropout=0.3, attn_implementation="eager"))


def same_weights(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_at_alpha_zero_packed_rows_are_those_of_the_stock_trainer_to_the_bit(folder: str) -> None:
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2}
    stock = train(Trainer, with_dropout(), two_rows() * 2, folder, settings)
    ours = train(RDropTrainer, with_dropout(), two_rows() * 2, folder, settings, alpha=0.0)
    assert same_weights(ours.model, stock.model)


def test_packed_rows_are_evaluated_by_the_stock_trainer(folder: str) -> None:
    options = {"args": arguments(folder, per_device_eval_batch_size=1), "data_collator": only_item}
    options |= {"model": with_dropout(), "eval_dataset": two_rows()}
    assert RDropTrainer(alpha=1.0, **options).evaluate()["eval_loss"] == Trainer(**options).evaluate()["eval_loss"]


def test_training_on_packed_rows_resumes_to_the_same_bits(folder: str) -> None:
    def trainer() -> RDropTrainer:
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        options = {"train_dataset": two_rows(), "data_collator": only_item}
        return RDropTrainer(model=with_dropout(), args=arguments(folder, **settings), alpha=5.0, **options)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert same_weights(resumed.model, whole.model)


def test_packed_rows_are_cut_between_sequences_into_parts_of_like_length() -> None:
    row = packed_row()
    for parts, lengths in ((1, [20]), (2, [10, 10]), (3, [8, 8, 4]), (9, list(LENGTHS))):
        cut = cut_packed(row, parts)
        assert [part["input_ids"].shape[1] for part in cut] == lengths
        assert torch.equal(torch.cat([part["labels"] for part in cut], 1), row["labels"])
        for part in cut:
            begins = (part["position_ids"][0] == 0).nonzero().flatten()
            assert part["cu_seq_lens_q"].tolist() == [*begins.tolist(), part["input_ids"].shape[1]]
            assert part["seq_idx"][0, begins].tolist() == list(range(len(begins)))


def refuses(message: str, model: Any, row: dict[str, Any], folder: str, **method: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(RDropTrainer, model, [row], folder, alpha=1.0, **method)


def test_a_model_whose_sequences_see_each_other_is_refused_and_is_as_it_was(folder: str) -> None:
    """BERT attends to the whole row."""
    row = packed_row()
    model = build(CASES["masked LM"])
    refuses("BertForMaskedLM does not keep the sequences of a packed row apart", model, row, folder)
    assert isinstance(model, BertForMaskedLM)
    assert all(module.training for module in model.modules())


def test_a_learned_position_embedding_is_no_hindrance(folder: str) -> None:
    def gpt2() -> Any:
        return model_of(GPT2LMHeadModel, gpt2_config())

    found = train(RDropTrainer, gpt2(), [packed_row()], folder, alpha=ALPHA)
    model = gpt2()
    loss_by_hand(CASES["causal LM"], model, alone(), alpha=ALPHA, passes=2)[0].backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-12


def test_batches_that_are_packed_wrongly_are_refused(folder: str) -> None:
    several = {**LLAMA.batches[0], "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    refuses(
        "the batch has cu_seq_lens_q, by which the sequences of one row are found, and 2 rows", llama(), several, folder
    )
    counted = packed_row()
    counted["labels"][0, 10] = 3
    refuses("labels[..., 10] of a packed row counts", llama(), counted, folder, micro_batches=2)
    mask = packed_row() | {"attention_mask": torch.ones(1, 1, 20, 20)}
    refuses("batch['attention_mask'] (1, 1, 20, 20) of a packed row has no dimension", llama(), mask, folder)


def test_rows_packed_by_position_alone_are_rows_as_any_other_without_flash_attention(folder: str) -> None:
    """transformers masks by position then, and a repeated row is a row as the first."""
    row = dict(DataCollatorWithFlattening()(sequences(), return_tensors="pt"))
    found = train(RDropTrainer, llama(), [row], folder, alpha=ALPHA, fused=True)
    model = llama()
    loss_by_hand(LLAMA, model, alone(), alpha=ALPHA, passes=2)[0].backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-12
