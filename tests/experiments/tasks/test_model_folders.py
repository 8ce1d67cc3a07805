"""Folders of pre-trained models: nothing in them runs a program, and what is broken is one line about model.name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    MarianConfig,
    ViTConfig,
)

from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.pretrained import pretrained_config, pretrained_model

BERT = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
VIT = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
MODELS: dict[str, tuple[Any, Any]] = {
    "text": (AutoModelForSequenceClassification, BERT),
    "image": (AutoModelForImageClassification, VIT),
    "language": (AutoModelForCausalLM, GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)),
    "summary": (
        AutoModelForSeq2SeqLM,
        MarianConfig(
            vocab_size=9,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            pad_token_id=0,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
            eos_token_id=1,
        ),
    ),
}
Write = Callable[..., Path]


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model with further keys in its config.json."""

    def write(kind: str, **changes: object) -> Path:
        model_class, config = MODELS[kind]
        model_class.from_config(config).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path

    return write


def load(kind: str, folder: Path) -> torch.nn.Module:
    model_class = MODELS[kind][0]
    config = pretrained_config(str(folder), model_class, "model of this kind")
    model: torch.nn.Module = pretrained_model(str(folder), model_class, config)
    return model


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels for which transformers was about to go to the hub."""
    names: list[str] = []

    def fetch(name: str, **options: object) -> None:
        names.append(name)
        raise RuntimeError("no kernel")

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    return names


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_that_a_folder_names_is_not_fetched(kind: str, key: str, write: Write, fetched: list[str]) -> None:
    folder = write(kind, **{key: "someone/kernel"})
    with pytest.raises(RuntimeError, match="no kernel"):
        MODELS[kind][0].from_pretrained(folder)
    assert fetched == ["someone/kernel"], "transformers does not fetch it any more: the test shows nothing"
    fetched.clear()
    with pytest.raises(RecipeError, match=f"model.name=.*asks for {key} 'someone/kernel', which may fetch a program"):
        load(kind, folder)
    assert fetched == []
    load(kind, write(kind))  # the remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": {"": "someone/kernel"}},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "paged|someone/kernel"},
        {"_experts_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
        {"per_layer_config": [{"0": {"attn_implementation": "someone/kernel"}}]},
    ],
)
def test_a_kernel_is_found_at_any_depth(changes: dict[str, object], write: Write, fetched: list[str]) -> None:
    with pytest.raises(RecipeError, match="may fetch a program; delete that key"):
        load("text", write("text", **changes))
    assert fetched == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
def test_what_is_part_of_transformers_may_be_asked_for(kind: str, implementation: str | None, write: Write) -> None:
    load(kind, write(kind, _attn_implementation=implementation))


def test_code_in_a_folder_is_not_run(kind: str, write: Write, tmp_path: Path) -> None:
    """Neither for a model that transformers knows, whose own class is taken, nor for another, which is refused."""
    trace = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoTokenizer", MODELS[kind][0].__name__), "code.Evil")
    load(kind, write(kind, auto_map=auto_map))
    with pytest.raises(RecipeError, match=r"model\.name=.*cannot be loaded"):
        load(kind, write(kind, auto_map=auto_map, model_type="evil"))
    assert not trace.exists()


def test_quantized_weights_are_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"model\.name=.*is quantized, and such weights are not trained"):
        load("language", write("language", quantization_config={"quant_method": "mxfp4"}))


def test_an_adapter_beside_the_weights_is_refused(kind: str, write: Write) -> None:
    folder = write(kind)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"model\.name=.*has an adapter .*; merge it .*, or give a folder without"):
        load(kind, folder)
    (folder / "adapter_config.json").unlink()  # the remedy
    load(kind, folder)


def test_a_pointer_in_the_place_of_weights_is_said_to_be_one(kind: str, write: Write) -> None:
    folder = write(kind)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(RecipeError, match=r"; model\.safetensors is a pointer of Git LFS: call `git lfs pull` in that"):
        load(kind, folder)


@pytest.mark.parametrize("number", [1_001, 10**30, 10**400])
def test_layers_without_end_are_refused_before_they_are_built(number: float, kind: str, write: Write) -> None:
    key = {"language": "n_layer", "summary": "decoder_layers"}.get(kind, "num_hidden_layers")
    with pytest.raises(RecipeError, match=rf"asks for {key} 1e\+\d+, and 1000 is the most; get it again"):
        load(kind, write(kind, **{key: number}))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "1", '"x"', "{}", "[" * 10_000, '{"model_type": 5}', '{"model_type": ["bert"]}'),
        *({"hidden_size": value} for value in ("x", None, -1, 10**30, 0.5, [8])),
        *({"num_attention_heads": value} for value in (0, "x", 3)),
        *({"hidden_act": value} for value in ("nope", 7)),
        *({"id2label": value} for value in (5, [1], {"a": "b"})),
        *({"dtype": "nope"}, {"use_return_dict": 5}, {"__class__": "x"}, {"sub_configs": {"x": 1}}),
        *({"initializer_range": "a"}, {"layer_norm_eps": "x"}, {"hidden_dropout_prob": 5}),
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_broken_configuration_is_one_line_about_the_model(content: Any, write: Write) -> None:
    folder = write("text")
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(RecipeError, match=r"^model\.name=.*cannot be loaded \(") as caught:
        load("text", folder)
    assert "\n" not in str(caught.value)


LAYERS = {"text": "num_hidden_layers", "image": "num_hidden_layers", "language": "n_layer", "summary": "encoder_layers"}


def test_layers_that_would_be_left_out_are_counted(kind: str, write: Write) -> None:
    with pytest.raises(RecipeError, match=r"its file has more layers than its config\.json asks for \(1, e\.g\. "):
        load(kind, write(kind, **{LAYERS[kind]: 0}))
