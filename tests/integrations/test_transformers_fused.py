"""The ways in which a training step of the Trainer computes less, or with less memory: the gradient stays the same."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from gradient_agreement import (
    ALPHA,
    CASES,
    ENCODER_DECODERS,
    Case,
    PassScale,
    arguments,
    bart_config,
    build,
    gpt2_config,
    gradients_of,
    llama_config,
    loss_by_hand,
    marian_config,
    only_item,
    train,
    with_pass_scale,
    worst_difference,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartForConditionalGeneration, GPT2LMHeadModel, LlamaForCausalLM, MarianMTModel

from rdrop import linear_loss as linear
from rdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer, Target

CLASSIFY = CASES["sequence classification"]
LLAMA = CASES["causal LM, Llama"]


def trained(case: Case, folder: str, *, model: nn.Module | None = None, accumulation: int = 4, **method: Any) -> Any:
    """The trainer of a case after one update over its ragged batches."""
    trainer_class = RDropSeq2SeqTrainer if case.head in ENCODER_DECODERS else RDropTrainer
    settings = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": case.label_smoothing}
    settings |= method.pop("settings", {})
    model = build(case, method.get("passes", 2)) if model is None else model
    return train(trainer_class, model, case.batches[:accumulation], folder, settings, alpha=ALPHA, **method)


def gradients_by_hand(case: Case, model: nn.Module, passes: int = 2, accumulation: int = 4) -> dict[str, Tensor]:
    batches = case.batches[:accumulation]
    loss, *_ = loss_by_hand(case, model, batches, alpha=ALPHA, passes=passes, label_smoothing=case.label_smoothing)
    loss.backward()
    return gradients_of(model)


# ------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(
    "name", ["sequence classification", "question answering", "causal LM", "sequence to sequence, label smoothing"]
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(name: str, folder: str) -> None:
    """The batches have 2, 3, 1 and 2 examples of unequal length, so that parts differ in size and in labels."""
    case = CASES[name]
    found = trained(case, folder, micro_batches=2)
    assert worst_difference(found.gradients[0], gradients_by_hand(case, build(case))) < 1e-12


def test_micro_batches_and_passes_are_two_numbers(folder: str) -> None:
    found = trained(CLASSIFY, folder, micro_batches=2, passes=3)
    assert worst_difference(found.gradients[0], gradients_by_hand(CLASSIFY, build(CLASSIFY, 3), passes=3)) < 1e-12


def test_micro_batches_log_the_terms_of_the_whole_batch(folder: str) -> None:
    whole, parts = (trained(CLASSIFY, folder, micro_batches=count).state.log_history[0] for count in (1, 3))
    for name in ("loss", "task_loss", "divergence"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)


def rows_of_every_forward(model: nn.Module) -> list[int]:
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    return rows


def test_a_forward_of_two_micro_batches_is_no_larger_than_the_batch(folder: str) -> None:
    rows = rows_of_every_forward(model := build(CLASSIFY))
    trained(CLASSIFY, folder, model=model, micro_batches=2)
    assert sorted(rows) == [2, 2, 2, 2, 2, 2, 4]  # of 2, 3, 1 and 2 examples, shuffled


@pytest.mark.filterwarnings(r"ignore:every \(=\d\) is more than the number of updates")
def test_plain_steps_are_not_cut(folder: str) -> None:
    rows = rows_of_every_forward(model := build(CLASSIFY))
    trained(CLASSIFY, folder, model=model, micro_batches=2, every=2)
    assert sorted(rows) == [1, 2, 2, 3]


def test_micro_batches_below_one_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"micro_batches \(=0\) must be an integer >= 1"):
        trained(CLASSIFY, folder, micro_batches=0)


# ----------------------------------------------------------------------------------- the loss from hidden states


def with_added_bias(model: Any) -> Any:
    """As pretrained Marian models have it; 13 classes."""
    model.final_logits_bias.copy_(torch.linspace(-1, 1, 13))
    return model


def not_scaled(model: Any) -> Any:
    """As T5 1.1, whose output layer is its own."""
    assert model.config.scale_decoder_outputs
    model.config.scale_decoder_outputs = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


TRANSLATE = CASES["sequence to sequence, label smoothing"]
T5 = CASES["sequence to sequence"]
LANGUAGE_MODELS = {
    name: CASES[name]
    for name in ("causal LM", "causal LM, Llama", "causal LM, label smoothing", "masked LM", "sequence to sequence")
} | {
    "Marian": replace(TRANSLATE, model=lambda: with_added_bias(TRANSLATE.model())),
    "BART": replace(
        T5,
        head="BartForConditionalGeneration",
        model=lambda: with_added_bias(BartForConditionalGeneration(bart_config())),
    ),
    "T5, not scaled": replace(T5, model=lambda: not_scaled(T5.model())),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_gradient_from_hidden_states_is_the_hand_computed_one(name: str, accumulation: int, folder: str) -> None:
    case = LANGUAGE_MODELS[name]
    found = trained(case, folder, accumulation=accumulation, fused=True)
    assert worst_difference(found.gradients[0], gradients_by_hand(case, build(case), accumulation=accumulation)) < 1e-12


@pytest.mark.parametrize("name", ["causal LM", "Marian"])
def test_three_passes_from_hidden_states(name: str, folder: str) -> None:
    case = LANGUAGE_MODELS[name]
    found = trained(case, folder, fused=True, passes=3, micro_batches=2)
    assert worst_difference(found.gradients[0], gradients_by_hand(case, build(case, 3), passes=3)) < 1e-12


@pytest.mark.parametrize("name", ["causal LM, Llama", "Marian", "masked LM"])
def test_float32_from_hidden_states_agrees_to_its_rounding(name: str, folder: str) -> None:
    case = LANGUAGE_MODELS[name]
    found = trained(case, folder, model=build(case, dtype=torch.float32), fused=True)
    by_hand = gradients_by_hand(case, build(case, dtype=torch.float32))
    assert worst_difference(found.gradients[0], by_hand) < 1e-6


def test_under_bf16_autocast_it_is_as_accurate_as_from_logits(folder: str) -> None:
    exact = gradients_by_hand(LLAMA, build(LLAMA))

    def error(fused: bool) -> float:
        model = build(LLAMA, dtype=torch.float32)
        found = trained(LLAMA, folder, model=model, fused=fused, settings={"bf16": True}).gradients[0]
        return worst_difference(found, exact)

    assert 1e-4 < error(fused=True) < 1.2 * error(fused=False)


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_micro_batch_without_labels_adds_nothing(empty_first: bool, folder: str) -> None:
    full = LLAMA.batches[0]
    empty = {**LLAMA.batches[1], "labels": torch.full_like(LLAMA.batches[1]["labels"], -100)}
    settings = {"train_sampling_strategy": "sequential"}
    case = replace(LLAMA, batches=[empty, full] if empty_first else [full, empty])
    found = trained(case, folder, accumulation=2, fused=True, settings=settings)
    assert worst_difference(found.gradients[0], gradients_by_hand(LLAMA, build(LLAMA), accumulation=1)) < 1e-12


def test_class_weights_act_on_hidden_states_too(folder: str) -> None:
    class Weighted(RDropTrainer):
        def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
            (target,) = super().rdrop_targets(inputs)
            return [replace(target, class_weight=torch.linspace(0.2, 3, 13, dtype=torch.float64))]

    fused, unfused = (
        train(Weighted, build(LLAMA), LLAMA.batches[:1], folder, alpha=ALPHA, fused=fused).gradients[0]
        for fused in (True, False)
    )
    assert worst_difference(fused, unfused) < 1e-6


def with_dropout(name: str) -> nn.Module:
    """In float32, at random weights large enough for the passes to differ."""
    torch.manual_seed(0)
    if name == "GPT-2":
        model: Any = GPT2LMHeadModel(gpt2_config(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))
    elif name == "Llama":
        model = LlamaForCausalLM(llama_config(attention_dropout=0.3))
    else:
        model = MarianMTModel(marian_config(dropout=0.2, attention_dropout=0.1))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model.double()


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Marian"])
def test_the_same_seed_draws_the_same_masks_fused_or_not(name: str, folder: str) -> None:
    """Looking at the model before the first step, too, must leave the generators as they were."""
    case = TRANSLATE if name == "Marian" else LLAMA

    def run(fused: bool) -> Any:
        settings = {"max_steps": 2, "gradient_accumulation_steps": 2}
        return trained(case, folder, model=with_dropout(name), fused=fused, settings=settings)

    found, expected = run(True), run(False)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert worst_difference(ours, theirs) < 1e-10
    for name_ in ("loss", "task_loss", "divergence"):
        logs = [[row[name_] for row in t.state.log_history if name_ in row] for t in (found, expected)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return output


@pytest.mark.parametrize("name", ["GPT-2", "Marian"])
def test_a_fused_step_never_has_the_logits(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, rows, length = 2003, 8, 12
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 8 * 2 * 5 * classes})  # five positions at a time
    labels = torch.randint(2, classes, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": labels, "labels": labels}
    torch.manual_seed(0)
    config: Any = gpt2_config(resid_pdrop=0.1) if name == "GPT-2" else marian_config(dropout=0.1)
    config.vocab_size = config.decoder_vocab_size = classes
    model: Any = GPT2LMHeadModel(config) if name == "GPT-2" else MarianMTModel(config)
    elements = {}
    for fused in (True, False):
        trainer = RDropTrainer(
            model=model, args=arguments(folder), train_dataset=[batch], data_collator=only_item, alpha=1.0, fused=fused
        )
        trainer.train()  # looks at the model with one example
        trainer._checks_left = 0
        _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        with LargestTensor() as largest:
            trainer.training_step(trainer.model, batch, counts)
        elements[fused] = largest.elements
    assert elements[False] >= 2 * rows * length * classes
    assert elements[True] <= 2 * 8 * classes  # an embedding of width 8 in its optimizer's dtype, or five positions


# ------------------------------------------------------------------------------------- where it is not, and says so


def why_not_fused(model: nn.Module, case: Case, folder: str, message: str, **options: Any) -> None:
    """It is refused where it is asked for; that automatic training goes on unfused is another test."""
    with pytest.raises(ValueError, match=f"fused=True: the loss of .* cannot be computed.*{message}"):
        trained(case, folder, model=model, fused=True, **options)


def test_a_classifier_has_no_logits_to_leave_out(folder: str) -> None:
    why_not_fused(build(CLASSIFY), CLASSIFY, folder, "it is no language model")


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite"])
def test_logits_that_are_scaled_or_capped_are_noticed(name: str, folder: str) -> None:
    """Gemma 2 caps at 30, which logits of a new model are far from."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_key_value_heads": 2, "head_dim": 4, "vocab_size": 13, "max_position_embeddings": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    own = {"Gemma2": {}, "Cohere": {"logit_scale": 0.5}, "Granite": {"logits_scaling": 4.0}}[name]
    config = getattr(transformers, f"{name}Config")(**(sizes | tokens | own | {"attention_dropout": 0.1}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    why_not_fused(model, LLAMA, folder, "the model scales, caps or rearranges its logits")


class LinearWithLora(nn.Linear):
    pass


def test_an_output_layer_that_is_more_than_linear_is_noticed(folder: str) -> None:
    model: Any = build(LLAMA)
    model.lm_head.__class__ = LinearWithLora
    why_not_fused(model, LLAMA, folder, "the output layer is a [\\w.]*LinearWithLora")


def test_a_hook_on_the_output_layer_is_noticed(folder: str) -> None:
    model: Any = build(LLAMA)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    why_not_fused(model, LLAMA, folder, "the output layer has hooks")


class Doubled(LlamaForCausalLM):
    """Its own loss is twice the mean of the cross-entropy."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


def test_a_loss_that_is_not_that_of_its_class_is_noticed_without_all_logits(folder: str) -> None:
    model = build(replace(LLAMA, model=lambda: Doubled(llama_config())))
    with pytest.raises(ValueError, match="Doubled reports a loss of"):
        trained(LLAMA, folder, model=model, fused=True)


def test_a_model_without_dropout_is_refused_from_hidden_states_too(folder: str) -> None:
    with pytest.raises(ValueError, match="nothing is random in LlamaForCausalLM"):
        trained(LLAMA, folder, model=LlamaForCausalLM(llama_config()), fused=True)


class WithOutputs(RDropTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **rest)
        assert outputs.logits.shape[-1] == 13
        return (loss, outputs) if return_outputs else loss


class WithTerm(RDropTrainer):
    """As the docstring of `part_of_update` shows it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, **rest)
        term = self.part_of_update(torch.tensor(1.0))
        return (found[0] + term, found[1]) if return_outputs else found + term


def test_a_subclass_that_adds_a_term_still_trains_without_logits(folder: str) -> None:
    losses = []
    for trainer_class in (RDropTrainer, WithTerm):
        trainer = train(trainer_class, build(LLAMA), LLAMA.batches[:1], folder, alpha=ALPHA, fused=True)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0] + 1.0)


