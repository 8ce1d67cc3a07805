"""A recipe: the complete, validated description of one training run.

A recipe is a frozen value. Each task has its own subclass of `Recipe`, which says what differs: `data` (which
examples), `model` (which network), and where the task is. Whoever reads a recipe (a file, a command line) gets either a
valid one or one `RecipeError`. `rdrop.experiments.recipes` has the recipes by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from rdrop.alpha import AUTO_ALPHA
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe.settings import (
    LARGEST_COUNT,
    Count,
    Probability,
    RecipeError,
    Section,
    Seed,
    added,
    nearest_name,
    read_settings,
    typed,
    was_added,
)
from rdrop.experiments.run_folder import saved

# Where pydantic's own words would not say how to write it.
TYPE_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number as JSON writes it, e.g. 0.3 or 1e-3",
    "list_type": "must be a list, written [0.1,0.3]",
    "tuple_type": "must be a list, written [0.1,0.3] (a rate for each pass; the model's own is model.dropout)",
    "string_type": "must be text; text that looks like a number needs quotes of its own, '\"3\"'",
}


class DataFiles(Section):
    """The place of the examples, by the first of these that is set: `tiny`, `train` or `folder`, `hub`.

    What the folder and the files look like, docs/tasks/ says for each task.
    """

    hub: str | None = Field(None, description="Id of a data set on the Hugging Face hub.")
    hub_config: str | None = Field(None, description="Its configuration.")
    folder: str | None = Field(None, description="A folder of files in the layout of this task.")
    train: str | None = Field(None, description="A file of your own to train on.")
    valid: str | None = Field(None, description="The one that chooses the checkpoint. null: 10 % of `train`.")
    test: str | None = Field(None, description="The one for the final score. null: another 10 % of `train`.")
    split_seed: Seed = Field(0, description="Decides those splits; apart from `seed`, so that seeds share them.")
    tiny: bool = Field(False, description="Synthetic examples of the task: seconds to train on, and of no meaning.")

    @model_validator(mode="after")
    def _no_file_is_left_unread(self) -> Self:
        for key in ("train", "folder"):
            if self.tiny and getattr(self, key) is not None:
                rule = "must be null with data.tiny (tiny=true): its examples are synthetic"
                raise RecipeError(f"data.{key}", rule, value=getattr(self, key))
        if self.train is not None and self.folder is not None:
            raise RecipeError("data.folder", "must be null with data.train, which is read instead", value=self.folder)
        for key in ("valid", "test"):
            if getattr(self, key) is not None and self.train is None:
                raise RecipeError(f"data.{key}", "needs data.train", value=getattr(self, key))
        return self


SYNTHETIC: dict[str, object] = {
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

    SIZES: ClassVar[Mapping[str, int | bool]] = {"layers": 2, "hidden_size": 128, "heads": 4, "intermediate_size": 512}
    """By the name of its key, what an error gives as an example."""
    name: str | None = None

    @model_validator(mode="after")
    def _has_its_sizes_once(self) -> Self:
        missing = [key for key in self.SIZES if getattr(self, key) is None]
        if self.name is None and missing:
            sizes = " ".join(typed(f"model.{key}", self.SIZES[key]) for key in missing)
            rule = f"must be given for a model from scratch (model.name=null), as in: {sizes} learning_rate=5e-4"
            raise RecipeError(f"model.{missing[0]}", rule, value=None)
        for key in self.SIZES if self.name is not None else ():
            if key not in missing:
                rule = f"must be null: {self.name} has its own; or set model.name=null, for a model from scratch"
                raise RecipeError(f"model.{key}", rule, value=getattr(self, key))
        return self


class DecodingSection(Section):
    """The search for the text that a model writes."""

    beams: Count = Field(description="Beams of the search for the test score. 1: greedy.")
    length_penalty: float = Field(
        description="The power of the length that divides a text's log-probability: above 0 favors longer ones."
    )
    batch_size: Count = Field(description="How many texts are written at once.")


class Recipe(Section):
    """The complete description of a run: two runs of one recipe on one machine end in the same bits.

    A task subclasses it, says where its `TASK` is, narrows `task` to a `Literal` and gives `data` and `model` their
    types. Change a recipe with `replace` (or `override`, from text): both validate, which pydantic's `model_copy` does
    not. The keys of the method are named without their section: `alpha`, not `method.alpha`.
    """

    TASK: ClassVar[str | type]
    """The class of the task, or where it is, as "package.module:Class": a task brings its own libraries."""

    name: str = Field(description="Name of the experiment, and of its folder under the run directory.")
    task: str = Field(description="What is learned; decides the keys of the sections `data` and `model`.")

    method: Method = Field(description="How R-Drop is applied: the keys from `alpha` to `encoder_once`.")

    updates: Count | None = Field(
        None, description="Length of the training, in optimizer steps. null: `epochs` says it."
    )
    epochs: Annotated[float, Field(gt=0, le=LARGEST_COUNT)] | None = added(
        None,
        "Length of the training, in passes over the training examples: that many times their number, divided by "
        "batch_size, are the updates. null: `updates` says it.",
    )
    batch_size: Count | None = Field(
        None,
        description="Examples per update, over all processes and accumulation steps, before they are repeated. null: "
        "batch_tokens decides.",
    )
    batch_tokens: Count | None = Field(
        None, description="Tokens per update, padding included, in length-bucketed batches. null: batch_size."
    )
    accumulation: Count = Field(
        1,
        description="Forward and backward passes into which the batch of one update is cut, in length-bucketed parts.",
    )
    optimizer: Literal["adamw", "sgd", "nag"] = Field(
        "adamw", description="AdamW; stochastic gradient descent with momentum; the same with Nesterov's momentum."
    )
    beta1: Probability = Field(
        0.9, description="Decay of the running mean of the gradient; of sgd and nag, the momentum."
    )
    beta2: Probability = Field(0.999, description="Decay of the running mean of its square. AdamW only.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of that mean. AdamW only.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = Field(
        description="Course of the learning rate after the warmup: constant; down to 0 after the last update; or "
        "falling with the square root of the step."
    )
    warmup_updates: int = Field(ge=0, description="Updates in which the learning rate rises linearly to its peak.")
    warmup_share: Probability = added(0.0, "The same as a share of all updates. Either it or warmup_updates is 0.")
    weight_decay: float = Field(
        ge=0,
        description="Weight decay, on matrices and embeddings: AdamW's own; of sgd and nag, added to the gradient.",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Largest L2 norm of the gradient; longer ones are scaled down to it. null: never."
    )
    label_smoothing: Probability = Field(0.0, description="Share of the target spread evenly over all classes.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the forward pass. The weights and the loss stay in fp32."
    )
    compile: bool = Field(False, description="Whether torch.compile compiles the model for training.")

    evaluate_every: Count | None = Field(
        description="Updates between scores on the valid split. null: those of an epoch. The last update is scored."
    )
    patience: Count | None = Field(
        None,
        description="Scores in a row that are no new best, after which training ends early. null: never.",
    )
    select_by: Literal["score", "loss"] = added(
        "score",
        "What is a new best on the valid split, for the weights that are scored and for `patience`: the task's score, "
        "or the loss, which moves in smaller steps where the split is small.",
    )
    average_last: Count = Field(
        1,
        description="How many of the last scored weights are averaged for the final score. 1: none are, the weights "
        "that are the best on valid are taken.",
    )
    checkpoint_every: Count | None = Field(
        description="Updates between checkpoints to resume from. null: those of an epoch. The last one is saved."
    )
    keep_checkpoints: Count = Field(2, description="How many of the newest checkpoints are kept.")

    init_from: str | None = added(
        None,
        "Folder of a finished run whose scored weights training starts from; or of several, of which the one with this "
        "seed is taken. null: new or pre-trained weights, as `model` says. Not for images.",
    )
    seed: Seed = Field(
        0, description="Decides initial weights, order of the data, dropout masks, and what the task draws."
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
        if name.endswith((".jsonl", ".json", ".html", ".tmp")):
            raise RecipeError("name", "ends as files of the folder of the runs do; leave the ending out", value=name)
        return name

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        self._something_is_random()
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
        method = self.method
        if self.compile and method.cutoff is not None and method.every > 1:
            rule = f"must be false with a cutoff (={method.cutoff}) and every (={method.every}) above 1: plain updates"
            raise RecipeError("compile", f"{rule} compile the model without what is cut", value=True)
        labels = getattr(self.data, "labels", None)
        if self.batch_size is not None and labels is not None and self.batch_size > labels:
            raise RecipeError("batch_size", f"must be at most data.labels (={labels})", value=self.batch_size)
        if self.schedule == "inverse-sqrt" and not (self.warmup_updates or self.warmup_share):
            raise RecipeError("warmup_updates", "must be at least 1 for the schedule inverse-sqrt", value=0)
        if self.optimizer == "nag" and self.beta1 == 0:
            raise RecipeError("beta1", "must be above 0 for the optimizer nag: it is the momentum", value=0)
        if (self.updates is None) == (self.epochs is None):
            raise RecipeError("updates", "set either it or epochs, and the other to null", value=self.updates)
        if self.warmup_share and self.warmup_updates:
            rule = f"must be 0 with warmup_updates (={self.warmup_updates}), or that 0"
            raise RecipeError("warmup_share", rule, value=self.warmup_share)
        if self.updates is not None:
            self._no_part_is_longer_than_the_training(self.updates)
        return self

    def _no_part_is_longer_than_the_training(self, updates: int) -> None:
        for key, value in (("warmup_updates", self.warmup_updates), ("every", self.method.every)):
            if value > updates:
                raise RecipeError(key, f"must be at most updates (={updates})", value=value)

    def _something_is_random(self) -> None:
        method, rates = self.method, self.model.dropout_rates()
        differ = method.cutoff is not None or method.views == "each"
        if not method.is_plain and rates and not any(rates.values()) and not differ:
            keys = " and ".join(f"model.{name}" for name in rates)
            raise RecipeError(
                "alpha",
                f"asks for R-Drop, but {keys} {'is' if len(rates) == 1 else 'are'} 0, so all passes would be the same; "
                "set a dropout rate above 0, or alpha=0 for plain training",
                value=method.alpha,
            )

    @property
    def total_updates(self) -> int:
        """The length of the training in updates; of a recipe in epochs, that of what `in_updates` returns."""
        if self.updates is None:
            raise ValueError(f"{self.name} has {self.epochs} epochs, which are updates once the data are loaded")
        return self.updates

    def in_updates(self, per_epoch: float) -> Self:
        """Returns the same training with all lengths in updates, of which an epoch has `per_epoch`.

        Raises `RecipeError` where a part of it is longer than the training.
        """
        updates = self.updates or max(round((self.epochs or 0) * per_epoch), 1)
        warmup = max(round(self.warmup_share * updates), 1) if self.warmup_share else self.warmup_updates
        an_epoch = max(round(per_epoch), 1)
        return self.replace(
            updates=updates,
            epochs=None,
            warmup_updates=warmup,
            warmup_share=0.0,
            evaluate_every=self.evaluate_every or an_epoch,
            checkpoint_every=self.checkpoint_every or an_epoch,
        )

    def tiny(self) -> Self:
        """Returns this experiment in seconds, on any machine and without a network: a toy model on synthetic data.

        A task's subclass says how; its result means nothing but that everything works.
        """
        raise RecipeError("tiny", f"{self.name} has no tiny form", value=True)

    def _tiny(self, **changes: object) -> Self:
        """Returns the recipe with what tiny forms share, and with `changes`."""
        shared: dict[str, object] = {"name": f"{self.name}-tiny", "updates": 20, "warmup_updates": 2, "accumulation": 1}
        shared |= {
            "epochs": None,
            "warmup_share": 0.0,
            "precision": "fp32",
            "evaluate_every": 10,
            "checkpoint_every": 10,
        }
        return self.replace(**(shared | changes))

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Returns what each key means, in reading order; those of data and model are dotted (`data.train_labels`)."""
        return {key: field.description or "" for key, (_, _, field) in cls._keys().items()}

    @classmethod
    def _keys(cls) -> dict[str, tuple[str | None, str, Any]]:
        """Returns section, name and field of each key. Those of the method have no prefix."""
        found: dict[str, tuple[str | None, str, Any]] = {}
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                prefix = "" if name == "method" else f"{name}."
                found |= {f"{prefix}{key}": (name, key, inner) for key, inner in field.annotation.model_fields.items()}
            else:
                found[name] = None, name, field
        return found

    @classmethod
    def left_out(cls, key: str) -> Any:
        """Returns the value that a saved recipe means which leaves this key out; None for a key of nobody's."""
        _, _, field = cls._keys().get(saved.current_key(key), (None, "", None))
        return field.default if field is not None and was_added(field) else None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the recipe with these fields, and no others; nothing is converted (no `"1"` or `1.0` for 1).

        All keys must be there, but those that were added to the format since (`settings.added`).
        """
        try:
            recipe = cls.model_validate({key: value for key, value in fields.items() if key != "format"})
        except ValidationError as error:
            _raise_as_recipe_error(error, cls)
        for key, (section, name, field) in cls._keys().items():
            part = fields if section is None else fields[section]
            if name not in part and not was_added(field):
                raise RecipeError(key, "is missing; a saved recipe has every key")
        return recipe

    def replace(self, **changes: object) -> Self:
        """Returns this recipe with other values, e.g. `replace(alpha=0.0, **{"data.train_labels": 100})`.

        `method` takes a whole `Method`. `alpha="auto"` stands for an alpha of 4 that rises with the square of progress:
        a schedule, not an adaptation.
        """
        fields = self.model_dump(mode="json")
        method = changes.pop("method", None)
        if isinstance(method, Method):
            fields["method"] = method.model_dump(mode="json")
        elif method is not None:
            raise _unknown_key("method", method, type(self))
        keys, given = self._keys(), dict[str, object]()
        for key, value in changes.items():
            current = saved.current_key(key)
            if current not in keys:
                raise _unknown_key(key, value, type(self))
            if current in given:
                raise RecipeError(current, "given twice, by two of its names", value=value)
            given[current] = value
        if given.get("alpha") == "auto":
            if "alpha_schedule" in given:
                rule = 'must be left out with alpha="auto", which is a schedule itself'
                raise RecipeError("alpha_schedule", rule, value=given["alpha_schedule"])
            given["alpha"], given["alpha_schedule"] = AUTO_ALPHA
        for current, value in given.items():
            section, name, _ = keys[current]
            (fields if section is None else fields[section])[name] = value
        return self.parse(fields)

    def value(self, key: str) -> Any:
        """Returns the value of a key: `value("alpha")`, `value("data.train_labels")`."""
        section, name, _ = self._keys()[key]
        return getattr(self if section is None else getattr(self, section), name)

    def saved(self) -> dict[str, Any]:
        """Returns the recipe as its file has it; `load_recipe` reads it back."""
        fields: dict[str, Any] = {"format": saved.FORMAT} | self.model_dump(mode="json")
        for section, name, field in self._keys().values():
            part = fields if section is None else fields[section]
            if was_added(field) and part[name] == field.default:
                del part[name]
        return fields

    def to_json(self) -> str:
        """Returns the text of the recipe's file."""
        return json.dumps(self.saved(), indent=2) + "\n"

    def digest(self) -> str:
        """Returns the name of the run: 12 hexadecimal digits, the same in all versions of rdrop."""
        return saved.digest(self.saved())


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def override(recipe: AnyRecipe, settings: Iterable[str]) -> AnyRecipe:
    """Returns the recipe changed by settings as they are typed: `override(recipe, ["alpha=1", "model.layers=2"])`.

    `tiny=true` is no key: it means the recipe's `tiny()`, which the other settings change. Of two keys that exclude
    each other, as `updates` and `epochs`, the one that is typed holds, and the other is switched off.
    """
    changes = read_settings(settings, type(recipe).descriptions())
    tiny = changes.pop("tiny", False)
    if not isinstance(tiny, bool):
        raise RecipeError("tiny", "must be true or false", value=tiny)
    return (recipe.tiny() if tiny else recipe).replace(**with_excluded(changes))


