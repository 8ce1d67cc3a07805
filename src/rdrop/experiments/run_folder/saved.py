"""Saved recipes of every version of rdrop, as plain dictionaries: how they are read, and the name of their run.

    format 1   the keys of the method beside the others, and no format number
    format 2   the method as a section; American spelling
    format 3   the recipe `digits` has another network and fewer labels; what had that name is `digits-vit`

A key that was added since is written where its value is not what versions before did (`settings.added`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 3

_METHOD_OF_FORMAT_1 = (
    *("alpha", "passes", "every", "dropout", "cutoff", "cutoff_ratio", "task_passes", "divergence"),
    *("fused", "encoder_once"),
)
RENAMED = {
    "warmup_steps": "warmup_updates",
    "data.unlabelled": "data.unlabeled",
    "data.unlabelled_batch": "data.unlabeled_batch",
}
"""Keys by the names that they had in format 1. A command may still use these."""
RENAMED_VALUES = {
    "language-modelling": "language-modeling",
    "language-modelling-from-scratch": "language-modeling-from-scratch",
}
"""The same of tasks and recipes."""
RENAMED_RECIPES = {"digits": "digits-vit"}
"""The same of recipes alone, up to format 2."""


def current_key(key: str) -> str:
    """Returns today's key of a setting as it may be typed: by its name of format 1, or with the section `method`."""
    return RENAMED.get(key, key).removeprefix("method.")


def current_name(name: str) -> str:
    """Returns today's name of a task or recipe of format 1, of which `name` may be the tiny form."""
    return _renamed(name, RENAMED_VALUES)


def first_name(name: str) -> str:
    """Returns the name that a task or recipe had in format 1."""
    return _renamed(name, {new: old for old, new in (RENAMED_VALUES | RENAMED_RECIPES).items()})


def _renamed(name: str, names: Mapping[str, str]) -> str:
    base = name.removesuffix("-tiny")
    return names.get(base, base) + name[len(base) :]


def upgraded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved recipe of any format in today's; what is no recipe comes back for its reader to refuse."""
    version, name = recipe.get("format"), recipe.get("name")
    if version == 2 and isinstance(name, str):
        return {**recipe, "format": FORMAT, "name": _renamed(name, RENAMED_RECIPES)}
    if version is not None or "method" in recipe:
        return dict(recipe)
    found: dict[str, Any] = {"format": FORMAT}
    for key, value in recipe.items():
        if key == "name" and isinstance(value, str):
            found[key] = _renamed(current_name(value), RENAMED_RECIPES)
        elif key == "task" and isinstance(value, str):
            found[key] = current_name(value)
        elif key in _METHOD_OF_FORMAT_1:
            found.setdefault("method", {})[key] = value
        elif isinstance(value, Mapping):
            prefix = f"{key}."
            found[key] = {RENAMED.get(prefix + k, prefix + k).removeprefix(prefix): v for k, v in value.items()}
        else:
            found[RENAMED.get(key, key)] = value
    return found


def digest(recipe: Mapping[str, Any]) -> str:
    """Returns the name of the run of a recipe in today's format: 12 hexadecimal digits.

    They are those of the SHA-256 of the canonical JSON of format 1, so that a run keeps its name in all versions.
    """
    canonical = json.dumps(_in_format_1(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two recipes of today's format differ, named as on the command line."""
    first, second = _by_key(one), _by_key(other)
    return sorted(key for key in first.keys() | second.keys() if first.get(key, ...) != second.get(key, ...))


def _by_key(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        prefix = "" if key == "method" else f"{key}."
        found |= {f"{prefix}{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def _in_format_1(recipe: Mapping[str, Any]) -> dict[str, Any]:
    old_keys = {new: old for old, new in RENAMED.items()}
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if key == "name":
            found[key] = first_name(value)
        elif key == "task":
            found[key] = _renamed(value, {new: old for old, new in RENAMED_VALUES.items()})
        elif key == "method":
            found |= value
        elif isinstance(value, Mapping):
            prefix = f"{key}."
            found[key] = {old_keys.get(prefix + k, prefix + k).removeprefix(prefix): v for k, v in value.items()}
        elif key != "format":
            found[old_keys.get(key, key)] = value
    return found
