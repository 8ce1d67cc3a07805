"""Settings: typed sections of keys and values, and the one error that says which key is wrong, and how to fix it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

# No real run comes near this bound. A slip of the finger fails here, in words, and not in an allocator.
LARGEST_COUNT = 10**9
NEAR = 0.6  # the similarity of two spellings from which one may be a slip of the other

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and scikit-learn accept


class RecipeError(ValueError):
    """A recipe, or a change to one, that cannot be.

    `key` is the offending key, `value` what was given for it (`...`: nothing), `rule` the rule it breaks, and `nearest`
    the valid name closest to it where the name itself is wrong.
    """

    def __init__(self, key: str, rule: str, *, value: object = ..., nearest: str | None = None) -> None:
        self.key = key
        self.value = value
        self.rule = rule
        self.nearest = nearest
        given = "" if value is ... else f"={_shown(value)}"
        super().__init__(f"{_shown_name(key)}{given}: {rule}")


class Section(BaseModel):
    """A part of a recipe: a frozen value whose keys are checked, and never converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_saved(cls, value: Any) -> Any:
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("is not UTF-8, and cannot be saved; rename the file")
        return value


def added(old: object, description: str) -> Any:
    """Declares a key that earlier versions did not have; `old` is the value that does what they did.

    A saved recipe names such a key where its value is another. So a run that was saved before the key existed, and one
    saved since with the old value, are the same run, in the same folder.

        views: Literal["same", "each"] = added("same", "Whether each pass has an augmented input of its own.")
    """
    return Field(default=old, description=description, json_schema_extra={"added": True})


def was_added(field: Any) -> bool:
    """Whether the pydantic field was declared by `added`."""
    return bool((field.json_schema_extra or {}).get("added"))


def read_settings(settings: Iterable[str], names: Iterable[str]) -> dict[str, object]:
    """Returns keys and values as they are typed, `["alpha=1", "data.train_labels=100"]`, in their order.

    A value is read as JSON (`3`, `0.1`, `null`, `[0.1, 0.3]`) and, where it is none, as text. `names` are the keys from
    which an error names the nearest.
    """
    found: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            nearest = nearest_name(setting, names)
            example = "; rdrop list RECIPE shows the keys" if nearest is None else f", e.g. {nearest}=..."
            raise RecipeError(setting, f"a setting is written key=value{example}", nearest=nearest)
        if key in found:
            raise RecipeError(key, "given twice", value=_read_value(text))
        found[key] = _read_value(text)
    return found


def typed(key: str, value: object) -> str:
    """Returns the setting that `read_settings` reads as this value: `alpha=1`, `data.train=null`, `name="3"`."""
    return f"{key}={value if isinstance(value, str) and _read_value(value) == value else json.dumps(value)}"


def nearest_name(wrong: str, names: Iterable[str]) -> str | None:
    """Returns the valid name most like a wrong one; None where it is like none of them.

    By its last part (`dropout`), its initials (`lr`), a word of its own section (`data.labels`), its spelling.
    """
    names = list(names)
    for name in names:
        last_part = name.rpartition(".")[2]
        if wrong in (last_part, "".join(word[:1] for word in last_part.split("_"))):
            return name
    section, dot, word = wrong.rpartition(".")
    for name in names:
        own_section, _, last_part = name.rpartition(".")
        if dot and own_section == section and word in last_part.split("_"):
            return name
    by_lower_case = {name.lower(): name for name in reversed(names)}
    found = difflib.get_close_matches(wrong.lower(), by_lower_case, n=1, cutoff=NEAR)
    return by_lower_case[found[0]] if found else None


def _read_value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[...]"
    if isinstance(value, dict):
        return "{...}"
    return _cut(json.dumps(value))


def _shown_name(name: str) -> str:
    return _cut(name if name.isprintable() else json.dumps(name))


def _cut(text: str) -> str:
    """Returns the text, short enough not to flood the line of an error."""
    return text if len(text) <= 60 else f"{text[:57]}..."
