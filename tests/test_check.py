"""check_rdrop finds every planted fault by name, raises no false alarm, and never changes what it checks."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rdrop.check
from rdrop.check import CheckReport, check_rdrop
from rdrop.check.watch import differ
from rdrop.passes import repeat_batch
from rdrop.terms import symmetric_kl

transformers = pytest.importorskip("transformers")

X = torch.linspace(-1, 1, 5 * 4).view(5, 4)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32}
TINY_SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
TOKENS = {"input_ids": torch.arange(40).view(4, 10), "attention_mask": torch.ones(4, 10, dtype=torch.long)}


def codes(report: CheckReport, severity: str | None = None) -> set[str]:
    return {finding.code for finding in report.findings if severity in (None, finding.severity)}


def mlp(*extra: nn.Module, p: float = 0.2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(p), *extra, nn.Linear(16, 3))


def mlp_with_end(*end: nn.Module) -> nn.Sequential:
    return nn.Sequential(*mlp(), *end)


# ---------------------------------------------------------------------------------------------------- planted faults


class HandMadeSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() / x.exp().sum(-1, keepdim=True)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Reseeding(Wrapper):
    def forward(self, x: Tensor) -> Any:
        torch.manual_seed(0)
        return self.inner(x)


class SharedMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.head(x * self.dropout(torch.ones(1, 4)))


class ForgottenDropout(SharedMask):
    def forward(self, x: Tensor) -> Any:
        return self.head(x)


class ColumnDropout(SharedMask):
    """A dropout that runs, on one row that is expanded to all, with a mask of its own cached for good."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.tensor([0.0, 2.0, 0.0, 2.0])
        self.dropout.forward = lambda x: x * self.mask  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.dropout(x))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, preserve_rng_state: bool) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 16), mlp_block(), nn.Linear(16, 3)
        self.settings = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}

    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self.block, self.stem(x), **self.settings))


def mlp_block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Dropout(0.3))


class RecurrentClassifier(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, num_layers=layers, dropout=0.3 if layers > 1 else 0.0, batch_first=True)
        self.rnn.dropout = 0.3
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x.unsqueeze(1))[0][:, -1])


class Returns(Wrapper):
    """Makes of the logits whatever output the test wants."""

    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(inner)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class AddedNoise(Wrapper):
    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        return logits + torch.randn_like(logits)


def frozen_dropout() -> nn.Module:
    model = mlp(nn.Dropout(0.1))
    model[3].eval()
    return model


def all_dropout_frozen() -> nn.Module:
    model = mlp()
    model[2].eval()
    return model


def mask_at_random(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.rand(logits.shape) < 0.3, -torch.inf)


def nan_weights() -> nn.Module:
    model = mlp()
    nn.init.constant_(model[4].weight if len(model) > 4 else model[3].weight, float("nan"))
    return model


def bert(**kwargs: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, **kwargs)).train()


def checkpointed_bert(**kwargs: Any) -> nn.Module:
    model = bert()
    model.activation_checkpointing_enable(kwargs)
    return model


def checkpoint_wrapped() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(mlp(), preserve_rng_state=False))


def llama_config_changed_too_late() -> nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).train()
    model.config.attention_dropout = 0.1
    return model


def vit(**kwargs: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=2, num_channels=1, num_labels=3, **kwargs)
    return transformers.ViTForImageClassification(config).train()


def bart(**kwargs: Any) -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**TINY_SEQ2SEQ, **kwargs)).train()


PIXELS = {"pixel_values": torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)}
SEQ2SEQ = {**TOKENS, "labels": torch.arange(20).view(4, 5)}