def test_a_subclass_that_asks_for_the_outputs_gets_them(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 0})  # all logits are large
    train(WithOutputs, build(LLAMA), LLAMA.batches[:1], folder, alpha=ALPHA)
    with pytest.raises(ValueError, match="compute_loss is asked for the outputs too"):
        train(WithOutputs, build(LLAMA), LLAMA.batches[:1], folder, alpha=ALPHA, fused=True)


def projections(model: Any) -> list[int]:
    """How many rows of logits each forward has."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(output.logits.shape[:-1].numel()))
    return rows


def test_large_logits_are_left_out_unless_forbidden_and_small_ones_are_not(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewest(**method: Any) -> int:
        rows = projections(model := build(LLAMA))
        trained(LLAMA, folder, model=model, accumulation=1, **method)
        return min(rows)

    assert fewest() == 2 * 2 * 5
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 0})
    assert fewest() == 1
    assert fewest(fused=False) == 2 * 2 * 5


def test_automatic_training_goes_on_from_logits_where_fused_cannot(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 0})
    model: Any = build(LLAMA)
    model.lm_head.__class__ = LinearWithLora
    found = trained(LLAMA, folder, model=model)
    assert worst_difference(found.gradients[0], gradients_by_hand(LLAMA, build(LLAMA))) < 1e-12


def test_a_model_that_alone_knows_its_decoder_inputs_is_trained_from_logits(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 0})
    case = CASES["sequence to sequence"]
    off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"), 0.0)
    settings = marian_config(decoder_layerdrop=0.0, **off).to_dict()
    config = transformers.M2M100Config(**settings)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return with_pass_scale(transformers.M2M100ForConditionalGeneration(config).double())

    found, expected = (trained(case, folder, model=model(), fused=fused) for fused in (None, False))
    assert worst_difference(found.gradients[0], expected.gradients[0]) < 1e-12
    why_not_fused(model(), case, folder, "has no decoder_input_ids, and the model has no method")


def test_evaluation_and_plain_steps_keep_the_logits(folder: str) -> None:
    model = build(LLAMA)
    rows = projections(model)
    args = arguments(folder, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1, max_steps=2)
    batch = LLAMA.batches[0]
    RDropTrainer(
        model=model,
        args=args,
        train_dataset=[batch] * 2,
        eval_dataset=[batch],
        data_collator=only_item,
        alpha=ALPHA,
        every=2,
        fused=True,
    ).train()
    plain, evaluation, example, probe, fused, again = rows
    assert (plain, evaluation, again) == (10, 10, 10)
    assert (example, probe, fused) == (5, 2, 1)


# -------------------------------------------------------------------------------------- what is around the model


def test_a_compiled_model_is_fused_in_regularized_steps_and_plain_in_others(folder: str) -> None:
    """The compiled forward of the one must not be taken for the other."""
    settings = {"max_steps": 4, "learning_rate": 0.0}
    model = torch.compile(build(LLAMA), backend="eager")
    found = trained(LLAMA, folder, model=model, accumulation=1, fused=True, every=2, settings=settings)
    for gradients, passes, alpha in zip(found.gradients, (1, 2) * 2, (0.0, ALPHA) * 2, strict=True):
        loss, *_ = loss_by_hand(LLAMA, by_hand := build(LLAMA), LLAMA.batches[:1], alpha=alpha, passes=passes)
        loss.backward()
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
        assert worst_difference(gradients, gradients_of(by_hand)) < 1e-6  # Llama's own loss is in float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_goes_with_it(reentrant: bool, folder: str) -> None:
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = trained(TRANSLATE, folder, fused=True, settings=settings)
    assert worst_difference(found.gradients[0], gradients_by_hand(TRANSLATE, build(TRANSLATE))) < 1e-12


class Adapted(nn.Module):
    """A wrapper as LoRA's: the base is frozen but for a layer inside the body."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model, self.config = base, base.config
        base.requires_grad_(False)
        base.get_decoder().layers[0].mlp.requires_grad_(True)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs: Any) -> Any:
        return self.base_model(**inputs)


