"""A recipe: the complete, validated description of one training run.

A recipe is a frozen value without defaults, so that what is written in it is all there is to know. Each task has its
own subclass of `Recipe`, whose two sections say what differs: `data` (which examples) and `model` (which network).
Whoever reads a recipe (a file, a command line) gets either a valid one or one `RecipeError`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

# No real run comes near these bounds. A slip of the finger fails here, in words, and not in an allocator.
LARGEST_COUNT = 10**9
LARGEST_FILE_BYTES = 2**20

# Where pydantic's own words would not say how to write it.
TYPE_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number as JSON writes it, e.g. 0.3 or 1e-3",
    "list_type": "must be a list, written [0.1,0.3] (dropout: a rate for each pass; the model's own is model.dropout)",
    "string_type": "must be text; text that looks like a number needs quotes of its own, '\"3\"'",
}

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
    """A part of a recipe that belongs to its task."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataFiles(Section):
    """Where the examples come from, by the first of these that is set: `tiny`, `train` or `folder`, `hub`.

    What the folder and the files look like, docs/tasks/ says for each task.
    """

    hub: str | None = Field(description="Id of a data set on the Hugging Face hub.")
    hub_config: str | None = Field(description="Its configuration.")
    folder: str | None = Field(description="A folder of files in the layout of this task.")
    train: str | None = Field(description="A file of your own to train on.")
    valid: str | None = Field(description="The one that chooses the checkpoint. null: a tenth of `train`.")
    test: str | None = Field(description="The one for the final score. null: another tenth of `train`.")
    split_seed: Seed = Field(description="Decides those tenths; apart from `seed`, so that seeds share them.")
    tiny: bool = Field(description="Examples made up by the task: seconds to train on, and of no meaning.")

    @model_validator(mode="after")
    def _no_file_is_left_unread(self) -> Self:
        for key in ("train", "folder"):
            if self.tiny and getattr(self, key) is not None:
                rule = "must be null with data.tiny (tiny=true): its examples are made up"
                raise RecipeError(f"data.{key}", rule, value=getattr(self, key))
        if self.train is not None and self.folder is not None:
            raise RecipeError("data.folder", "must be null with data.train, which is read instead", value=self.folder)
        for key in ("valid", "test"):
            if getattr(self, key) is not None and self.train is None:
                raise RecipeError(f"data.{key}", "needs data.train", value=getattr(self, key))
        return self


MADE_UP: dict[str, object] = {
    "data.tiny": True,
    **dict.fromkeys(("data.train", "data.valid", "data.test", "data.folder")),
}
"""What a recipe's tiny form changes in `DataFiles`."""


class ModelSection(Section):
    """The network. Its dropout rates are the fields called `dropout` or `<where>_dropout`; null: it has none there."""

    def rates(self) -> dict[str, float | None]:
        return {name: rate for name, rate in self if name.endswith("dropout")}

    def dropout_rates(self) -> dict[str, float]:
        return {name: rate for name, rate in self.rates().items() if rate is not None}

    @model_validator(mode="after")
    def _heads_are_of_one_width(self) -> Self:
        width, heads = getattr(self, "hidden_size", None), getattr(self, "heads", None)
        if width is not None and heads is not None and width % heads:
            raise RecipeError("model.hidden_size", f"must be divisible by model.heads (={heads})", value=width)
        return self


class NewOrPretrainedModel(ModelSection):
    """A network from scratch, which needs its `SIZES`; or a pre-trained one, `name`, which has them itself."""

    SIZES: ClassVar[tuple[str, ...]] = ("layers", "hidden_size", "heads", "intermediate_size")
    name: str | None

    @model_validator(mode="after")
    def _has_its_sizes_once(self) -> Self:
        for key in self.SIZES:
            value = getattr(self, key)
            if self.name is None and value is None:
                rule = "must be given for a model from scratch (model.name=null)"
                raise RecipeError(f"model.{key}", rule, value=None)
            if self.name is not None and value is not None:
                rule = f"must be null: {self.name} has its own; or set model.name=null, for a model from scratch"
                raise RecipeError(f"model.{key}", rule, value=value)
        return self


class DecodingSection(Section):
    """The search for the text that a model writes."""

    beams: Count = Field(description="Beams of the search for the test score. 1: greedy.")
    length_penalty: float = Field(
        description="The power of the length that divides a text's log-probability: above 0 favors longer ones."
    )
    batch_size: Count = Field(description="How many texts are written at once.")