def with_excluded(changes: Mapping[str, object]) -> dict[str, object]:
    """Returns the changes with what switches off the keys that they exclude: of `updates=100`, `epochs=None`."""
    given = {saved.current_key(key): value for key, value in changes.items()}
    excluded = {other: off for key, other, off in _EXCLUSIVE if given.get(key) is not None and other not in given}
    return {**changes, **excluded}


_EXCLUSIVE = (
    ("updates", "epochs", None),
    ("epochs", "updates", None),
    ("warmup_updates", "warmup_share", 0.0),
    ("warmup_share", "warmup_updates", 0),
)
"""If the first is given, and not as null, the second is this."""


def _unknown_key(key: str, value: object, kind: type[Recipe]) -> RecipeError:
    if key in Method.model_fields:
        return RecipeError(key, "belongs into the section method", value=value, nearest=key)
    inner = [name for name in kind.descriptions() if name.startswith(f"{key}.")]
    if inner:
        rule = f"is a section; set one of its keys: {', '.join(inner)}"
        return RecipeError(key, rule, value=value, nearest=inner[0])
    nearest = nearest_name(key, kind.descriptions())
    hint = "rdrop list RECIPE shows all" if nearest is None else f"the nearest is {nearest}"
    return RecipeError(key, f"no such key; {hint}", value=value, nearest=nearest)


def _raise_as_recipe_error(error: ValidationError, kind: type[Recipe]) -> NoReturn:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RecipeError):
        raise cause from None
    key = ".".join(str(part) for part in first["loc"]).removeprefix("method.") or "recipe"
    if first["type"] == "extra_forbidden":
        raise _unknown_key(key, first["input"], kind) from None
    if first["type"] == "missing":
        raise RecipeError(key, "is missing; a saved recipe has every key") from None
    rule = TYPE_RULES.get(first["type"]) or str(cause or first["msg"].replace("Input should be", "must be", 1))
    raise RecipeError(key, rule, value=first["input"]) from None