def test_a_frozen_output_layer_below_lora(folder: str) -> None:
    found = trained(LLAMA, folder, model=Adapted(build(LLAMA)), fused=True)
    by_hand = gradients_by_hand(LLAMA, Adapted(build(LLAMA)))
    assert len(by_hand) == 3
    assert worst_difference(found.gradients[0], by_hand) < 1e-12


def frozen_body() -> Any:
    model = build(LLAMA)
    model.model.requires_grad_(False)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_an_output_layer_on_a_frozen_body(fused: bool, folder: str) -> None:
    found = trained(LLAMA, folder, model=frozen_body(), fused=fused)
    by_hand = gradients_by_hand(LLAMA, frozen_body())
    assert set(by_hand) == {"lm_head.weight"}
    assert worst_difference(found.gradients[0], by_hand) < 1e-12


# -------------------------------------------------------------------------------------- the encoder, run once


class RandomDecoder(NamedTuple):
    """An encoder-decoder whose passes differ in the decoder only, and the rows that its encoder has seen."""

    model: nn.Module
    encoded_rows: list[int]


def random_decoder(case: Case, passes: int = 2) -> RandomDecoder:
    torch.manual_seed(0)
    model: Any = case.model().double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    decoder, encoder = model.get_decoder(), model.get_encoder()
    model.stand_in = PassScale(passes)
    norm = (
        decoder.final_layer_norm if hasattr(decoder, "final_layer_norm") else decoder.layers[0].encoder_attn_layer_norm
    )
    norm.register_forward_hook(lambda module, inputs, output: model.stand_in(output))
    first = next(module for module in encoder.modules() if isinstance(module, nn.Linear))
    rows: list[int] = []
    first.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    return RandomDecoder(model, rows)