class Recipe(BaseModel):
    """What determines a run completely: two runs of one recipe on one machine end in the same bits.

    A task subclasses it, narrows `task` to a `Literal` and gives `data` and `model` their types. Change one with
    `replace` (or `override`, from text): both validate, which pydantic's `model_copy` does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(description="Name of the experiment, and of its folder under the run directory.")
    task: str = Field(description="What is learned; decides the keys of the sections `data` and `model`.")

    alpha: float = Field(
        ge=0,
        description="Weight of the divergence between the passes, as in the paper. 0 is plain single-pass training.",
    )
    passes: int = Field(
        ge=2, le=64, description="Forward passes per example, each with its own dropout masks. Unused when alpha is 0."
    )
    every: Count = Field(
        description="Apply R-Drop at every this many updates; the others are plain. Unused when alpha is 0."
    )
    dropout: list[Probability] | None = Field(
        description="A dropout rate for each pass, which then has a forward of its own. null: the model's own rates."
    )
    cutoff: Literal["token", "span", "feature", "unknown", "embedding"] | None = Field(
        description="What is cut from the input of every pass but the first. null: nothing, which is plain R-Drop."
    )
    cutoff_ratio: Probability = Field(description="Share of the tokens, or of the features, that the cutoff takes.")
    task_passes: Literal["all", "first"] = Field(
        description="Which passes carry the task loss: all; or the first, which is SimCut where the others are cut."
    )
    divergence: Literal["symmetric", "from-first"] = Field(
        description="Between which passes: all pairs, both ways, as in the paper; or from the first to each of the "
        "others, as in SimCut."
    )

    updates: Count = Field(description="Length of the training, in optimizer steps.")
    batch_size: Count | None = Field(
        description="Examples per update, over all processes and accumulation steps, before they are repeated. null: "
        "batch_tokens decides."
    )
    batch_tokens: Count | None = Field(
        description="Tokens per update, padding included, in batches of examples of like length. null: batch_size."
    )
    accumulation: Count = Field(description="Forward and backward passes into which the batch of one update is cut.")
    optimizer: Literal["adamw", "sgd", "nag"] = Field(
        description="AdamW; stochastic gradient descent with momentum; the same with Nesterov's momentum."
    )
    beta1: Probability = Field(description="Decay of the running mean of the gradient; of sgd and nag, the momentum.")
    beta2: Probability = Field(description="Decay of the running mean of its square. AdamW only.")
    epsilon: float = Field(gt=0, description="Added to the root of that mean. AdamW only.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = Field(
        description="Course of the learning rate after the warmup: constant; down to 0 at the last update; or falling "
        "with the square root of the step."
    )
    warmup_steps: int = Field(ge=0, description="Updates in which the learning rate rises linearly to its peak.")
    weight_decay: float = Field(
        ge=0,
        description="Weight decay, on matrices and embeddings: AdamW's own; of sgd and nag, added to the gradient.",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        description="Largest L2 norm of the gradient; longer ones are scaled down to it. null: never."
    )
    label_smoothing: Probability = Field(description="Share of the target spread evenly over all classes.")
    precision: Literal["fp32", "bf16"] = Field(
        description="Arithmetic of the forward pass. The weights and the loss stay in fp32."
    )
    compile: bool = Field(description="Whether torch.compile compiles the model for training.")
    fused: bool = Field(
        description="Compute R-Drop's loss of a language model from its hidden states: the logits are never stored."
    )
    encoder_once: bool = Field(
        description="Run an encoder in which nothing is random once for all passes, instead of once for each."
    )

    evaluate_every: Count = Field(description="Updates between scores on the valid split. The last update is scored.")
    patience: Count | None = Field(
        description="Scores in a row that are no new best, after which training ends before `updates`. null: never."
    )
    average_last: Count = Field(
        description="How many of the last scored weights are averaged for the final score. 1: none are, the weights "
        "with the best valid score are taken."
    )
    checkpoint_every: Count = Field(description="Updates between checkpoints to resume from. The last one is saved.")
    keep_checkpoints: Count = Field(description="How many of the newest checkpoints are kept.")

    seed: Seed = Field(
        description="Decides initial weights, order of the data, dropout masks, and what the task draws."
    )

    data: Section = Field(description="Which examples: the task's own keys.")
    model: ModelSection = Field(description="Which network: the task's own keys.")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        words = name.replace("-", "").replace("_", "").replace(".", "")
        if not (words.isascii() and words.isalnum() and name[0].isalnum() and len(name) <= 100):
            raise RecipeError(
                "name", "must be at most 100 letters, digits, '-', '_' or '.', the first a letter or digit", value=name
            )
        return name

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        self._method_fits()
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise RecipeError(
                "batch_size", "set either it or batch_tokens, and the other to null", value=self.batch_size
            )
        if self.batch_size is not None and self.batch_size % self.accumulation:
            raise RecipeError(
                "batch_size",
                f"must be divisible by accumulation (={self.accumulation})",
                value=self.batch_size,
            )
        if self.schedule == "inverse-sqrt" and self.warmup_steps == 0:
            raise RecipeError("warmup_steps", "must be at least 1 for the schedule inverse-sqrt", value=0)
        if self.optimizer == "nag" and self.beta1 == 0:
            raise RecipeError("beta1", "must be above 0 for the optimizer nag: it is the momentum", value=0)
        if self.warmup_steps > self.updates:
            raise RecipeError(
                "warmup_steps",
                f"must be at most updates (={self.updates})",
                value=self.warmup_steps,
            )
        if self.every > self.updates:
            raise RecipeError("every", f"must be at most updates (={self.updates})", value=self.every)
        return self

    def _method_fits(self) -> None:
        if self.dropout is not None and len(self.dropout) != self.passes:
            raise RecipeError("dropout", f"must have passes (={self.passes}) rates, one for each", value=self.dropout)
        if self.dropout is not None and self.cutoff is not None:
            raise RecipeError("dropout", "must be null with a cutoff, whose passes share a forward", value=self.dropout)
        if self.cutoff is None and self.cutoff_ratio > 0:
            raise RecipeError("cutoff_ratio", "must be 0 without a cutoff; set cutoff too", value=self.cutoff_ratio)
        if self.cutoff is not None and self.cutoff_ratio == 0:
            raise RecipeError("cutoff_ratio", f"must be above 0 for cutoff (={self.cutoff})", value=0)
        if self.fused and (self.dropout is not None or self.task_passes != "all"):
            raise RecipeError("fused", 'must be false where dropout is set, or task_passes is not "all"', value=True)
        if self.encoder_once and (self.dropout is not None or self.cutoff is not None):
            raise RecipeError("encoder_once", "must be false with dropout or cutoff set: passes differ", value=True)
        rates = self.model.dropout_rates()
        if self.alpha > 0 and rates and not any(rates.values()) and self.cutoff is None:
            keys = " and ".join(f"model.{name}" for name in rates)
            raise RecipeError(
                "alpha",
                f"asks for R-Drop, but {keys} are 0, so all passes would be the same; "
                "set a dropout rate above 0, or alpha=0 for plain training",
                value=self.alpha,
            )

    def tiny(self) -> Self:
        """This experiment in seconds, on any machine and without a network: a toy model on data made up by the task.

        A task's subclass says how; its result means nothing but that everything works.
        """
        raise RecipeError("tiny", f"{self.name} has no tiny form", value=True)

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """What each key means, in reading order; the keys of the sections are dotted (`data.train_labels`)."""
        found = {}
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                for inner_name, inner in field.annotation.model_fields.items():
                    found[f"{name}.{inner_name}"] = inner.description or ""
            else:
                found[name] = field.description or ""
        return found

    @classmethod
    def parse(cls, fields: Mapping[str, object]) -> Self:
        """The recipe with these fields, and no others; nothing is converted (no `"1"` or `1.0` for 1)."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            _raise_as_recipe_error(error, cls)

    def replace(self, **changes: object) -> Self:
        """This recipe with other values, e.g. `replace(alpha=0.0, seed=3, **{"data.train_labels": 100})`."""
        fields = self.model_dump(mode="json")
        for key, value in changes.items():
            if key not in self.descriptions():
                raise _unknown_key(key, value, type(self))
            *section, name = key.split(".")
            (fields[section[0]] if section else fields)[name] = value
        return self.parse(fields)

    def value(self, key: str) -> Any:
        """The value at a dotted key: `value("data.train_labels")`."""
        *section, name = key.split(".")
        return getattr(getattr(self, section[0]) if section else self, name)

    def to_json(self) -> str:
        """The recipe as it is saved with the run; `load_recipe` reads it back."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def digest(self) -> str:
        """The name of the run: 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def override(recipe: AnyRecipe, settings: Iterable[str]) -> AnyRecipe:
    """The recipe changed by settings as they are typed: `override(recipe, ["alpha=1", "data.train_labels=100"])`.

    A value is read as JSON (`3`, `0.1`, `null`, `[0.1, 0.3]`) and, where it is none, as text. `tiny=true` is no key:
    it means the recipe's `tiny()`, which the other settings change.
    """
    changes: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            raise _missing_equals(setting, type(recipe))
        if key in changes:
            raise RecipeError(key, "given twice", value=text)
        changes[key] = _read_value(text)
    tiny = changes.pop("tiny", False)
    if not isinstance(tiny, bool):
        raise RecipeError("tiny", "must be true or false", value=tiny)
    return (recipe.tiny() if tiny else recipe).replace(**changes)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe saved at `path`, e.g. `runs/digits/0123456789ab/recipe.json`. A missing key is an error."""
    # The catalog imports this module.
    from rdrop.experiments.recipes import RECIPES

    try:
        fields = _read_json(Path(path))
        kinds = {recipe.task: type(recipe) for recipe in RECIPES.values()}
        task = fields.get("task")
        if not isinstance(task, str) or task not in kinds:
            raise RecipeError("task", f"must be one of {', '.join(kinds)}", value=task)
        return kinds[task].parse(fields)
    except RecipeError as error:
        located = RecipeError(error.key, error.rule, value=error.value, nearest=error.nearest)
        located.args = (f"{path}: {error}",)
        raise located from None


def nearest_name(wrong: str, names: Iterable[str]) -> str:
    """The valid name most like a wrong one: its last part (`dropout`), its initials (`lr`), else its spelling."""
    names = list(names)
    for name in names:
        last_part = name.rpartition(".")[2]
        if wrong in (last_part, "".join(word[:1] for word in last_part.split("_"))):
            return name
    return difflib.get_close_matches(wrong, names, n=1, cutoff=0.0)[0]


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise RecipeError("recipe", f"a recipe has at most {LARGEST_FILE_BYTES} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise RecipeError("recipe", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise RecipeError("recipe", "is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise RecipeError("recipe", f"is not JSON: {error}") from None
    except RecursionError:
        raise RecipeError("recipe", "is nested too deeply") from None
    if not isinstance(fields, dict):
        raise RecipeError("recipe", "must be a JSON object of keys and values")
    return fields


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise RecipeError(key, "given twice", value=value)
        fields[key] = value
    return fields


def _read_value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _missing_equals(setting: str, kind: type[Recipe]) -> RecipeError:
    nearest = nearest_name(setting, kind.descriptions())
    return RecipeError(setting, f"a setting is written key=value, e.g. {nearest}=...", nearest=nearest)


def _unknown_key(key: str, value: object, kind: type[Recipe]) -> RecipeError:
    inner = [name for name in kind.descriptions() if name.startswith(f"{key}.")]
    if inner:
        rule = f"is a section; set one of its keys: {', '.join(inner)}"
        return RecipeError(key, rule, value=value, nearest=inner[0])
    nearest = nearest_name(key, kind.descriptions())
    return RecipeError(key, f"no such key; the nearest is {nearest}", value=value, nearest=nearest)


def _raise_as_recipe_error(error: ValidationError, kind: type[Recipe]) -> NoReturn:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RecipeError):
        raise cause from None
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        raise _unknown_key(key, first["input"], kind) from None
    if first["type"] == "missing":
        raise RecipeError(key, "is missing; a saved recipe has every key") from None
    rule = TYPE_RULES.get(first["type"]) or first["msg"].replace("Input should be", "must be", 1)
    raise RecipeError(key, rule, value=first["input"]) from None


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[...]"
    if isinstance(value, dict):
        return "{...}"
    return _cut(json.dumps(value))


def _shown_name(name: str) -> str:
    return _cut(name if name.isprintable() else json.dumps(name))


def _cut(text: str) -> str:
    """The text, short enough not to flood the line of an error."""
    return text if len(text) <= 60 else f"{text[:57]}..."
