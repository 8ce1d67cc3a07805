"""Recipes laid out flat: which settings the runs of a comparison share, and in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.recipes import class_of


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The recipe with dotted keys (`data.train_labels`), in its own order."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def shown(value: object) -> str:
    """A setting as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def settings_of_arms(comparison: Comparison) -> dict[str, list[Any]]:
    """Dotted key -> its value in each arm, the seed left out, in the order of the recipe."""
    recipes = [flat(arm.recipe) for arm in comparison.arms]
    return {key: [_value(recipe, key) for recipe in recipes] for key in _keys(recipes) if key != "seed"}


def distinguishing_settings(found: list[Comparison]) -> list[dict[str, object]]:
    """Returns for each comparison what tells it from others of its name; empty if the name is unique.

    That is settings and the content of files, or else the arms that not all of them have.
    """
    recipes = [flat(comparison.arms[0].recipe) for comparison in found]
    files = [_files(comparison) for comparison in found]
    settings: list[dict[str, object]] = []
    for comparison, recipe, own_files in zip(found, recipes, files, strict=True):
        of_name = [place for place, other in enumerate(found) if other.name == comparison.name]
        namesakes = [recipes[place] for place in of_name]
        differing = [
            key
            for key in _keys(namesakes)
            if key != "seed"
            and not key.startswith("method.")
            and any(_value(other, key) != _value(recipe, key) for other in namesakes)
        ]
        contents = {
            f"content of {path}": content
            for path, content in own_files.items()
            if any(files[place].get(path, content) != content for place in of_name)
        }
        settings.append({key: _value(recipe, key) for key in differing} | contents)
    labels = [{arm.label for arm in comparison.arms} for comparison in found]
    told = [titled(comparison.name, setting) for comparison, setting in zip(found, settings, strict=True)]
    for setting, title, own in zip(settings, told, labels, strict=True):
        same = [others for others, other in zip(labels, told, strict=True) if other == title]
        if apart := own.difference(own.intersection(*same)):  # of one recipe and data, with other arms
            setting["with"] = "; ".join(sorted(apart))
    return settings


def _files(comparison: Comparison) -> dict[str, str]:
    """Returns what the files of its data held, by their paths."""
    return {path: content for run in comparison.runs for path, content in run.result.get("files", {}).items()}


def titled(name: str, setting: Mapping[str, object]) -> str:
    """The name of a comparison, with the settings that tell it from others of that name."""
    details = ", ".join(f"{key} = {shown(value)}" for key, value in setting.items())
    return f"{name} ({details})" if details else name


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a key in a flat recipe, also of one that is left out because it is what it was before."""
    return recipe[key] if key in recipe else class_of(recipe["task"]).left_out(key)


def _keys(recipes: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for recipe in recipes for key in recipe))