@pytest.mark.parametrize("method", [{}, {"fused": True, "micro_batches": 2}, {"passes": 3}], ids=str)
@pytest.mark.parametrize("name", ["Marian", "BART", "sequence to sequence"])
def test_an_encoder_run_once_gives_the_gradient_of_one_run_for_every_pass(
    name: str, method: dict[str, Any], folder: str
) -> None:
    case, passes = LANGUAGE_MODELS[name], method.get("passes", 2)
    found = trained(case, folder, model=random_decoder(case, passes).model, encoder_once=True, **method)
    by_hand = gradients_by_hand(case, random_decoder(case, passes).model, passes=passes)
    # T5 normalizes in float32, so that the sum over passes is rounded there
    assert worst_difference(found.gradients[0], by_hand) < (1e-6 if case.head == T5.head else 1e-12)


def test_an_encoder_without_dropout_runs_once_unasked(folder: str) -> None:
    model, rows = random_decoder(TRANSLATE)
    trained(TRANSLATE, folder, model=model)
    example, *steps = rows
    assert (example, sorted(steps)) == (2, [1, 2, 2, 3])


def test_the_encoder_runs_for_every_pass_if_told_so(folder: str) -> None:
    model, rows = random_decoder(TRANSLATE)
    trained(TRANSLATE, folder, model=model, encoder_once=False)
    assert sorted(rows) == [2, 4, 4, 6]


