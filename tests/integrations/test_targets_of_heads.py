"""Heads whose logits are not the model's output as it stands, or whose task loss is one of a whole example.

Each tiny model's loss is written out by hand. The gradient of a Trainer's update is compared with that of this loss,
and the divergence must be a good part of it.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_agreement import (
    ALPHA,
    NO_DROPOUT,
    PAD,
    SHARE_OF_DIVERGENCE,
    SIZES,
    VOCABULARY,
    PassScale,
    batches_of,
    gradients_of,
    train,
    worst_difference,
)
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ElectraConfig,
    ElectraForPreTraining,
    HubertConfig,
    HubertForCTC,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from rdrop import detached_kl, symmetric_kl
from rdrop.integrations.requirements import own_loss_is_known
from rdrop.integrations.targets import HEADS, OF_THE_MODEL, Target, ctc_target, head_of, targets_of
from rdrop.integrations.transformers import RDropTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*[Bb]atch:UserWarning")  # Segformer's head normalizes over the batch

OFF = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop")
FRAMES = {"conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [4, 2], "feat_extract_norm": "layer"}
SPEECH = {
    **SIZES,
    **dict.fromkeys(OFF, 0.0),
    **FRAMES,
    **dict.fromkeys(("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"), 2),
    "apply_spec_augment": False,
    "do_stable_layer_norm": True,
    "ctc_loss_reduction": "mean",
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
}


def electra() -> nn.Module:
    config = ElectraConfig(vocab_size=VOCABULARY, embedding_size=8, max_position_embeddings=16, **SIZES, **NO_DROPOUT)
    model = ElectraForPreTraining(config)
    return with_stand_in(model, model.electra.embeddings)


def segformer(num_labels: int = 3) -> nn.Module:
    sizes = {"hidden_sizes": [8], "num_attention_heads": [2], "depths": [1], "sr_ratios": [1], "strides": [2]}
    rest = {"patch_sizes": [3], "mlp_ratios": [2], "num_encoder_blocks": 1, "decoder_hidden_size": 8}
    off = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    config = SegformerConfig(num_channels=1, num_labels=num_labels, **sizes, **rest, **off)
    model = SegformerForSemanticSegmentation(config)
    return with_stand_in(model, model.decode_head.linear_projections[0])


def wav2vec2(**settings: Any) -> nn.Module:
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH | settings))
    return with_stand_in(model, model.wav2vec2.feature_projection.projection)


def hubert() -> nn.Module:
    model = HubertForCTC(HubertConfig(**SPEECH))
    return with_stand_in(model, model.hubert.feature_projection.projection)


def with_stand_in(model: nn.Module, module: nn.Module) -> nn.Module:
    model.stand_in = PassScale(2)
    stand_in = [model.stand_in]  # in a list, so that the module is no part of itself
    module.register_forward_hook(lambda module, inputs, output: stand_in[0](output))
    return model


def some_replaced(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randint(0, 2, batch["input_ids"].shape, generator=generator)}


def images_with_maps(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    n = len(batch["input_ids"])
    labels = torch.randint(0, 3, (n, 9, 11), generator=generator)
    labels[:, 2] = 255
    return {"pixel_values": torch.randn(n, 1, 12, 12, generator=generator, dtype=torch.float64), "labels": labels}


def images_with_masks(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    images = images_with_maps(generator, batch)
    labels = images["labels"]
    labels[:, :, 4] = -1
    return images | {"labels": torch.where((labels >= 0) & (labels != 255), labels.clamp(max=1), labels)}


def sounds(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    lengths = 40 + 10 * batch["attention_mask"].sum(1)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    sound = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, :3]
    return {"input_values": sound, "attention_mask": mask, "labels": labels}


# ---------------------------------------------------------------------------------- sums and divisors, written by hand

Sums = tuple[Tensor, int, Tensor, int]
"""The task loss of one pass, summed, and what divides it; the divergence, summed, and what divides that."""


def of_pairs(logs: Tensor) -> Tensor:
    """`(m, ..., V)` log-probabilities to the symmetric KL, mean over the pairs of passes."""
    both = [(a.exp() - b.exp()) * (a - b) for a, b in combinations(logs, 2)]
    return torch.stack(both).mean(0).sum(-1) / 2


def electra_by_hand(model: Any, output: Any, batch: dict[str, Tensor], passes: int) -> Sums:
    shown = batch["attention_mask"] == 1
    logits = torch.stack([part[shown] for part in output.logits.chunk(passes)])
    labels = batch["labels"][shown].to(logits).expand_as(logits)
    task = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / passes
    apart = of_pairs(torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1))
    return task, int(shown.sum()), apart.sum(), int(shown.sum())


def segformer_by_hand(model: Any, output: Any, batch: dict[str, Tensor], passes: int) -> Sums:
    wide = F.interpolate(output.logits, size=(9, 11), mode="bilinear", align_corners=False)
    labels = batch["labels"]
    task = F.cross_entropy(wide, labels.repeat(passes, 1, 1), ignore_index=255, reduction="sum") / passes
    apart = of_pairs(torch.stack(wide.log_softmax(1).movedim(1, -1).chunk(passes)))[labels != 255]
    return task, len(apart), apart.sum(), len(apart)


def binary_segformer_by_hand(model: Any, output: Any, batch: dict[str, Tensor], passes: int) -> Sums:
    """The task loss is divided by all pixels, the divergence by those that count."""
    wide = F.interpolate(output.logits, size=(9, 11), mode="bilinear", align_corners=False).squeeze(1)
    labels = batch["labels"]
    counted = (labels >= 0) & (labels != 255)
    logits = torch.stack([part[counted] for part in wide.chunk(passes)])
    yes = labels[counted].to(logits).expand_as(logits)
    task = F.binary_cross_entropy_with_logits(logits, yes, reduction="sum") / passes
    apart = of_pairs(torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1))
    return task, labels.numel(), apart.sum(), int(counted.sum())


def of_fixed_pairs(logs: Tensor) -> Tensor:
    """The same of two passes, the target of each direction held fixed."""
    a, b = logs
    fixed_a, fixed_b = logs.detach()
    return (fixed_a.exp() * (fixed_a - b) + fixed_b.exp() * (fixed_b - a)).sum(-1) / 2


def ctc_by_hand(
    model: Any, output: Any, batch: dict[str, Tensor], passes: int, of_pairs: Callable[[Tensor], Tensor] = of_pairs
) -> Sums:
    lengths = [((n - 4) // 4 + 1 - 3) // 2 + 1 for n in batch["attention_mask"].sum(1).tolist()]
    task, apart = torch.zeros(()), torch.zeros(())
    for row, length in enumerate(lengths):
        transcript = batch["labels"][row][batch["labels"][row] >= 0]
        logs = torch.stack([part[row, :length].log_softmax(-1) for part in output.logits.chunk(passes)])
        for one in logs:
            own = F.ctc_loss(one, transcript, torch.tensor(length), torch.tensor(len(transcript)), reduction="none")
            task = task + own / len(transcript) / passes
        apart = apart + of_pairs(logs).sum()
    return task, len(lengths), apart, sum(lengths)


HeadCase = tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]], Callable[..., Sums]]
CASES: dict[str, HeadCase] = {
    "replaced-token detection": (electra, some_replaced, electra_by_hand),
    "segmentation": (segformer, images_with_maps, segformer_by_hand),
    "segmentation, yes or no": (partial(segformer, 1), images_with_masks, binary_segformer_by_hand),
    "CTC, wav2vec 2": (wav2vec2, sounds, ctc_by_hand),
    "CTC, HuBERT": (hubert, sounds, ctc_by_hand),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


def loss_by_hand(
    by_hand: Any, model: nn.Module, batches: list[dict[str, Tensor]], passes: int = 2, alpha: float = ALPHA
) -> Tensor:
    model.train()
    sums: list[Any] = [0, 0, 0, 0]
    for batch in batches:
        output = model(**{key: torch.cat([value] * passes) for key, value in batch.items()})
        sums = [total + own for total, own in zip(sums, by_hand(model, output, batch, passes), strict=True)]
    task_loss, divergence = sums[0] / sums[1], sums[2] / sums[3]
    loss = task_loss + alpha / 2 * divergence
    assert alpha / 2 * divergence > SHARE_OF_DIVERGENCE * loss, (task_loss.item(), divergence.item())
    return loss


@pytest.mark.parametrize("name", CASES)
def test_an_update_has_the_gradient_of_the_loss_by_hand(name: str, tmp_path: Any) -> None:
    make, add_labels, by_hand = CASES[name]
    batches = batches_of(add_labels)[:2]
    trained = train(RDropTrainer, build(make), batches, str(tmp_path), {"gradient_accumulation_steps": 2}, alpha=ALPHA)
    model = build(make)
    loss = loss_by_hand(by_hand, model, batches)
    loss.backward()
    assert worst_difference(trained.gradients[0], gradients_of(model)) < 1e-9
    logged = next(row for row in trained.state.log_history if "divergence" in row)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert ALPHA / 2 * logged["divergence"] > SHARE_OF_DIVERGENCE * logged["loss"]


@pytest.mark.parametrize("name", CASES)
def test_the_models_own_loss_is_the_one_that_its_targets_predict(name: str) -> None:
    make, add_labels, _ = CASES[name]
    model, batch = build(make).eval(), batches_of(add_labels)[0]
    assert head_of(model) in {**HEADS, **OF_THE_MODEL}
    targets = targets_of(model, batch)
    assert own_loss_is_known(model, model(**batch), targets)
    plain = sum(target.plain_loss(target.logits(model(**batch))) / target.count()[1] for target in targets)
    torch.testing.assert_close(plain, model(**batch).loss.double(), rtol=1e-5, atol=1e-6)
    assert not any(target.is_one_softmax for target in targets)


@pytest.mark.parametrize("name", ["segmentation", "segmentation, yes or no"])
def test_segmentation_at_alpha_zero_and_in_evaluation_is_the_stock_trainers(name: str, tmp_path: Any) -> None:
    make, add_labels, _ = CASES[name]
    batches = batches_of(add_labels)[:2]
    settings = {"max_steps": 2, "per_device_eval_batch_size": 1}
    ours = train(RDropTrainer, build(make), batches, str(tmp_path), settings, alpha=0.0)
    stock = train(Trainer, build(make), batches, str(tmp_path), settings)
    assert all(map(torch.equal, ours.model.parameters(), stock.model.parameters()))
    evaluated = [trainer.evaluate(batches)["eval_loss"] for trainer in (ours, stock)]
    assert evaluated[0] == evaluated[1]


def test_label_smoothing_of_yes_or_no_per_pixel_is_refused(tmp_path: Any) -> None:
    make, add_labels, _ = CASES["segmentation, yes or no"]
    settings = {"label_smoothing_factor": 0.1}
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"label_smoothing_factor \(=0.1\) is for class labels"):
            train(RDropTrainer, build(make), batches_of(add_labels)[:1], str(tmp_path), settings, alpha=alpha)


def test_two_views_of_one_sound_are_what_specaugment_hides_of_it() -> None:
    views = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH | views)).train()
    batch = {key: torch.cat([value.float() if key == "input_values" else value] * 2) for key, value in sound().items()}
    first, second = model(**batch).logits.chunk(2)
    assert not torch.allclose(first, second)


def sound() -> dict[str, Tensor]:
    return batches_of(sounds)[0]


def test_of_ctc_with_fixed_targets_only_the_gradient_differs() -> None:
    logits = torch.randn(4, 6, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = ctc_target(torch.tensor([[3, 4, 4], [5, -100, -100]]), torch.tensor([6, 4]), 6, blank=PAD)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    free, fixed = (
        replace(target, divergence=divergence).rdrop_loss(leaf, alpha=2.0)
        for divergence, leaf in zip((symmetric_kl, detached_kl), leaves, strict=True)
    )
    assert free == fixed
    first, second = leaves[1].log_softmax(-1).chunk(2)
    kls = (first.exp().detach() * (first.detach() - second)) + (second.exp().detach() * (second.detach() - first))
    counted = target.labels != -100
    expected = (fixed.loss - fixed.task_loss).detach()
    torch.testing.assert_close(kls.sum(-1)[counted].mean() / 2, expected)
    of_kl, of_both = (torch.autograd.grad(loss, leaves[1])[0] for loss in (kls.sum(-1)[counted].mean() / 2, fixed.loss))
    (of_task,) = torch.autograd.grad(replace(target).rdrop_loss(leaves[0], alpha=0.0).loss, leaves[0])
    torch.testing.assert_close(of_both, of_task + of_kl)


class ConsistentCTC(RDropTrainer):
    """As docs/transformers.md has it."""

    def rdrop_targets(self, inputs: Any) -> Any:
        return [replace(target, divergence=detached_kl) for target in super().rdrop_targets(inputs)]


def test_ctc_with_fixed_targets_and_a_rising_alpha_has_the_gradient_by_hand(tmp_path: Any) -> None:
    batches = batches_of(sounds)[:2]
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2}
    method = {"alpha": ALPHA, "alpha_schedule": "linear"}
    trained = train(ConsistentCTC, build(wav2vec2), batches, str(tmp_path), settings, **method)
    model = build(wav2vec2)
    loss_by_hand(partial(ctc_by_hand, of_pairs=of_fixed_pairs), model, batches, alpha=ALPHA / 2).backward()
    assert worst_difference(trained.gradients[0], gradients_of(model)) < 1e-9


def test_what_cannot_be_exact_is_refused_with_the_remedy() -> None:
    for model, batch, message in (
        (wav2vec2(ctc_loss_reduction="sum"), sound(), "set model.config.ctc_loss_reduction = 'mean'"),
        (
            segformer(),
            {"labels": torch.zeros(2, 4, 4, dtype=torch.long)},
            "use_auxiliary_head .=True. adds the loss of",
        ),
        (segformer(), {}, "R-Drop trains on 'labels', which this batch lacks"),
    ):
        model.config.use_auxiliary_head = bool(batch)
        with pytest.raises(ValueError, match=message):
            targets_of(model, batch)


def test_detection_is_refused_with_the_reason() -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        model = DetrForObjectDetection.__new__(DetrForObjectDetection)
    nn.Module.__init__(model)
    model.config = DetrConfig()
    with pytest.raises(
        ValueError, match=r"DetrForObjectDetection assigns its predictions .* anew in every pass.*alpha=0"
    ):
        targets_of(model, {})


def test_a_loss_per_example_is_no_softmax_and_needs_its_own_divisor() -> None:
    target = ctc_target(torch.tensor([[3, 4], [5, -1]]), torch.tensor([6, 4]), 6, blank=PAD)
    assert target.count().tolist() == [10, 2]
    assert not target.is_one_softmax
    assert not Target(torch.zeros(2, dtype=torch.long), transform=torch.flatten).is_one_softmax
