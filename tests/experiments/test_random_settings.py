"""Settings and recipe files at random: a recipe with exactly what was given, or one line that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tests.outcomes import in_parts

from rdrop.alpha import AUTO_ALPHA
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import RECIPES, load_recipe
from rdrop.experiments.run_folder import saved

SOME_OR_5_000 = [(100, 0), *in_parts(5_000)]

NUMBERS = st.one_of(
    st.integers(-2, 12), st.integers(), st.floats(), st.floats(0, 1), st.sampled_from([10**9, 10**30, 10**4_000, 2**32])
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=2),
    max_leaves=4,
)
WORDS = st.sampled_from(
    [
        *("auto", "linear", "cosine", "inverse-sqrt", "token", "span", "all", "first", "each", "fp32", "bf16", "adamw"),
        *(".5", "1.", "1_000", "0x10", "+3", "\u0663", "True", "None", "nan", "1e400", "9" * 5_000, "[" * 5_000, ""),
    ]
)
TEXTS = JSON_VALUES.map(json.dumps) | WORDS | st.text(max_size=12)
"""What may stand behind the equals sign."""


def keys_of(recipe: Recipe) -> st.SearchStrategy[str]:
    known = st.sampled_from([*recipe.descriptions(), *saved.RENAMED, "tiny", "method.alpha"])
    slips = st.tuples(known, st.integers(0, 20), st.sampled_from(["", "x", ".", "_", "\u0430"])).map(
        lambda slip: slip[0][: slip[1]] + slip[2] + slip[0][slip[1] + 1 :]
    )
    return st.one_of(known, known, known, slips, st.text(max_size=12))


@st.composite
def recipes_with_settings(draw: st.DrawFn) -> tuple[Recipe, list[str]]:
    """Half of them with values that some recipe has for these keys, so that not all are refused."""
    recipe = draw(st.sampled_from(list(RECIPES.values())))
    if draw(st.booleans()):
        keys = draw(st.lists(st.sampled_from(list(values_of(recipe))[2:]), min_size=1, max_size=3))
        return recipe, [f"{key}={json.dumps(draw(st.sampled_from(USUAL[key])))}" for key in keys]
    pairs = draw(st.lists(st.tuples(keys_of(recipe), TEXTS), min_size=1, max_size=3))
    return recipe, [f"{key}={text}" for key, text in pairs]


def outcome(read: Callable[..., Recipe], *arguments: Any) -> Recipe | RecipeError:
    """What is read, or how it is refused: in one line. Any other exception is a defect, and passes through."""
    try:
        return read(*arguments)
    except RecipeError as error:
        refusal = error
    assert "\n" not in str(refusal)
    assert len(refusal.rule) < 1_000
    return refusal


def values_of(recipe: Recipe) -> dict[str, Any]:
    """The value of each key, as it is typed."""
    values = {}
    for name, value in recipe.model_dump(mode="json").items():
        values |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return {key.removeprefix("method."): value for key, value in values.items()}


USUAL: dict[str, list[Any]] = {}
for _recipe in RECIPES.values():
    for _key, _value in values_of(_recipe).items():
        if _value not in USUAL.setdefault(_key, []):
            USUAL[_key].append(_value)


def given_values(settings_: list[str]) -> dict[str, Any]:
    """What was typed, as JSON has it."""
    found = {}
    for key, _, text in (setting.partition("=") for setting in settings_):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        found[saved.RENAMED.get(key, key).removeprefix("method.")] = value
    return found


@pytest.mark.parametrize(("examples", "part"), SOME_OR_5_000)
def test_a_recipe_has_what_was_typed_and_nothing_else_has_changed(
    examples: int, part: int, record_property: Callable[[str, object], None]
) -> None:
    taken: list[bool] = []

    @seed(part)
    @settings(max_examples=examples)
    @given(recipes_with_settings())
    def check(drawn: tuple[Recipe, list[str]]) -> None:
        recipe, typed = drawn
        changed = outcome(override, recipe, typed)
        taken.append(not isinstance(changed, RecipeError))
        if isinstance(changed, RecipeError):
            return
        asked = given_values(typed)
        before = values_of(recipe.tiny() if asked.pop("tiny", False) else recipe)
        after = values_of(changed)
        if asked.get("alpha") == "auto":
            asked["alpha"], asked["alpha_schedule"] = AUTO_ALPHA
        for key, value in after.items():
            if key in asked:
                assert (value, isinstance(value, bool)) == (asked[key], isinstance(asked[key], bool)), key
            elif value != before[key]:  # switched off by the one that was typed
                assert key in ("updates", "epochs", "warmup_updates", "warmup_share"), key
                assert not value, key
        assert asked.keys() <= after.keys()

    check()
    assert {True, False} <= set(taken)
    record_property("settings", len(taken))
    record_property("of them refused", taken.count(False))


@pytest.mark.parametrize(("examples", "part"), SOME_OR_5_000)
def test_a_recipe_file_is_read_as_it_stands_or_refused_by_its_path(
    examples: int, part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path, taken = tmp_path / "recipe.json", []

    @seed(part)
    @settings(max_examples=examples)
    @given(recipe_files())
    def check(content: bytes) -> None:
        path.write_bytes(content)
        recipe = outcome(load_recipe, path)
        taken.append(not isinstance(recipe, RecipeError))
        if isinstance(recipe, RecipeError):
            assert str(recipe).startswith(f"{path}: ")
            return
        again = tmp_path / "again.json"
        again.write_text(recipe.to_json())
        assert load_recipe(again) == recipe
        assert load_recipe(again).digest() == recipe.digest()

    check()
    assert {True, False} <= set(taken)
    record_property("files", len(taken))
    record_property("of them refused", taken.count(False))


@st.composite
def recipe_files(draw: st.DrawFn) -> bytes:
    """A saved recipe with another value, without a key, or damaged as files are."""
    fields = draw(st.sampled_from(list(RECIPES.values()))).saved()
    section = draw(st.sampled_from(["", "method", "data", "model"]))
    part = fields[section] if section else fields
    key = draw(st.sampled_from(list(part)) | st.text(max_size=8))
    if draw(st.booleans()):
        part[key] = draw(JSON_VALUES)
    else:
        part.pop(key, None)
    content = json.dumps(fields, indent=draw(st.sampled_from([None, 2]))).encode()
    place = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(["whole", "whole", "cut", "replaced", "inserted"])):
        case "cut":
            return content[:place]
        case "replaced":
            return content[:place] + draw(st.binary(min_size=1, max_size=1)) + content[place + 1 :]
        case "inserted":
            return content[:place] + draw(st.sampled_from([b"9" * 5_000, b"[" * 3_000, b"\0", b","])) + content[place:]
    return content