FAULTS: list[tuple[str, str, Callable[[], nn.Module], Any]] = [
    ("no-dropout", "error", lambda: nn.Linear(4, 3), X),
    ("no-dropout", "error", lambda: mlp(p=0.0), X),
    ("no-dropout", "error", all_dropout_frozen, X),
    ("no-dropout", "error", lambda: RecurrentClassifier(layers=1), X),
    ("no-dropout", "error", vit, PIXELS),
    ("no-dropout", "error", llama_config_changed_too_late, TOKENS),
    ("probabilities", "error", lambda: mlp_with_end(nn.Softmax(-1)), X),
    ("probabilities", "error", lambda: mlp_with_end(HandMadeSoftmax()), X),
    ("probabilities", "error", lambda: mlp_with_end(nn.Softmax(0)), X),
    ("probabilities", "error", lambda: mlp_with_end(nn.Softmax(-1), nn.Unflatten(0, (-1, 1)), nn.Flatten(0, 1)), X),
    ("probabilities", "warning", lambda: mlp_with_end(nn.Sigmoid()), X),
    ("probabilities", "warning", lambda: mlp_with_end(nn.Sigmoid(), nn.Unflatten(1, (3, 1))), X),
    ("single-layer-rnn", "warning", lambda: RecurrentClassifier(layers=1), X),
    ("eval-mode", "error", lambda: mlp().eval(), X),
    ("frozen-dropout", "warning", frozen_dropout, X),
    ("identical-passes", "error", ForgottenDropout, X),
    ("identical-passes", "error", ColumnDropout, X),
    ("shared-masks", "error", SharedMask, X),
    ("repeated-masks", "error", lambda: Reseeding(mlp()), X),
    ("batch-norm", "warning", lambda: mlp(nn.BatchNorm1d(16)), X),
    ("layerdrop", "warning", lambda: bart(encoder_layerdrop=0.2), SEQ2SEQ),
    ("checkpoint-rng", "error", lambda: Checkpointed(use_reentrant=True, preserve_rng_state=False), X),
    ("checkpoint-rng", "error", lambda: Checkpointed(use_reentrant=False, preserve_rng_state=False), X),
    ("checkpoint-rng", "error", lambda: checkpointed_bert(use_reentrant=True, preserve_rng_state=False), TOKENS),
    ("checkpoint-rng", "error", lambda: checkpointed_bert(use_reentrant=False, preserve_rng_state=False), TOKENS),
    ("checkpoint-rng", "error", checkpoint_wrapped, X),
    ("non-finite-logits", "error", nan_weights, X),
    ("non-finite-logits", "error", lambda: Returns(mlp(), mask_at_random), X),
    ("forward-failed", "error", mlp, torch.zeros(2, 7)),
    ("batch", "error", mlp, {"x": X, "y": torch.zeros(9)}),
    ("batch", "error", mlp, torch.zeros(0, 4)),
    ("no-logits", "error", lambda: Returns(mlp(), lambda logits: None), X),
    ("rows", "error", lambda: Returns(mlp(), lambda logits: logits[:7]), X),
    ("no-gradient", "error", lambda: Returns(mlp(), Tensor.detach), X),
    ("no-gradient", "error", lambda: mlp().requires_grad_(False), X),
    ("backward-failed", "error", lambda: Returns(mlp(), lambda logits: _Unlearnable.apply(logits)), X),
    ("unknown-randomness", "note", lambda: AddedNoise(nn.Linear(4, 3)), X),
    ("not-tried", "warning", lambda: nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.1)), X),
    ("not-tried", "warning", lambda: mlp().to("meta"), X),
    ("not-tried", "warning", lambda: torch.inference_mode()(mlp)(), X),
]


class _Unlearnable(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, *_gradients: Tensor) -> Any:
        raise RuntimeError("no way back")


@pytest.mark.parametrize(
    ("code", "severity", "build", "batch"), FAULTS, ids=[f"{code}-{number}" for number, (code, *_) in enumerate(FAULTS)]
)
def test_a_planted_fault_is_found_and_named(
    code: str, severity: str, build: Callable[[], nn.Module], batch: Any
) -> None:
    torch.manual_seed(0)
    report = check_rdrop(build(), batch)
    assert code in codes(report, severity), str(report)
    assert report.ok == (not codes(report, "error"))
    other_errors = codes(report, "error") - {code}
    assert not other_errors or severity == "warning", str(report)


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (build, code)
        for code, _, build, _ in FAULTS
        if code in ("no-dropout", "eval-mode", "frozen-dropout", "layerdrop")
    ]
    + [(lambda: checkpointed_bert(preserve_rng_state=False), "checkpoint-rng"), (checkpoint_wrapped, "checkpoint-rng")],
)
def test_without_a_batch_the_model_alone_tells(build: Callable[[], nn.Module], code: str) -> None:
    report = check_rdrop(build())
    assert code in codes(report)
    assert report.divergence is None


