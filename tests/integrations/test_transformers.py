"""What a training step of the Trainer with R-Drop computes: gradients, logs, and when it is plain."""

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_agreement import (
    ALPHA,
    CASES,
    ENCODER_DECODERS,
    VOCABULARY,
    agreement,
    arguments,
    bart_config,
    batches_of,
    bert_classifier,
    bert_config,
    build,
    every_token,
    gpt2_config,
    gradients_of,
    llama_config,
    loss_by_hand,
    only_item,
    train,
    vit_config,
    with_pass_scale,
    worst_difference,
)
from peft import PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BartForSequenceClassification,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Trainer,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)

from rdrop import cross_entropy
from rdrop.integrations.targets import UnknownTargetError
from rdrop.integrations.transformers import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer, Target

CLASSIFY = CASES["sequence classification"]
TAG = CASES["token classification"]
LLAMA = CASES["causal LM, Llama"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


# ------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_an_update_is_the_hand_computed_one(name: str, accumulation: int, folder: str) -> None:
    assert agreement(CASES[name], accumulation, folder=folder) < 1e-12


@pytest.mark.parametrize("name", ["sequence classification", "multi-label", "regression", "causal LM, Llama"])
def test_three_passes_are_compared_pair_by_pair(name: str, folder: str) -> None:
    assert agreement(CASES[name], 4, passes=3, folder=folder) < 1e-12


@pytest.mark.parametrize("name", ["question answering", "causal LM", "image classification"])
def test_float32_agrees_to_its_rounding(name: str, folder: str) -> None:
    assert agreement(CASES[name], 4, dtype=torch.float32, folder=folder) < 1e-5


@pytest.mark.parametrize("name", ["sequence classification", "token classification", "causal LM, Llama"])
def test_bf16_agrees_with_autocast_by_hand(name: str, folder: str) -> None:
    assert agreement(CASES[name], 4, dtype=torch.float32, autocast=True, folder=folder) < 1e-2


def test_a_micro_batch_without_labels_adds_nothing(folder: str) -> None:
    nothing = {**TAG.batches[1], "labels": torch.full_like(TAG.batches[1]["labels"], -100)}
    batches = [TAG.batches[0], nothing]
    for alpha in (0.0, ALPHA):
        trained = train(RDropTrainer, build(TAG), batches, folder, {"gradient_accumulation_steps": 2}, alpha=alpha)
        model = build(TAG)
        loss, *_ = loss_by_hand(TAG, model, [TAG.batches[0]], alpha=alpha, passes=2 if alpha else 1)
        loss.backward()
        assert worst_difference(trained.gradients[0], gradients_of(model)) < 1e-12


class Stream(IterableDataset):
    """Has no length, so the Trainer does not see an epoch's last micro-batch coming."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_what_an_epoch_of_a_stream_leaves_over_is_part_of_the_next_update(alpha: float, folder: str) -> None:
    a, b, c, d = TAG.batches
    settings = {"gradient_accumulation_steps": 3, "max_steps": 3, "learning_rate": 0.0}
    trained = train(RDropTrainer, build(TAG), Stream(TAG.batches), folder, settings, alpha=alpha)
    losses = []
    for found, update in zip(trained.gradients, ([a, b, c], [d, a, b], [c, d, a]), strict=True):
        model = build(TAG)
        loss, *_ = loss_by_hand(TAG, model, update, alpha=alpha, passes=2 if alpha else 1)
        loss.backward()
        losses.append(loss.item())
        assert worst_difference(found, gradients_of(model)) < 1e-12
    assert logged(trained, "loss") == pytest.approx(losses)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_stream_too_short_for_an_update_is_refused(alpha: float, folder: str) -> None:
    settings = {"gradient_accumulation_steps": 3}
    with pytest.raises(ValueError, match=r"has 2 micro-batches, fewer than gradient_accumulation_steps \(=3\)"):
        train(RDropTrainer, build(TAG), Stream(TAG.batches[:2]), folder, settings, alpha=alpha)


def test_gradient_checkpointing_keeps_the_dropout_masks(folder: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = bert_classifier(num_labels=3, hidden_dropout_prob=0.3).double()
        if checkpointing:
            model.activation_checkpointing_enable()
        return train(RDropTrainer, model, CLASSIFY.batches[:1], folder, alpha=ALPHA).gradients[0]

    assert worst_difference(gradients(True), gradients(False)) < 1e-12


def test_gradient_checkpointing_that_loses_the_dropout_masks_is_refused(folder: str) -> None:
    settings = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False},
    }
    model = bert_classifier(num_labels=3, hidden_dropout_prob=0.3).double()
    with pytest.raises(ValueError, match=r"new dropout masks.*bert\.encoder.* Do not pass preserve_rng_state=False"):
        train(RDropTrainer, model, CLASSIFY.batches[:1], folder, settings, alpha=1.0)


def test_a_compiled_model_is_recognized(folder: str) -> None:
    model = build(CLASSIFY)
    compiled = torch.compile(build(CLASSIFY), backend="eager")
    plain = train(RDropTrainer, model, CLASSIFY.batches[:1], folder, alpha=ALPHA)
    trained = train(RDropTrainer, compiled, CLASSIFY.batches[:1], folder, alpha=ALPHA)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in trained.gradients[0].items()}
    assert worst_difference(found, plain.gradients[0]) < 1e-12


# ------------------------------------------------------------------------------------------ plain where it must be


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"causal LM"}))  # GPT-2: the stock Trainer miscounts, see below
def test_alpha_zero_is_the_stock_trainer_bit_for_bit(name: str, folder: str) -> None:
    """With one micro-batch per update, where the stock loss is the mean over the whole update."""
    case = CASES[name]
    stock, ours = (Seq2SeqTrainer, RDropSeq2SeqTrainer) if case.head in ENCODER_DECODERS else (Trainer, RDropTrainer)
    settings = {"max_steps": 3, "label_smoothing_factor": case.label_smoothing}
    torch.manual_seed(0)
    expected = train_stock(stock, build(case), case.batches, folder, settings)
    found = train(ours, build(case), case.batches, folder, settings, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    for own, stock in zip(logged(found, "loss"), logged(expected, "loss"), strict=True):
        # The stock loss of a question answering batch without an end is 0 / 0, which the stock Trainer logs as 0.0.
        assert own == stock or (stock == 0.0 and name == "question answering" and own > 0)


@pytest.mark.parametrize("name", ["causal LM, Llama", "causal LM, label smoothing", "image classification"])
def test_alpha_zero_is_the_stock_trainer_bit_for_bit_if_its_loss_divides_by_the_count(name: str, folder: str) -> None:
    case = CASES[name]
    settings = {"max_steps": 3, "gradient_accumulation_steps": 4, "label_smoothing_factor": case.label_smoothing}
    expected = train_stock(Trainer, build(case), case.batches * 3, folder, settings)
    found = train(RDropTrainer, build(case), case.batches * 3, folder, settings, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    assert logged(found, "loss") == logged(expected, "loss")


def train_stock(
    trainer_class: type, model: nn.Module, batches: list[dict[str, Tensor]], folder: str, settings: Any = None
) -> Any:
    seq2seq = issubclass(trainer_class, Seq2SeqTrainer)
    args = arguments(folder, seq2seq, **(settings or {}))
    trainer = trainer_class(model=model, args=args, train_dataset=batches, data_collator=only_item)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.label_smoothing])
def test_alpha_zero_is_the_plain_mean_over_the_whole_update(name: str, folder: str) -> None:
    case = CASES[name]
    trainer_class = RDropSeq2SeqTrainer if case.head in ENCODER_DECODERS else RDropTrainer
    settings = {"gradient_accumulation_steps": 4}
    trained = train(trainer_class, build(case), case.batches, folder, settings, alpha=0.0)
    model = build(case)
    loss, *_ = loss_by_hand(case, model, case.batches, alpha=0.0, passes=1)
    loss.backward()
    # the language models of transformers compute their own loss in float32
    assert worst_difference(trained.gradients[0], gradients_of(model)) < 1e-6


def test_a_model_that_takes_no_count_of_labels_trains_plainly_too(folder: str) -> None:
    def model() -> nn.Module:
        model = build(CLASSIFY)
        model.accepts_loss_kwargs = False
        return model

    expected = train_stock(Trainer, model(), CLASSIFY.batches, folder, {"max_steps": 3})
    found = train(RDropTrainer, model(), CLASSIFY.batches, folder, {"max_steps": 3}, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    found = train(RDropTrainer, model(), CLASSIFY.batches, folder, {"gradient_accumulation_steps": 4}, alpha=0.0)
    loss, *_ = loss_by_hand(CLASSIFY, by_hand := model(), CLASSIFY.batches, alpha=0.0, passes=1)
    loss.backward()
    assert worst_difference(found.gradients[0], gradients_of(by_hand)) < 1e-12


def pretraining_bert() -> tuple[nn.Module, list[Any]]:
    """Has two losses of its own, of which no list of transformers says more."""
    batch = TAG.batches[0] | {"next_sentence_label": torch.tensor([0, 1])}
    return BertForPreTraining(bert_config()), [batch | {"labels": batch["input_ids"]}] * 4


def detector() -> tuple[nn.Module, list[Any]]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = YolosForObjectDetection(YolosConfig(image_size=[8, 8], patch_size=4, num_detection_tokens=3, **sizes))
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}]
    return model, [{"pixel_values": torch.ones(1, 3, 8, 8), "labels": labels}] * 4


def summed_speech() -> tuple[nn.Module, list[Any]]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    features = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4, "apply_spec_augment": False}
    config = Wav2Vec2Config(**sizes, **features, **positions, layerdrop=0.0, vocab_size=VOCABULARY)
    assert config.ctc_loss_reduction == "sum"
    return Wav2Vec2ForCTC(config), [
        {"input_values": torch.arange(200.0)[None].sin(), "labels": torch.ones(1, 3).long()}
    ] * 4


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("made", [pretraining_bert, detector, summed_speech])
def test_alpha_zero_is_the_stock_trainer_for_models_whose_targets_are_not_known(
    made: Any, accumulation: int, folder: str
) -> None:
    def model_and_batches() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        return made()

    settings = {"max_steps": 2, "gradient_accumulation_steps": accumulation}
    model, batches = model_and_batches()
    expected = train_stock(Trainer, model, batches, folder, settings)
    found = train(RDropTrainer, *model_and_batches(), folder, settings, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    assert logged(found, "loss") == logged(expected, "loss")
    evaluated = [trainer.evaluate(batches[:1])["eval_loss"] for trainer in (found, expected)]
    assert evaluated[0] == evaluated[1]
    with pytest.raises(UnknownTargetError):
        train(RDropTrainer, *model_and_batches(), folder, settings, alpha=1.0)


def test_a_model_that_returns_tuples_trains_plainly_by_the_mean_over_the_update(folder: str) -> None:
    def tuples() -> nn.Module:
        model: Any = build(CLASSIFY)
        model.config.return_dict = False
        return model

    settings = {"gradient_accumulation_steps": 4}
    found = train(RDropTrainer, tuples(), CLASSIFY.batches, folder, settings, alpha=0.0)
    expected = train(RDropTrainer, build(CLASSIFY), CLASSIFY.batches, folder, settings, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    refuses("hides the logits: .*return_dict=False", tuples(), folder)


def test_the_stock_trainer_multiplies_the_accumulated_loss_of_bert_by_the_accumulation(folder: str) -> None:
    """Its forward accepts num_items_in_batch and ignores it. When this fails, the stock Trainer has been mended."""
    settings = {"gradient_accumulation_steps": 4, "learning_rate": 0.0}
    batches = [CLASSIFY.batches[1]] * 4
    stock = train_stock(Trainer, build(CLASSIFY), batches, folder, settings)
    ours = train(RDropTrainer, build(CLASSIFY), batches, folder, settings, alpha=0.0)
    assert logged(stock, "loss")[0] == pytest.approx(4 * logged(ours, "loss")[0])


def test_the_stock_trainer_counts_a_label_of_gpt2_that_nothing_predicts(folder: str) -> None:
    """Position 0 has no logits before it. When this fails, the stock Trainer has been mended."""
    case = CASES["causal LM"]
    batch = case.batches[1]
    stock = train_stock(Trainer, build(case), [batch], folder)
    ours = train(RDropTrainer, build(case), [batch], folder, alpha=0.0)
    counted, predicted = int((batch["labels"] != -100).sum()), int((batch["labels"][:, 1:] != -100).sum())
    assert logged(stock, "loss")[0] * counted == pytest.approx(logged(ours, "loss")[0] * predicted)


def test_a_training_none_of_whose_updates_uses_rdrop_says_so(folder: str) -> None:
    with pytest.warns(UserWarning, match=r"every \(=5\) is more than the number of updates \(=4\): none of them"):
        train(RDropTrainer, build(CLASSIFY), [CLASSIFY.batches[1]] * 4, folder, {"max_steps": 4}, alpha=1.0, every=5)


def test_every_second_update_is_regularized_and_the_others_are_plain(folder: str) -> None:
    batches = [TAG.batches[1]] * 4
    trained = train(
        RDropTrainer, build(TAG), batches, folder, {"max_steps": 4, "learning_rate": 0.0}, alpha=ALPHA, every=2
    )
    for update, gradients in enumerate(trained.gradients, start=1):
        model = build(TAG)
        loss, *_ = loss_by_hand(TAG, model, [batches[0]], alpha=ALPHA, passes=2 if update % 2 == 0 else 1)
        loss.backward()
        assert worst_difference(gradients, gradients_of(model)) < 1e-12


def test_evaluation_and_prediction_are_one_pass_and_the_stock_loss(folder: str) -> None:
    rows = []
    model = build(CLASSIFY)
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    args = arguments(folder, **settings)
    ours = RDropTrainer(
        model=model,
        args=args,
        train_dataset=CLASSIFY.batches[1:2],
        eval_dataset=CLASSIFY.batches[1:2],
        data_collator=only_item,
        alpha=ALPHA,
    )
    ours.train()
    assert rows == [6, 3]
    prediction = ours.predict(CLASSIFY.batches[1:2])
    stock = Trainer(model=model, args=arguments(folder), data_collator=only_item)
    assert prediction.metrics["test_loss"] == stock.predict(CLASSIFY.batches[1:2]).metrics["test_loss"]
    assert prediction.predictions.shape == (3, 3)
    assert all("divergence" not in row for row in ours.state.log_history if "eval_loss" in row)


# ------------------------------------------------------------------------------------------------------- the logs


def test_logged_terms_are_means_over_the_window_and_its_accumulation(folder: str) -> None:
    batches = TAG.batches
    settings = {
        "max_steps": 2,
        "logging_steps": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "train_sampling_strategy": "sequential",
    }
    trained = train(RDropTrainer, build(TAG), batches, folder, settings, alpha=ALPHA)
    by_hand = [loss_by_hand(TAG, build(TAG), half, alpha=ALPHA, passes=2) for half in (batches[:2], batches[2:])]
    for name, values in zip(("loss", "task_loss", "divergence"), zip(*by_hand, strict=True), strict=True):
        assert logged(trained, name) == [pytest.approx(sum(value.item() for value in values) / 2, rel=1e-6)]


def test_divergence_is_the_mean_over_the_regularized_updates_only(folder: str) -> None:
    batches = [TAG.batches[1]] * 4
    settings = {"max_steps": 4, "logging_steps": 4, "learning_rate": 0.0}
    trained = train(RDropTrainer, build(TAG), batches, folder, settings, alpha=ALPHA, every=4)
    _, regularized, divergence = loss_by_hand(TAG, build(TAG), [batches[0]], alpha=ALPHA, passes=2)
    _, plain, _ = loss_by_hand(TAG, build(TAG), [batches[0]], alpha=0.0, passes=1)
    assert logged(trained, "divergence") == [pytest.approx(divergence.item(), rel=1e-6)]
    assert logged(trained, "task_loss") == [pytest.approx((3 * plain + regularized).item() / 4, rel=1e-6)]


def test_plain_training_logs_no_divergence(folder: str) -> None:
    trained = train(RDropTrainer, build(TAG), TAG.batches[:1], folder, alpha=0.0)
    assert logged(trained, "divergence") == []
    assert logged(trained, "task_loss") == pytest.approx(logged(trained, "loss"))


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("every", [1, 2])
def test_resuming_ends_in_the_same_bits(every: int, tmp_path: Any) -> None:
    """Real dropout, the random sampler, accumulation; every=2 resumes in the middle of its period."""

    def trainer() -> RDropTrainer:
        torch.manual_seed(0)
        settings = {
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        return RDropTrainer(
            model=bert_classifier(num_labels=3, hidden_dropout_prob=0.2),
            args=arguments(str(tmp_path), **settings),
            train_dataset=CLASSIFY.batches * 2,
            data_collator=only_item,
            alpha=1.0,
            every=every,
        )

    uninterrupted, resumed = trainer(), trainer()
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(weights_of(resumed.model), weights_of(uninterrupted.model))
    for name in ("loss", "task_loss", "divergence"):
        assert logged(resumed, name) == logged(uninterrupted, name)


def test_a_vit_resumes_to_the_same_bits_if_it_is_built_from_the_checkpoint(tmp_path: Any) -> None:
    """The stock Trainer loads nothing into a class whose weights have other names in files: it only logs that."""
    batches = CASES["image classification"].batches * 2

    def trainer(model: nn.Module) -> RDropTrainer:
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args = arguments(str(tmp_path), **settings)
        return RDropTrainer(model=model, args=args, train_dataset=batches, data_collator=only_item, alpha=1.0)

    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(hidden_dropout_prob=0.2)).double()
    trainer(model).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = ViTForImageClassification.from_pretrained(checkpoint, dtype=torch.float64)
    trainer(resumed).train(resume_from_checkpoint=checkpoint)
    assert same_bits(weights_of(resumed), weights_of(model))


# ----------------------------------------------------------------------------------------------- losses of one's own


CLASS_WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


class WeightedTrainer(RDropTrainer):
    def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
        return [Target(inputs["labels"], class_weight=CLASS_WEIGHT)]


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_class_weights_are_those_of_cross_entropy_over_the_whole_update(alpha: float, folder: str) -> None:
    settings = {"gradient_accumulation_steps": 4}
    trained = train(WeightedTrainer, build(CLASSIFY), CLASSIFY.batches, folder, settings, alpha=alpha)
    model = build(CLASSIFY).train()
    passes = 2 if alpha else 1
    outputs = [model(**{k: torch.cat([v] * passes) for k, v in batch.items()}).logits for batch in CLASSIFY.batches]
    passes_of = [torch.cat(parts) for parts in zip(*[output.chunk(passes) for output in outputs], strict=True)]
    labels = torch.cat([batch["labels"] for batch in CLASSIFY.batches])
    loss = sum(F.cross_entropy(logits, labels, weight=CLASS_WEIGHT) for logits in passes_of) / passes
    if alpha:
        p, q = (logits.log_softmax(-1) for logits in passes_of)
        loss = loss + alpha / 4 * (
            F.kl_div(q, p, log_target=True, reduction="batchmean")
            + F.kl_div(p, q, log_target=True, reduction="batchmean")
        )
    loss.backward()
    assert worst_difference(trained.gradients[0], gradients_of(model)) < 1e-6


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_a_loss_for_compute_loss_func_trains_as_the_task_loss_of_a_target(alpha: float, folder: str) -> None:
    """As the error about `compute_loss_func` says."""

    def trained(task_loss: Any) -> Any:
        class Remedied(RDropTrainer):
            def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
                return [Target(inputs["labels"], task_loss=task_loss)]

        settings = {"gradient_accumulation_steps": 4}
        return train(Remedied, build(CLASSIFY), CLASSIFY.batches, folder, settings, alpha=alpha).gradients[0]

    found = trained(partial(cross_entropy, weight=CLASS_WEIGHT))
    expected = trained(lambda logits, labels: F.cross_entropy(logits, labels, CLASS_WEIGHT, reduction="none"))
    assert worst_difference(found, expected) < 1e-6
    assert worst_difference(trained(cross_entropy), expected) > 1e-2


class WeightedTagger(RDropTrainer):
    def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
        return [Target(inputs["labels"], class_weight=torch.tensor([1.0, 5.0, 0.0]))]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_update_without_labels_adds_nothing_with_class_weights_either(alpha: float, folder: str) -> None:
    nothing = {**TAG.batches[1], "labels": torch.full_like(TAG.batches[1]["labels"], -100)}
    settings = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.warns(UserWarning, match="1 of 2 updates had no label that counts"):
        trained = train(WeightedTagger, build(TAG), [TAG.batches[0], nothing], folder, settings, alpha=alpha)
    assert logged(trained, "loss")[1] == 0
    assert not any(gradient.any() for gradient in trained.gradients[1].values())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_of_weight_zero_leave_the_divergence_and_what_smoothing_gives_to_the_others(
    label_smoothing: float, folder: str
) -> None:
    batch = {**TAG.batches[0], "labels": torch.full_like(TAG.batches[0]["labels"], 2)}
    settings = {"label_smoothing_factor": label_smoothing}
    of_alpha = {
        alpha: train(WeightedTagger, build(TAG), [batch], folder, settings, alpha=alpha) for alpha in (0.0, 1.0)
    }
    plain, divergence = (logged(of_alpha[1.0], name)[0] for name in ("task_loss", "divergence"))
    assert divergence > 0
    assert (plain > 0) == (logged(of_alpha[0.0], "loss")[0] > 0) == (label_smoothing > 0)
    assert logged(of_alpha[1.0], "loss")[0] == pytest.approx(plain + divergence / 2)


class Perceptron(nn.Module):
    """Not a transformers model; no loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(self.dropout(x))}