def test_an_encoder_with_dropout_runs_for_every_pass(folder: str) -> None:
    model, rows = random_decoder(TRANSLATE)
    model.get_encoder().dropout = 0.1
    trained(TRANSLATE, folder, model=model)
    assert sorted(rows) == [2, 4, 4, 6]
    with pytest.raises(ValueError, match=r"encoder_once=True: .*dropout is on in the encoder \(dropout=0.1\)"):
        trained(TRANSLATE, folder, model=model, encoder_once=True)


def test_an_encoder_whose_randomness_is_no_dropout_runs_for_every_pass(folder: str) -> None:
    model = build(TRANSLATE)  # its embeddings differ by pass
    found = trained(TRANSLATE, folder, model=model)
    assert worst_difference(found.gradients[0], gradients_by_hand(TRANSLATE, build(TRANSLATE))) < 1e-12
    with pytest.raises(ValueError, match=r"encoder_once=True: .*something in the encoder is random"):
        trained(TRANSLATE, folder, model=model, encoder_once=True)


def test_a_model_without_encoder_cannot_run_it_once(folder: str) -> None:
    with pytest.raises(ValueError, match=r"encoder_once=True: .*the model is no encoder-decoder of transformers"):
        trained(LLAMA, folder, encoder_once=True)


def test_a_compiled_encoder_runs_once(folder: str) -> None:
    model = torch.compile(random_decoder(TRANSLATE).model, backend="eager")
    found = trained(TRANSLATE, folder, model=model, accumulation=1, encoder_once=True)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.gradients[0].items()}
    by_hand = gradients_by_hand(TRANSLATE, random_decoder(TRANSLATE).model, accumulation=1)
    assert worst_difference(gradients, by_hand) < 1e-12