def test_a_compiled_model_with_a_memory_budget_is_an_error() -> None:
    import torch._functorch.config as functorch_config

    model = torch.compile(mlp(), backend="eager")
    assert isinstance(model, nn.Module)
    assert check_rdrop(model, X).ok
    with functorch_config.patch(activation_memory_budget=0.5):
        assert codes(check_rdrop(model, X), "error") == {"compile-memory-budget"}
        assert check_rdrop(mlp(), X).ok
    in_place = mlp()
    in_place.compile(backend="eager")
    with functorch_config.patch(activation_memory_budget=0.5):
        assert codes(check_rdrop(in_place), "error") == {"compile-memory-budget"}


def test_checkpointing_without_rng_but_without_dropout_inside_is_no_fault() -> None:
    class OnlyTheStem(Checkpointed):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.block(checkpoint(self.stem, x, **self.settings)))

    assert check_rdrop(OnlyTheStem(use_reentrant=False, preserve_rng_state=False), X).ok


# ----------------------------------------------------------------------------------------------------- what they say


def finding_of(report: CheckReport, code: str) -> Any:
    return next(finding for finding in report.findings if finding.code == code)


def test_a_rate_set_in_the_config_too_late_is_named() -> None:
    finding = finding_of(check_rdrop(llama_config_changed_too_late()), "no-dropout")
    assert "config.attention_dropout=0.1 reached no module" in finding.message
    assert "Set attention_dropout=0.1 in the LlamaConfig before the model is built" in finding.remedy


def test_the_remedy_for_a_vit_names_its_own_settings() -> None:
    remedy = finding_of(check_rdrop(vit()), "no-dropout").remedy
    assert "hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1 in the ViTConfig" in remedy


def test_frozen_modules_are_named() -> None:
    finding = finding_of(check_rdrop(frozen_dropout()), "frozen-dropout")
    assert finding.modules == ("3",)
    assert "3." in finding.message


def test_checkpointed_modules_are_named() -> None:
    report = check_rdrop(Checkpointed(use_reentrant=False, preserve_rng_state=False), X)
    assert "block.1" in finding_of(report, "checkpoint-rng").modules


def test_a_forward_that_fails_says_whether_the_batch_alone_runs() -> None:
    class FixedSize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(5, 2, 2)

    assert "the batch alone runs" in finding_of(check_rdrop(FixedSize(), X), "forward-failed").message
    assert "so did that of the batch alone" in finding_of(check_rdrop(mlp(), X[:, :3]), "forward-failed").message