class PerceptronTrainer(RDropTrainer):
    def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
        return [Target(inputs["labels"])]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_any_model_trains_once_it_says_with_what(alpha: float, folder: str) -> None:
    batches = [{"x": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}]
    trained = train(PerceptronTrainer, Perceptron(), batches, folder, alpha=alpha)
    assert math.isfinite(logged(trained, "task_loss")[0])


class LowRank(nn.Module):
    """A wrapper as LoRA's: the base is frozen, the update starts at zero, and its dropout is the only one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model = base.requires_grad_(False)
        self.config = base.config
        self.lora_dropout = nn.Dropout(0.5)
        self.lora_a = nn.Linear(3, 2, bias=False)
        self.lora_b = nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs: Any) -> Any:
        labels = inputs.get("labels")
        output = self.base_model(**inputs)
        output.logits = output.logits + self.lora_b(self.lora_a(self.lora_dropout(output.logits)))
        output.loss = None if labels is None else F.cross_entropy(output.logits, labels)
        return output


def test_lora_trains_although_its_passes_agree_at_the_first_step(folder: str) -> None:
    model = LowRank(bert_classifier(num_labels=3, hidden_dropout_prob=0.0))
    trained = train(RDropTrainer, model, CLASSIFY.batches, folder, {"max_steps": 3}, alpha=1.0)
    divergences = logged(trained, "divergence")
    assert divergences[0] == 0
    assert divergences[-1] > 0


# ------------------------------------------------------------------------------------------------------- refusals


def refuses(message: str, model: nn.Module, folder: str, **options: Any) -> None:
    batches = options.pop("batches", CLASSIFY.batches)
    trainer_class = options.pop("trainer_class", RDropTrainer)
    settings = options.pop("settings", None)
    with pytest.raises((ValueError, TypeError), match=message):
        train(trainer_class, model, batches, folder, settings, **({"alpha": 1.0} | options))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha": -1.0}, r"alpha \(=-1.0\) must be a finite number >= 0"),
        ({"alpha": float("nan")}, r"alpha \(=nan\)"),
        ({"alpha": None}, r"alpha \(=None\) must be a number >= 0"),
        ({"passes": 1}, r"passes \(=1\) must be an integer >= 2; for plain training set alpha=0"),
        ({"every": 0}, r"every \(=0\) must be an integer >= 1"),
    ],
)
def test_impossible_settings_are_refused(option: dict[str, Any], message: str, folder: str) -> None:
    refuses(message, build(CLASSIFY), folder, **option)


def test_a_model_without_dropout_is_refused_with_the_remedy(folder: str) -> None:
    model = ViTForImageClassification(vit_config()).double()
    batches = CASES["image classification"].batches
    refuses(
        "nothing is random in ViT.*Set hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1 in the ViTConfig",
        model,
        folder,
        batches=batches,
    )
    train(RDropTrainer, model, batches, folder, alpha=0.0)  # as a baseline it is fine


def test_randomness_that_is_no_dropout_module_counts(folder: str) -> None:
    torch.manual_seed(0)
    model = bert_classifier(num_labels=3, hidden_dropout_prob=0.0).double()
    model.classifier.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    assert logged(train(RDropTrainer, model, CLASSIFY.batches, folder, alpha=1.0), "divergence")[0] > 0


def test_a_model_of_unknown_class_is_refused_by_name(folder: str) -> None:
    batches = [{"x": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}]
    refuses("Perceptron is none of the model classes.*override rdrop_targets", Perceptron(), folder, batches=batches)


class WeightedBert(BertForSequenceClassification):
    def forward(self, labels: Tensor, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.loss = F.cross_entropy(output.logits, labels, weight=CLASS_WEIGHT.to(output.logits))
        return output


@pytest.mark.parametrize(("alpha", "accumulation"), [(1.0, 1), (0.0, 4)])
def test_a_model_whose_loss_is_not_that_of_its_class_is_refused(alpha: float, accumulation: int, folder: str) -> None:
    model = with_pass_scale(WeightedBert(bert_config(num_labels=3)))
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
    refuses("WeightedBert reports a loss of .*class weights", model, folder, alpha=alpha, settings=settings)


class UnshiftedGPT2(GPT2LMHeadModel):
    def forward(self, labels: Tensor, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


def test_labels_aligned_otherwise_are_noticed(folder: str) -> None:
    model = with_pass_scale(UnshiftedGPT2(gpt2_config()))
    refuses("UnshiftedGPT2 reports a loss", model, folder, batches=batches_of(every_token))


def with_virtual_tokens(config: PromptLearningConfig) -> nn.Module:
    settings = {"attention_dropout": 0.3, "attn_implementation": "eager"}
    return get_peft_model(LlamaForCausalLM(llama_config(**settings)), config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
def test_prompt_tuning_is_refused_and_prefix_tuning_trains(folder: str) -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    batches = CASES["causal LM, Llama"].batches
    prompt, prefix = (
        with_virtual_tokens(PromptTuningConfig(**options)),
        with_virtual_tokens(PrefixTuningConfig(**options)),
    )
    refuses("Prompt tuning .* puts virtual tokens in front .* take LoRA or prefix", prompt, folder, batches=batches)
    trained = train(RDropTrainer, prefix, batches, folder, alpha=1.0)
    assert logged(trained, "divergence")[0] > 0


def test_compute_loss_func_is_refused(folder: str) -> None:
    refuses("compute_loss_func would be ignored", build(CLASSIFY), folder, compute_loss_func=lambda *args, **kwargs: 0)


class OwnLossTrainer(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class MixedTrainer(RDropMixin, OwnLossTrainer):
    pass


def test_a_trainer_with_a_loss_of_its_own_is_refused(folder: str) -> None:
    refuses(
        "OwnLossTrainer.compute_loss computes a loss of its own", build(CLASSIFY), folder, trainer_class=MixedTrainer
    )


class ForgetfulTrainer(RDropTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


def test_a_subclass_that_bypasses_the_mixin_is_noticed(folder: str) -> None:
    message = "ForgetfulTrainer.compute_loss does not call RDropMixin.compute_loss"
    refuses(message, build(CLASSIFY), folder, trainer_class=ForgetfulTrainer)


class PenaltyTrainer(RDropTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + 1.0


def test_a_subclass_may_add_to_the_loss(folder: str) -> None:
    trained = train(PenaltyTrainer, build(CLASSIFY), CLASSIFY.batches[:1], folder, alpha=1.0)
    without = train(RDropTrainer, build(CLASSIFY), CLASSIFY.batches[:1], folder, alpha=1.0)
    assert logged(trained, "loss")[0] == pytest.approx(logged(without, "loss")[0] + 1.0)


class PartTrainer(RDropTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        term = self.part_of_update(torch.tensor(1.0))
        return (found[0] + term, found[1]) if return_outputs else found + term


@pytest.mark.parametrize(
    ("accumulation", "micro_batches", "alpha"), [(1, 3, 1.0), (4, 1, 1.0), (4, 2, 1.0), (4, 1, 0.0)]
)
def test_what_a_subclass_adds_is_a_mean_over_the_forwards_of_the_update(
    accumulation: int, micro_batches: int, alpha: float, folder: str
) -> None:
    settings = {"gradient_accumulation_steps": accumulation}
    options = {"alpha": alpha, "micro_batches": micro_batches}
    batches = CLASSIFY.batches[:accumulation]
    trained = train(PartTrainer, build(CLASSIFY), batches, folder, settings, **options)
    without = train(RDropTrainer, build(CLASSIFY), batches, folder, settings, **options)
    assert logged(trained, "loss")[0] == pytest.approx(logged(without, "loss")[0] + 1.0)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_a_subclass_adds_is_whole_in_evaluation(accumulation: int, folder: str) -> None:
    settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 0.0, "max_steps": 1}
    losses = []
    for trainer_class in (RDropTrainer, PartTrainer):
        trainer = trainer_class(
            model=build(CLASSIFY),
            args=arguments(folder, **settings),
            train_dataset=CLASSIFY.batches,
            eval_dataset=CLASSIFY.batches[:2],
            data_collator=only_item,
            alpha=1.0,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        assert trainer.evaluate()["eval_loss"] == losses[-1]
    assert losses[1] == pytest.approx(losses[0] + 1.0)


def test_what_ran_before_memory_ended_is_forgotten(folder: str) -> None:
    """auto_find_batch_size begins again, with fewer examples."""
    logs = []
    for fails_at in (None, 3):
        forwards: list[int] = []

        def forward(module: Any, *inputs: Any, forwards: list[int] = forwards, fails_at: int | None = fails_at) -> None:
            forwards.append(1)
            if len(forwards) == fails_at:
                raise RuntimeError("CUDA out of memory. (as a device would say)")

        model = build(CLASSIFY)
        model.register_forward_pre_hook(forward)
        settings = {"gradient_accumulation_steps": 4, "learning_rate": 0.0, "per_device_train_batch_size": 2}
        settings["auto_find_batch_size"] = True
        trained = train(RDropTrainer, model, CLASSIFY.batches[:1] * 8, folder, settings, alpha=1.0)
        logs.append([logged(trained, name)[0] for name in ("loss", "task_loss", "divergence")])
    assert logs[1] == pytest.approx(logs[0])


class CountlessTrainer(RDropTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


class AdversarialTrainer(RDropTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self.compute_loss(model.train(), self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (CountlessTrainer, "compute_loss was called without num_items_in_batch, which an override must hand on"),
        (AdversarialTrainer, "AdversarialTrainer.training_step does not call RDropMixin.training_step"),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_override_that_leaves_out_what_the_loss_needs_is_named(
    trainer_class: Any, message: str, alpha: float, folder: str
) -> None:
    with pytest.raises(TypeError, match=message):
        train(trainer_class, build(CLASSIFY), CLASSIFY.batches[:1], folder, alpha=alpha)


class UnusedDropout(nn.Module):
    """Has dropout, and a forward that does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_dropout_that_never_acts_is_told_after_ten_updates(folder: str) -> None:
    class Classifying(RDropTrainer):
        def rdrop_targets(self, inputs: Any) -> Any:
            return [Target(inputs["labels"])]

    batches = [{"x": torch.randn(4, 4), "labels": torch.arange(4) % 3}] * 12
    for updates, is_told in ((12, True), (8, False)):
        settings = {"max_steps": updates, "logging_steps": 4}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(Classifying, UnusedDropout(), batches, folder, settings, alpha=1.0)
        said = [str(warning.message) for warning in caught if "exactly 0" in str(warning.message)]
        assert len(said) == is_told
        if is_told:
            assert said[0].startswith("the divergence was exactly 0 in all 12 updates: the model has dropout")


