"""The sources of dropout of a model, and running it at another rate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from rdrop.dropout import DropoutSource, dropout_rate, dropout_sources

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
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
TOKENS = {"input_ids": torch.arange(40).view(4, 10)}
SEQ2SEQ_TOKENS = {**TOKENS, "decoder_input_ids": torch.arange(20).view(4, 5)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)}


# -------------------------------------------------------------------------------------------------------- the list


def test_sources_name_module_attribute_kind_and_rate() -> None:
    model = nn.ModuleDict({"drop": nn.Dropout(0.25), "attention": nn.MultiheadAttention(4, 2, dropout=0.5)})
    assert dropout_sources(model) == [
        DropoutSource("drop", "p", "dropout", 0.25, True),
        DropoutSource("attention", "dropout", "dropout", 0.5, True),
    ]
    assert str(dropout_sources(model)[0]) == "drop.p=0.25"
    assert str(dropout_sources(nn.Dropout(0.5))[0]) == "p=0.5"


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.5),
        nn.Dropout1d(0.5),
        nn.Dropout2d(0.5),
        nn.Dropout3d(0.5),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
        nn.MultiheadAttention(2, 1, dropout=0.5),
        nn.LSTM(2, 2, num_layers=2, dropout=0.5),
        nn.GRU(2, 2, num_layers=2, dropout=0.5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_dropout_of_torch_is_a_source_while_it_trains(module: nn.Module) -> None:
    assert [source.active for source in dropout_sources(module.train())] == [True]
    assert [source.active for source in dropout_sources(module.eval())] == [False]


def test_a_rate_of_zero_and_a_single_layer_rnn_are_listed_but_not_active() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        lstm = nn.LSTM(2, 2, dropout=0.5)
    assert [(source.rate, source.active) for source in dropout_sources(lstm)] == [(0.5, False)]
    assert [(source.rate, source.active) for source in dropout_sources(nn.Dropout(0))] == [(0.0, False)]


def test_drop_path_and_layerdrop_are_sources_of_their_own_kind() -> None:
    convnext = transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, drop_path_rate=0.2)
    )
    assert {source.kind for source in dropout_sources(convnext) if source.rate > 0} == {"drop_path"}
    bart = transformers.BartModel(transformers.BartConfig(**TINY_SEQ2SEQ, encoder_layerdrop=0.3))
    assert [(source.module, source.rate) for source in dropout_sources(bart) if source.kind == "layerdrop"] == [
        ("encoder", 0.3),
        ("decoder", 0.0),
    ]


def test_numbers_that_are_no_rates_are_not_sources() -> None:
    module = nn.Linear(2, 2)
    module.token_dropout, module.dropout_samples, module.dropout_scale = True, 5, 1.5  # type: ignore[assignment]
    assert dropout_sources(module) == []


# -------------------------------------------------------------------------------------------------------- the rate


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_zero_to_one_is_an_error(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got p="), dropout_rate(nn.Dropout(0.1), p):
        pass


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Dropout(0.0), nn.Dropout(0.1).eval()])
def test_a_model_in_which_nothing_drops_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no active dropout in .*: call model\.train\(\)"), dropout_rate(model, 0.1):
        pass


def test_rates_come_back_each_its_own_after_an_exception_too() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0), nn.LSTM(2, 2, 2, dropout=0.3))

    def stop() -> None:
        assert [source.rate for source in dropout_sources(model)] == [0.7, 0.0, 0.7]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), dropout_rate(model, 0.7):
        stop()
    assert [source.rate for source in dropout_sources(model)] == [0.1, 0.0, 0.3]


def test_rates_of_nested_blocks_come_back_in_order() -> None:
    model = nn.Dropout(0.1)
    with dropout_rate(model, 0.2):
        with dropout_rate(model, 0.3):
            assert model.p == 0.3
        assert model.p == 0.2
    assert model.p == 0.1


def test_drop_path_and_layerdrop_keep_their_rates() -> None:
    bart = transformers.BartModel(transformers.BartConfig(**TINY_SEQ2SEQ, encoder_layerdrop=0.3)).train()
    with dropout_rate(bart, 0.5):
        assert bart.encoder.layerdrop == 0.3
        assert bart.encoder.dropout == 0.5


def checkpointed_bert() -> nn.Module:
    model = transformers.BertModel(transformers.BertConfig(**TINY)).train()
    model.activation_checkpointing_enable()
    return model


def checkpoint_wrapped() -> nn.Module:
    return checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))


@pytest.mark.parametrize("build", [checkpointed_bert, checkpoint_wrapped])
def test_gradient_checkpointing_is_refused_because_backward_would_recompute_at_another_rate(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    with pytest.raises(ValueError, match="gradient checkpointing is on"), dropout_rate(model, 0.3):
        pass
    with torch.no_grad(), dropout_rate(model, 0.3):
        pass


# --------------------------------------------------------------------------- attention dropout of real models follows


def bert(attention: float, implementation: str) -> nn.Module:
    config = transformers.BertConfig(
        **TINY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=attention,
        attn_implementation=implementation,
    )
    return transformers.BertModel(config)


def bart(attention: float, implementation: str) -> nn.Module:
    config = transformers.BartConfig(
        **TINY_SEQ2SEQ, dropout=0.0, attention_dropout=attention, attn_implementation=implementation
    )
    return transformers.BartModel(config)


def marian(attention: float, implementation: str) -> nn.Module:
    config = transformers.MarianConfig(
        **TINY_SEQ2SEQ,
        dropout=0.0,
        attention_dropout=attention,
        pad_token_id=0,
        decoder_start_token_id=0,
        attn_implementation=implementation,
    )
    return transformers.MarianModel(config)


def vit(attention: float, implementation: str) -> nn.Module:
    config = transformers.ViTConfig(
        **{key: value for key, value in TINY.items() if key != "vocab_size"},
        image_size=8,
        patch_size=2,
        num_channels=1,
        attention_probs_dropout_prob=attention,
        attn_implementation=implementation,
    )
    return transformers.ViTModel(config)


def llama(attention: float, implementation: str) -> nn.Module:
    config = transformers.LlamaConfig(**TINY, attention_dropout=attention, attn_implementation=implementation)
    return transformers.LlamaModel(config)


def gpt2(attention: float, implementation: str) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=40,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=attention,
        attn_implementation=implementation,
    )
    return transformers.GPT2Model(config)


def t5(rate: float, implementation: str) -> nn.Module:
    # T5 has one rate for everything: all but the attention's own is switched off by hand.
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=40,
        dropout_rate=rate,
        attn_implementation=implementation,
    )
    model = transformers.T5Model(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS: list[tuple[Callable[[float, str], nn.Module], dict[str, Tensor]]] = [
    (bert, TOKENS),
    (bart, SEQ2SEQ_TOKENS),
    (marian, SEQ2SEQ_TOKENS),
    (vit, PIXELS),
    (llama, TOKENS),
    (gpt2, TOKENS),
    (t5, SEQ2SEQ_TOKENS),
]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("build", "batch"), MODELS, ids=[build.__name__ for build, _ in MODELS])
def test_attention_dropout_follows_the_rate(
    build: Callable[[float, str], nn.Module], batch: dict[str, Any], implementation: str
) -> None:
    """With attention dropout alone switched on: rate p gives the outputs of a model built with p, bit for bit."""

    def output(model: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        hidden: Tensor = model.train()(**batch).last_hidden_state
        return hidden.detach()

    torch.manual_seed(0)
    model = build(0.1, implementation)
    twin = build(0.4, implementation)
    twin.load_state_dict(model.state_dict())
    assert model.config._attn_implementation == implementation
    own_rate = output(model, 1)
    assert not own_rate.equal(output(model, 2))
    with dropout_rate(model, 0.4):
        assert output(model, 1).equal(output(twin, 1))
        assert not output(model, 1).equal(own_rate)
    with dropout_rate(model, 0.0):
        assert output(model, 1).equal(output(model, 2))
    assert output(model, 1).equal(own_rate)


def test_rates_a_forward_reads_from_the_config_follow_too() -> None:
    class ReadsConfig(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.BertConfig(**TINY, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.0)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            assert self.config.hidden_dropout_prob == 0.0
            return nn.functional.dropout(x, self.config.attention_probs_dropout_prob)

    model = ReadsConfig()
    with dropout_rate(model, 0.0):
        assert model(torch.ones(1000)).eq(1).all()
    assert model.config.attention_probs_dropout_prob == 0.1