def test_layerdrop_read_from_the_config_in_every_forward_is_found() -> None:
    config = transformers.Wav2Vec2Config(
        **SIZES,
        vocab_size=8,
        conv_dim=(8,),
        conv_stride=(4,),
        conv_kernel=(4,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.2,
    )
    finding = finding_of(check_rdrop(transformers.Wav2Vec2ForCTC(config).train()), "layerdrop")
    assert finding.modules == ("wav2vec2.encoder",)


# ---------------------------------------------------------------------------------------------------- no false alarm


class LowRankAdapter(nn.Module):
    """LoRA at its start: the up-projection is 0, so dropout before it cannot reach the output yet."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.dropout, self.down, self.up = nn.Dropout(0.2), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.up(self.down(self.dropout(x)))


class SequenceTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.embedding, self.encoder, self.head = nn.Embedding(40, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Any:
        return {"logits": self.head(self.encoder(self.embedding(input_ids)))}


class GradientAtTheInput(nn.Module):
    """Makes its embeddings require gradients by a hook, as for adapters, and then writes into them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(40, 8), nn.Dropout(0.1), nn.Linear(8, 5)
        self.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.embedding(input_ids)
        hidden += 1
        return self.head(self.dropout(hidden))


def zero_head() -> nn.Module:
    model = mlp()
    nn.init.zeros_(model[3].weight)
    return model


def labeled(labels: Any) -> dict[str, Tensor]:
    return {**TOKENS, "labels": torch.as_tensor(labels)}


def build(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        new: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings)).train()
        return new

    return built


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "decoder_start_token_id": 0,
}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 32}
DEBERTA = {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
MARIAN = {**TINY_SEQ2SEQ, "pad_token_id": 0, "decoder_start_token_id": 0}

GOOD: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp-log-softmax": (lambda: mlp_with_end(nn.LogSoftmax(-1)), X),
    "mlp-relu": (lambda: mlp_with_end(nn.ReLU()), X),
    "mlp-sigmoid-inside": (lambda: mlp(nn.Sigmoid()), X),
    "bert-classification": (bert, labeled([0, 1, 1, 0])),
    "bert-regression": (lambda: bert(num_labels=1, problem_type="regression"), labeled([0.5, 1.0, 1.5, 0.0])),
    "bert-multi-label": (
        lambda: bert(num_labels=3, problem_type="multi_label_classification"),
        labeled([[0.0, 1.0, 0.0]] * 4),
    ),
    "bert-token": (
        build("BertForTokenClassification", "BertConfig", **TINY),
        labeled([[0, 1] * 5] * 4),
    ),
    "bert-question": (
        build("BertForQuestionAnswering", "BertConfig", **TINY),
        {**TOKENS, "start_positions": torch.arange(4), "end_positions": torch.arange(4)},
    ),
    "bert-masked-lm": (build("BertForMaskedLM", "BertConfig", **TINY), labeled(TOKENS["input_ids"])),
    "bert-checkpointed": (lambda: checkpointed_bert(use_reentrant=False), TOKENS),
    "bert-checkpointed-reentrant": (lambda: checkpointed_bert(use_reentrant=True), TOKENS),
    "roberta": (build("RobertaForSequenceClassification", "RobertaConfig", **TINY), TOKENS),
    "distilbert": (build("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT), TOKENS),
    "electra": (build("ElectraForSequenceClassification", "ElectraConfig", **TINY, embedding_size=16), TOKENS),
    "deberta-v2": (build("DebertaV2ForSequenceClassification", "DebertaV2Config", **DEBERTA), TOKENS),
    "albert-shared-layers": (
        build("AlbertForSequenceClassification", "AlbertConfig", **TINY, embedding_size=8, hidden_dropout_prob=0.1),
        TOKENS,
    ),
    "bart": (bart, SEQ2SEQ),
    "marian": (build("MarianMTModel", "MarianConfig", **MARIAN), SEQ2SEQ),
    "t5": (build("T5ForConditionalGeneration", "T5Config", **T5), SEQ2SEQ),
    "gpt2": (build("GPT2LMHeadModel", "GPT2Config", **GPT2), labeled(TOKENS["input_ids"])),
    "llama": (build("LlamaForCausalLM", "LlamaConfig", **TINY, attention_dropout=0.1), TOKENS),
    "vit": (lambda: vit(hidden_dropout_prob=0.1), PIXELS),
    "mlp": (mlp, X),
    "mlp-checkpointed": (lambda: Checkpointed(use_reentrant=False, preserve_rng_state=True), X),
    "mlp-checkpointed-reentrant": (lambda: Checkpointed(use_reentrant=True, preserve_rng_state=True), X),
    "mlp-batch-norm": (lambda: mlp(nn.BatchNorm1d(16)), X),
    "mlp-bfloat16": (lambda: mlp().bfloat16(), X.bfloat16()),
    "spectral-norm": (lambda: mlp(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))), X),
    "masked-vocabulary": (lambda: Returns(mlp(), lambda logits: logits.index_fill(1, torch.tensor(0), -torch.inf)), X),
    "lstm": (lambda: RecurrentClassifier(layers=2), X),
    "transformer-encoder": (SequenceTagger, {"input_ids": TOKENS["input_ids"]}),
    "gradient-at-the-input": (GradientAtTheInput, {"input_ids": TOKENS["input_ids"]}),
    "low-rank-adapter": (LowRankAdapter, X),
    "zero-head": (zero_head, X),
    "one-row": (mlp, X[:1]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_model_raises_no_false_alarm(name: str) -> None:
    build_model, batch = GOOD[name]
    torch.manual_seed(0)
    report = check_rdrop(build_model(), batch)
    assert report.ok, str(report)
    expected = {
        "mlp-batch-norm": {"batch-norm"},
        "low-rank-adapter": {"equal-logits"},
        "zero-head": {"equal-logits"},
    }
    assert codes(report) == expected.get(name, set()), str(report)
    if name not in ("low-rank-adapter", "zero-head", "bert-regression"):
        assert report.divergence is not None
        assert report.divergence > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_and_a_dropout_mask_is(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 64).to(dtype)
    assert not differ(x, x * (1 + 2 * torch.finfo(dtype).eps))
    assert differ(x, nn.functional.dropout(x, 0.1))
    masked = x.index_fill(0, torch.tensor([0]), -torch.inf)
    assert not differ(masked, masked.clone())
    assert differ(masked, x)
    assert differ(masked, nn.functional.dropout(masked, 0.1))


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_class_that_is_masked_hides_neither_dropout_nor_its_absence(mask: float) -> None:
    """Beside the mask, of any size, the differences between the passes are small."""

    def masked(model: nn.Module) -> nn.Module:
        return Returns(model, lambda logits: logits.index_fill(1, torch.tensor(0), mask))

    torch.manual_seed(0)
    assert codes(check_rdrop(masked(mlp()), X)) == set()
    assert codes(check_rdrop(masked(Returns(mlp(p=0.0), nn.functional.dropout)), X)) == {"unknown-randomness"}
    assert codes(check_rdrop(masked(mlp(p=0.0)), X), "error") == {"no-dropout"}


@pytest.mark.parametrize(
    "held",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
    ids=["coo", "csr", "nested"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")  # torch's own
def test_a_model_that_holds_a_tensor_which_cannot_be_compared_is_checked(held: Callable[[], Tensor]) -> None:
    model = mlp()
    tensor = model.held = held()
    assert codes(check_rdrop(model, X)) == set()
    assert model.held is tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: (logits.sum(), logits),
        lambda logits: [logits],
        lambda logits: {"loss": logits.sum(), "logits": logits},
        lambda logits: {"scores": logits},
        lambda logits: SimpleNamespace(loss=None, logits=logits),
    ],
    ids=["tensor", "tuple", "list", "logits", "one-entry", "object"],
)
def test_logits_are_found_in_every_kind_of_output(wrap: Callable[[Tensor], Any]) -> None:
    report = check_rdrop(Returns(mlp(), wrap), X)
    assert report.ok, str(report)
    assert report.divergence is not None
    assert report.divergence > 0


def test_the_divergence_is_that_of_the_two_passes() -> None:
    model = mlp()
    torch.manual_seed(3)
    with torch.no_grad():
        expected = symmetric_kl(model(repeat_batch(X)).view(2, 5, 3)).mean()
    torch.manual_seed(3)
    assert check_rdrop(model, X).divergence == pytest.approx(expected.item())


# ------------------------------------------------------------------------------------------------- nothing is changed


class Disturbing(nn.Module):
    """Leaves traces wherever a forward can: buffers, parameters, attributes, hooks, modes, every random state."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail = fail
        self.inner = mlp(nn.BatchNorm1d(16), nn.Dropout(0.1))
        self.inner[5].weight.requires_grad_(False)
        self.inner[4].eval()
        self.register_buffer("steps", torch.zeros(()))
        self.codebook = nn.Parameter(torch.zeros(3))
        self.seen: list[int] = []
        self.plain = torch.zeros(2)
        self.calls = 0
        self.held = {"means": [torch.zeros(2)], "pair": (torch.zeros(2), [0]), "by_layer": defaultdict(list)}
        self.held["itself"] = self.held

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.held["means"][0].add_(1)
        self.held["pair"][0].add_(1)
        self.held["pair"][1].append(1)
        self.held["by_layer"]["inner"].append(x)
        self.plain += 1
        self.calls += 1
        self.seen.append(len(x))
        self.cache = x
        random.random()
        np.random.rand()
        with torch.no_grad():
            self.codebook.add_(1)
        self.inner.zero_grad()
        self.inner[2].eval()
        self.inner[0].weight.requires_grad_(False)
        self.inner[1].register_forward_hook(lambda *_: None)
        logits: Tensor = self.inner(x) + self.codebook
        if self.fail:
            raise RuntimeError("planted")
        return logits


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that must not change, as values that can be compared after the model has run."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    return {
        "tensors": {name: tensor.detach().clone().tolist() for name, tensor in tensors.items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "versions": {name: tensor._version for name, tensor in tensors.items() if name not in ("steps", "codebook")},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grad": {name: (id(tensor.grad), str(tensor.grad)) for name, tensor in tensors.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [list(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in modules.items()
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fail", [False, True], ids=["runs", "raises"])
def test_the_model_and_all_random_states_are_left_as_they_were(fail: bool, training: bool) -> None:
    model = Disturbing(fail)
    model.train(training)
    model.inner[4].eval()
    model.inner[3].weight.grad = torch.full((16,), 7.0)
    before = state_of(model)
    report = check_rdrop(model, X)
    assert ("forward-failed" in codes(report)) == fail
    after = state_of(model)
    for aspect, value in before.items():
        # BatchNorm's buffers are written and written back; their version says so.
        assert after[aspect] == value or aspect == "versions", aspect
    assert model.seen == []
    assert model.calls == 0
    assert model.plain.eq(0).all()
    means, (other, counts), by_layer, itself = model.held.values()
    assert means[0].eq(0).all()
    assert other.eq(0).all()
    assert counts == [0]
    assert by_layer == {}
    assert itself is model.held


def test_nothing_reaches_gradients_gradient_hooks_or_the_batch() -> None:
    model, batch = mlp(), X.clone().requires_grad_()
    stepped = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: stepped.append(1))
        parameter.register_post_accumulate_grad_hook(lambda parameter: stepped.append(1))
    check_rdrop(model, batch)
    assert stepped == []
    assert batch.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_graph_built_before_the_check_still_goes_backward() -> None:
    model = mlp()
    loss = model(X).sum()
    check_rdrop(model, X)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_goes_on_as_if_there_had_been_no_check() -> None:
    def step(checked: bool) -> Tensor:
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(16))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            if checked:
                check_rdrop(model, X)
            model(X).square().sum().backward()
            optimizer.step()
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    assert step(checked=True).equal(step(checked=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_random_state_is_left_as_it_was() -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.get_rng_state()
    assert check_rdrop(mlp().cuda(), X.cuda()).ok
    assert torch.cuda.get_rng_state().equal(before)


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_is_json() -> None:
    report = check_rdrop(mlp(nn.BatchNorm1d(16)), X)
    as_dict = report.as_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["ok"] is True
    assert as_dict["model"] == "Sequential"
    assert as_dict["findings"][0]["code"] == "batch-norm"
    assert as_dict["findings"][0]["modules"] == ["3"]
    assert as_dict["sources"] == [{"module": "2", "attribute": "p", "kind": "dropout", "rate": 0.2, "active": True}]


def test_errors_come_first_and_the_text_is_readable() -> None:
    report = check_rdrop(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), X)
    assert [finding.severity for finding in report.findings] == ["error", "warning"]
    text = str(report)
    assert text.startswith("R-Drop cannot act as it should on Sequential: 1 error, 1 warning\n\nerror: no-dropout\n")
    assert text.endswith(
        "sources     0 of 0 active\ndivergence  0 (symmetric KL of two passes of this batch, in training mode)"
    )
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_report_without_findings_says_so() -> None:
    text = str(check_rdrop(mlp(), X))
    assert text.startswith(
        "R-Drop can act on Sequential: nothing found\n\nsources     1 of 1 active: dropout 0.2 (x1)\n"
    )


def test_wrappers_are_looked_through() -> None:
    report = check_rdrop(nn.DataParallel(mlp()), X)
    assert report.ok
    assert report.model == "Sequential"


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_model_under_ddp_is_checked_and_trains_on() -> None:
    model = nn.parallel.DistributedDataParallel(mlp())
    assert check_rdrop(model, X).ok
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_only_looked_at_and_trains_on() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
    assert codes(check_rdrop(model, X)) == {"not-tried"}
    model(X).sum().backward()


def test_the_page_lists_every_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(rdrop.check.__file__).parent.glob("*.py"))
    emitted = set(re.findall(r'(?:Finding|_Failure)\(\s*"([a-z-]+)"', source))
    page = (Path(__file__).parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
    listed = {code for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for code in re.findall("`(.*?)`", row)}
    assert emitted == listed


# --------------------------------------------------------------------------------------------- masks equal by chance


class DropPath(nn.Module):
    """Leaves out what is inside for a row at a time, as in vision models."""

    def __init__(self, drop_prob: float, *, seeded: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.drop_prob, self.seeded, self.shared = drop_prob, seeded, shared
        self.inside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.seeded:
            torch.manual_seed(3)
        coins = torch.rand(1 if self.shared else len(x), 1) >= self.drop_prob
        return x + self.inside(x) * coins


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_drop_path_in_a_small_batch_is_no_fault(rows: int) -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        report = check_rdrop(nn.Sequential(DropPath(0.1), DropPath(0.1), nn.Linear(6, 3)), torch.randn(rows, 6))
        assert report.findings == (), str(report)


@pytest.mark.parametrize(("fault", "code"), [({"seeded": True}, "repeated-masks"), ({"shared": True}, "shared-masks")])
def test_a_fault_of_drop_path_is_found_in_a_batch_of_one(fault: dict[str, bool], code: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        report = check_rdrop(nn.Sequential(DropPath(0.3, **fault), nn.Linear(6, 3)), torch.randn(1, 6))
        assert codes(report, "error") & {code, "identical-passes"}, str(report)


def test_a_rate_too_low_for_a_batch_is_said_to_be_that() -> None:
    torch.manual_seed(0)
    report = check_rdrop(nn.Sequential(DropPath(1e-5), nn.Linear(6, 3)), torch.randn(1, 6))
    assert report.ok
    assert codes(report, "warning") == {"too-few-rows"}
    assert "this batch of 1 example" in finding_of(report, "too-few-rows").message


class Dropout(nn.Module):
    """As in Keras: the rate is called `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate, self.training)


def test_the_dropout_of_keras_is_known() -> None:
    report = check_rdrop(nn.Sequential(nn.Linear(6, 6), Dropout(0.3), nn.Linear(6, 3)), torch.randn(4, 6))
    assert report.findings == ()
    assert [str(source) for source in report.sources] == ["1.rate=0.3"]
    assert check_rdrop(nn.Sequential(Dropout(0.3))).ok


# ------------------------------------------------------------------------------------------------ remedies by name

SMALL_IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 13}
WITHOUT_DROPOUT = {
    "ConvNext": (
        "ForImageClassification",
        {"num_channels": 1, "patch_size": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
        PIXELS,
    ),
    "Dinov2": ("ForImageClassification", SMALL | SMALL_IMAGES, PIXELS),
    "ViT": ("ForImageClassification", SMALL | SMALL_IMAGES, PIXELS),
    "Phi": ("ForCausalLM", SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}, None),
    "Llama": ("ForCausalLM", SMALL, None),
}
IDS = {"input_ids": torch.arange(1, 13).view(2, 6)}


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_the_remedy_for_a_model_without_dropout_names_its_own_settings_and_works(name: str) -> None:
    head, settings, batch = WITHOUT_DROPOUT[name]

    def build(**rates: float) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**settings, **rates)
        model: nn.Module = getattr(transformers, name + head)(config).train()
        return model

    remedy = finding_of(check_rdrop(build()), "no-dropout").remedy
    named = dict.fromkeys(re.findall(r"(\w+)=0.1", remedy), 0.1)
    assert named
    config = build().config
    assert all(hasattr(config, rate) for rate in named)
    torch.manual_seed(0)
    report = check_rdrop(build(**named), batch or IDS)
    assert report.ok, str(report)


def test_a_model_without_a_rate_is_not_told_to_set_one() -> None:
    sizes = {"num_heads": 2, "head_dim": 8, "n_groups": 1, "state_size": 4, "expand": 2, "chunk_size": 4}
    config = transformers.Mamba2Config(vocab_size=13, hidden_size=8, num_hidden_layers=1, **sizes)
    remedy = finding_of(check_rdrop(transformers.Mamba2ForCausalLM(config).train()), "no-dropout").remedy
    assert remedy.startswith("Mamba2Config has no dropout rate to set. Put an nn.Dropout into the model, or train LoRA")


def test_rates_that_are_in_a_part_of_the_config_are_named_there() -> None:
    class Config:
        model_type = "two"
        text_config = transformers.LlamaConfig(**SMALL)

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).train()
    model.config = Config()
    vars(model.config)["text_config"] = Config.text_config
    remedy = finding_of(check_rdrop(model), "no-dropout").remedy
    assert "Set config.text_config.attention_dropout = 0.1 in the Config and build the model from it" in remedy