@pytest.mark.parametrize("what", ["no logits", "logits without gradient"])
def test_a_fused_loss_that_hides_the_logits_is_refused(what: str, folder: str) -> None:
    def hide(module: nn.Module, inputs: Any, output: Any) -> Any:
        return type(output)(loss=output.loss, logits=None if what == "no logits" else output.logits.detach())

    model = build(LLAMA)
    model.register_forward_hook(hide)
    message = "compares `logits`, and the model's output has none" if what == "no logits" else "carries no gradient"
    refuses(message, model, folder, batches=LLAMA.batches)


def test_label_smoothing_without_class_labels_is_refused(folder: str) -> None:
    case = CASES["question answering"]
    settings = {"label_smoothing_factor": 0.1}
    refuses(
        r"label_smoothing_factor \(=0.1\) is for class labels",
        build(case),
        folder,
        batches=case.batches,
        settings=settings,
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_label_smoothing_without_decoder_inputs_is_refused(alpha: float, folder: str) -> None:
    case = CASES["sequence to sequence, label smoothing"]
    batches = [{k: v for k, v in batch.items() if k != "decoder_input_ids"} for batch in case.batches]
    settings = {"label_smoothing_factor": 0.1}
    message = r"decoder_input_ids.*as DataCollatorForSeq2Seq\(tokenizer, model=model\) does"
    refuses(message, build(case), folder, batches=batches, settings=settings, alpha=alpha)


def m2m_config() -> M2M100Config:
    settings = {name: value for name, value in bart_config().to_dict().items() if name != "model_type"}
    return M2M100Config(**settings)


CANNOT_PREPARE = {
    "M2M100": replace(CASES["sequence to sequence, BART"], model=lambda: M2M100ForConditionalGeneration(m2m_config())),
    "Whisper": CASES["speech to text"],
}


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("name", CANNOT_PREPARE)
def test_a_model_that_cannot_prepare_decoder_inputs_learns_smoothed_labels_as_the_error_says(
    name: str, alpha: float, folder: str
) -> None:
    case, settings = CANNOT_PREPARE[name], {"label_smoothing_factor": 0.1}
    batch = case.batches[0]
    with pytest.raises(ValueError, match="decoder_input_ids") as raised:
        train(RDropSeq2SeqTrainer, build(case), [batch], folder, settings, alpha=alpha)
    assert "DataCollatorForSeq2Seq" not in str(raised.value)
    collated = dict(batch)
    exec("\n".join(re.findall("`(.+?)`", str(raised.value))), {"batch": collated})
    found = train(RDropSeq2SeqTrainer, build(case), [collated], folder, settings, alpha=alpha)
    model = build(case)
    passes = 2 if alpha else 1
    loss, *_ = loss_by_hand(case, model, [batch], alpha=alpha, passes=passes, label_smoothing=0.1)
    loss.backward()
    assert worst_difference(found.gradients[0], gradients_of(model)) < 1e-6
    train(RDropSeq2SeqTrainer, build(case), [batch], folder, {"label_smoothing_factor": 0}, alpha=alpha)


def test_label_smoothing_of_an_encoder_decoder_that_classifies_needs_no_decoder_inputs(folder: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        config = bart_config()
        config.num_labels, config.eos_token_id, config.dropout = 3, 2, 0.1
        return BartForSequenceClassification(config)

    batches = [{"input_ids": torch.tensor([[4, 5, 2], [6, 7, 2]]), "labels": torch.tensor([0, 2])}]
    settings = {"label_smoothing_factor": 0.1}
    expected = train_stock(Trainer, model(), batches, folder, settings)
    found = train(RDropTrainer, model(), batches, folder, settings, alpha=0.0)
    assert same_bits(weights_of(found.model), weights_of(expected.model))
    assert logged(train(RDropTrainer, model(), batches, folder, settings, alpha=1.0), "divergence")[0] > 0


def test_a_batch_without_labels_is_refused(folder: str) -> None:
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in CLASSIFY.batches]
    refuses("R-Drop trains on 'labels', which this batch lacks", build(CLASSIFY), folder, batches=batches)


def classifier(problem_type: str | None, num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return bert_classifier(num_labels=num_labels, hidden_dropout_prob=0.3, problem_type=problem_type)


def with_labels(labels: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(1, 13, (4, 5)), "labels": torch.tensor(labels)}]


ONE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
MULTI_HOT = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]
NAN = float("nan")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "message"),
    [
        (
            ONE,
            3,
            [0.0, 2.0, 1.0, 0.0],
            r"labels \(4,\) of torch.float32, of which example 0 has 0.0, .*from 0 to 2, \(N,\)",
        ),
        (None, 3, [0.0, 2.0, 1.0, 0.0], r"labels \(4,\) of torch.float32.* problem_type=None with num_labels=3"),
        (None, 3, [1, 3, 2, 1], r"labels \(4,\) of torch.int64, of which example 1 has 3, .*whole numbers from 0 to 2"),
        (
            None,
            3,
            MULTI_HOT,
            r"labels \(4, 3\) of torch.int64, of which example 0 has \[1, 0, 1\], .*give .*float 0 or 1",
        ),
        (SEVERAL, 3, MULTI_HOT, r"labels \(4, 3\) of torch.int64, of which example 0 has \[1, 0, 1\], .*float 0 or 1"),
        (SEVERAL, 3, [0, 1, 2, 0], r"labels \(4,\) of torch.int64.*a number from 0 to 1 for each class, \(N, 3\)"),
        (
            SEVERAL,
            3,
            [[0.0, 1, 0], [0, 2, 0], [0, 0, 0], [1, 1, 1]],
            r"example 1 has \[0.0, 2.0, 0.0\].*number from 0 to 1",
        ),
        (
            None,
            3,
            [[0.0, 1, 0], [-1, 1, 0], [0, 0, 0], [1, 1, 1]],
            r"example 1 has \[-1.0, 1.0, 0.0\].*number from 0 to 1",
        ),
        (
            NUMBERS,
            1,
            [0.5, 1.0, NAN, 1.0],
            r"labels \(4,\) of torch.float32, of which example 2 has nan.*numbers, \(N, 1\)",
        ),
        (NUMBERS, 2, [0.5, 1.0, 2.0, 1.0], r"labels \(4,\) of torch.float32.*learns from numbers, \(N, 2\)"),
    ],
)
def test_labels_of_another_kind_are_refused_with_dtype_shape_and_an_example(
    problem_type: str | None, num_labels: int, labels: Any, message: str, alpha: float, folder: str
) -> None:
    model = classifier(problem_type, num_labels)
    refuses(message, model, folder, batches=with_labels(labels), alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_class_is_refused(alpha: float, folder: str) -> None:
    model: Any = classifier(None, 1)
    model.config.problem_type = ONE
    message = r"num_labels \(=1\) .*is a softmax over one class, whose loss is 0 for ever"
    refuses(message, model, folder, batches=with_labels([0, 0, 0, 0]), alpha=alpha)
    tagger = build(TAG)
    tagger.config.num_labels = 1
    refuses(message, tagger, folder, batches=TAG.batches, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (ONE, [0, 2, 1, 0]),  # what the messages above advise
        (SEVERAL, [[1.0, 0.0, 1.0]] * 4),
        (NUMBERS, [[0.5, -100.0, 7.0]] * 4),
        (ONE, [[0], [2], [-100], [1]]),
    ],
)
def test_labels_of_the_right_kind_train(problem_type: str, labels: Any, alpha: float, folder: str) -> None:
    trained = train(RDropTrainer, classifier(problem_type), with_labels(labels), folder, alpha=alpha)
    assert math.isfinite(logged(trained, "task_loss")[0])


def test_tags_that_are_no_classes_are_refused(folder: str) -> None:
    for labels, message in (
        (TAG.batches[0]["labels"].float(), r"labels \(2, 5\) of torch.float32, of which example 0 has"),
        (
            TAG.batches[0]["labels"] + 3,
            r"labels \(2, 5\) of torch.int64, of which example 0 has .*whole numbers from 0 to",
        ),
    ):
        refuses(message, build(TAG), folder, batches=[{**TAG.batches[0], "labels": labels}])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("case", [CASES["causal LM, Llama"], CASES["masked LM"]])
def test_a_token_beyond_the_vocabulary_is_named(case: Any, alpha: float, folder: str) -> None:
    batches = [{**batch, "labels": batch["labels"] + 1000} for batch in case.batches]
    refuses(
        r"from \d+ to 1\d+: one of them is no class of the model", build(case), folder, batches=batches, alpha=alpha
    )


def evaluate(problem_type: str, labels: Any, folder: str) -> dict[str, float]:
    trainer = RDropTrainer(model=classifier(problem_type), args=arguments(folder), data_collator=only_item, alpha=1.0)
    return trainer.evaluate(with_labels(labels))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (ONE, [0, 3, 0, 0], r"labels \(4,\) of torch.int64, of which example 1 has 3, do not fit"),
        (NUMBERS, [[0.5, math.nan, 7.0]] * 4, r"labels \(4, 3\) of torch.float32, of which example 0 has .*nan"),
    ],
)
def test_labels_of_an_evaluation_that_do_not_fit_are_refused(
    problem_type: str, labels: Any, message: str, folder: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(problem_type, labels, folder)


def test_a_batch_of_an_evaluation_without_labels_is_warned_of(folder: str) -> None:
    with pytest.warns(UserWarning, match="a batch of the evaluation has no label that counts: all are -100"):
        assert math.isnan(evaluate(ONE, [-100] * 4, folder)["eval_loss"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool])
def test_classes_of_another_type_are_refused_with_the_one_to_give(dtype: torch.dtype, folder: str) -> None:
    batches = [{**with_labels([0])[0], "labels": torch.tensor([0, 1, 1, 0], dtype=dtype)}]
    message = rf"of {dtype} are not taken for classes .*; give them as torch.long"
    refuses(message, classifier(None), folder, batches=batches)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_without_a_label_that_counts_is_refused(alpha: float, epochs: int, folder: str) -> None:
    batches = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in TAG.batches]
    settings = {"max_steps": -1, "num_train_epochs": epochs}
    refuses(
        "no label in 4 updates counts: all are -100",
        build(TAG),
        folder,
        batches=batches,
        settings=settings,
        alpha=alpha,
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", ["token classification", "causal LM, Llama"])
def test_an_update_without_a_label_that_counts_changes_nothing(name: str, alpha: float, folder: str) -> None:
    case = CASES[name]
    nothing = {**case.batches[1], "labels": torch.full_like(case.batches[1]["labels"], -100)}
    settings = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.warns(UserWarning, match="1 of 2 updates had no label that counts: all were -100"):
        trained = train(RDropTrainer, build(case), [case.batches[0], nothing], folder, settings, alpha=alpha)
    assert logged(trained, "loss")[1] == logged(trained, "task_loss")[1] == 0
    assert not any(gradient.any() for gradient in trained.gradients[1].values())


def test_several_gpus_in_one_process_are_refused(folder: str) -> None:
    args = arguments(folder)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process \(DataParallel\).*torchrun"):
        RDropTrainer(model=build(CLASSIFY), args=args, alpha=1.0)


def test_layerdrop_is_warned_about(folder: str) -> None:
    model = CASES["sequence to sequence, label smoothing"].model()
    model.model.encoder.layerdrop = 0.1
    model.model.encoder.dropout = 0.1
    batches = CASES["sequence to sequence, label smoothing"].batches
    with pytest.warns(UserWarning, match="layerdrop .* drops the same layers in every pass"):
        train(RDropSeq2SeqTrainer, model, batches, folder, alpha=1.0)


def test_a_saved_model_has_nothing_of_ours(tmp_path: Any) -> None:
    model = bert_classifier(num_labels=3, hidden_dropout_prob=0.1)
    names = set(model.state_dict())
    trained = train(RDropTrainer, model, CLASSIFY.batches, str(tmp_path), alpha=1.0)
    trained.save_model(str(tmp_path / "saved"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert set(loaded.state_dict()) == names
    assert same_bits(weights_of(loaded), weights_of(trained.model))


def test_a_second_training_logs_nothing_of_the_first(folder: str) -> None:
    """The first ends with an update after its last log."""
    settings = {"logging_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    first, second = CLASSIFY.batches[:1], CLASSIFY.batches[1:2]
    alone = train(RDropTrainer, build(CLASSIFY), second, folder, settings, alpha=1.0)
    trainer = train(RDropTrainer, build(CLASSIFY), first, folder, settings, alpha=1.0)
    trainer.train_dataset = second
    trainer.train()
    assert logged(trainer, "divergence") == logged(alone, "divergence")
