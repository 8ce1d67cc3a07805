"""A recipe is complete, strict and replayable; a wrong one is one error that names the key and the rule."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from rdrop.experiments.launch.plan import plan_arms
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError, nearest_name
from rdrop.experiments.recipes import RECIPES, TASKS, find_recipe, load_recipe
from rdrop.experiments.run_folder import saved
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT

DOCS = Path(__file__).parents[2] / "docs"


# The recipe of the digits with numbers of this file's own, so that tuning the recipe breaks no test.
BASE = override(DIGITS_VIT, [
    "name=digits", "alpha=1", "passes=2", "every=1", "updates=400", "batch_size=32", "accumulation=1",
    "learning_rate=0.001", "schedule=cosine", "warmup_updates=40", "weight_decay=0.01", "clip_norm=1",
    "label_smoothing=0", "precision=fp32", "evaluate_every=40", "checkpoint_every=100", "keep_checkpoints=2",
    "seed=0", "data.train_labels=300", "data.valid_size=300", "data.test_size=1000", "data.split_seed=0",
    "model.layers=4", "model.hidden_size=64", "model.heads=4", "model.intermediate_size=128",
    "model.patch_size=2", "model.dropout=0.1", "model.attention_dropout=0.1",
])  # fmt: skip


def refusal(*settings: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        override(BASE, settings)
    return caught.value


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_saved_recipe_loads_as_the_same_value_with_the_same_digest(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    loaded = load_recipe(path)
    assert loaded == recipe
    assert type(loaded) is type(recipe)
    assert loaded.digest() == recipe.digest()


def test_the_digest_has_12_hexadecimal_digits_and_ignores_how_a_number_is_written() -> None:
    assert len(BASE.digest()) == 12
    assert int(BASE.digest(), 16) >= 0
    assert override(BASE, ["alpha=1"]).digest() == override(BASE, ["alpha=1.0"]).digest()


def test_every_key_changes_the_digest() -> None:
    other = {
        "name": '"other"', "alpha": "2", "alpha_schedule": '"linear"',
        "passes": "3", "every": "2", "updates": "399", "batch_size": "30",
        "dropout": "[0.1,0.3]", "task_passes": '"first"', "divergence": '"from-first"',
        "optimizer": '"sgd"', "beta1": "0.8", "beta2": "0.98", "epsilon": "1e-6", "compile": "true", "fused": "true",
        "encoder_once": "true", "views": '"each"', "patience": "3", "select_by": '"loss"', "average_last": "5",
        "accumulation": "2", "learning_rate": "0.002", "schedule": '"linear"', "warmup_updates": "41",
        "weight_decay": "0.02", "clip_norm": "null", "label_smoothing": "0.1", "precision": '"bf16"',
        "evaluate_every": "41", "checkpoint_every": "99", "keep_checkpoints": "3", "seed": "1",
        "init_from": '"runs"',
        "data.train_labels": "299", "data.valid_size": "299", "data.test_size": "999", "data.split_seed": "1",
        "data.shift": "2", "data.unlabeled": "all", "data.unlabeled_batch": "32",
        "model.layers": "3", "model.hidden_size": "32", "model.heads": "2", "model.intermediate_size": "64",
        "model.patch_size": "4", "model.dropout": "0.2", "model.attention_dropout": "0.2",
    }  # fmt: skip
    need_another = {"cutoff", "cutoff_ratio", "batch_tokens", "epochs", "warmup_share", "model.kind"}
    assert {*other, "task", *need_another} == set(BASE.descriptions())
    digests = {override(BASE, [f"{key}={value}"]).digest() for key, value in other.items()}
    assert len(digests) == len(other)
    assert BASE.digest() not in digests


def test_override_changes_the_named_keys_and_no_other() -> None:
    changed = override(BASE, ["alpha=0.5", "data.train_labels=100", "clip_norm=null", "schedule=linear"])
    assert (changed.method.alpha, changed.data.train_labels, changed.clip_norm, changed.schedule) == (
        0.5,
        100,
        None,
        "linear",
    )
    assert changed.replace(**{key: BASE.value(key) for key in BASE.descriptions()}) == BASE


@pytest.mark.parametrize(("old", "new"), [("warmup_steps=7", "warmup_updates=7"), ("method.alpha=3", "alpha=3")])
def test_a_key_by_its_earlier_name_or_with_the_section_is_the_key(old: str, new: str) -> None:
    assert override(BASE, [old]) == override(BASE, [new])


def test_a_task_and_a_recipe_by_their_earlier_names_are_found() -> None:
    assert find_recipe("language-modelling") is find_recipe("language-modeling")
    changed = override(find_recipe("text-classification"), ["data.unlabelled=a.csv", "data.unlabelled_batch=2"])
    assert (changed.value("data.unlabeled"), changed.value("data.unlabeled_batch")) == ("a.csv", 2)


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        BASE.method.alpha = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        BASE.data.train_labels = 2


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("alhpa=1", "alpha"),
        ("batchsize=8", "batch_size"),
        ("lr=0.1", "learning_rate"),
        ("hidden_dropout=0.1", "model.dropout"),
        ("train_labels=10", "data.train_labels"),
        ("data.labels=10", "data.train_labels"),
        ("model.layer=1", "model.layers"),
        ("alpha.x=1", "alpha"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_valid_one(setting: str, nearest: str) -> None:
    error = refusal(setting)
    assert error.nearest == nearest
    assert error.key == setting.partition("=")[0]
    assert str(error) == f"{error.key}={setting.partition('=')[2]}: no such key; the nearest is {nearest}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["alpha=-1"], "alpha=-1: must be greater than or equal to 0"),
        (["alpha=Infinity"], "alpha=Infinity: must be a finite number"),
        (["alpha=.5"], 'alpha=".5": must be a number as JSON writes it, e.g. 0.3 or 1e-3'),
        (["updates=400.0"], "updates=400.0: must be a whole number"),
        (["seed=true"], "seed=true: must be a whole number"),
        (["passes=1"], "passes=1: must be greater than or equal to 2"),
        (["schedule=step"], "schedule=\"step\": must be 'constant', 'linear', 'cosine' or 'inverse-sqrt'"),
        (
            ["dropout=0.1"],
            "dropout=0.1: must be a list, written [0.1,0.3] (a rate for each pass; the model's own is model.dropout)",
        ),
        (["dropout=[0.1,0.2,0.3]"], "dropout=[...]: must have passes (=2) rates, one for each"),
        (
            ["dropout=[0.1,0.2]", "cutoff=token", "cutoff_ratio=0.1"],
            "dropout=[...]: must be null with a cutoff, whose passes share a forward",
        ),
        (["cutoff=token"], "cutoff_ratio=0: must be above 0 for cutoff (=token)"),
        (["cutoff_ratio=0.1"], "cutoff_ratio=0.1: must be 0 without a cutoff; set cutoff too"),
        (["batch_tokens=100"], "batch_size=32: set either it or batch_tokens, and the other to null"),
        (["batch_size=null"], "batch_size=null: set either it or batch_tokens, and the other to null"),
        (
            ["schedule=inverse-sqrt", "warmup_updates=0"],
            "warmup_updates=0: must be at least 1 for the schedule inverse-sqrt",
        ),
        (["optimizer=nag", "beta1=0"], "beta1=0: must be above 0 for the optimizer nag: it is the momentum"),
        (
            ["fused=true", "task_passes=first"],
            'fused=true: must be false where dropout is set, task_passes is not "all" or divergence not "symmetric"',
        ),
        (
            ["fused=true", "divergence=from-first"],
            'fused=true: must be false where dropout is set, task_passes is not "all" or divergence not "symmetric"',
        ),
        (["alpha=1", "dropout=[0,0]"], "dropout=[...]: must have a rate above 0, or all passes would be the same"),
        (["alpha=1", "method.alpha=3"], "alpha=3: given twice, by two of its names"),
        (["warmup_steps=5", "warmup_updates=7"], "warmup_updates=7: given twice, by two of its names"),
        (
            ["alpha=auto", "method.alpha_schedule=linear"],
            'alpha_schedule="linear": must be left out with alpha="auto", which is a schedule itself',
        ),
        (["tiny=1"], "tiny=1: must be true or false"),
        (["name=looks.jsonl"], 'name="looks.jsonl": ends as files of the folder of the runs do; leave the ending out'),
        (["accumulation=5"], "batch_size=32: must be divisible by accumulation (=5)"),
        (["updates=20"], "warmup_updates=40: must be at most updates (=20)"),
        (["every=500"], "every=500: must be at most updates (=400)"),
        (["epochs=3", "updates=400"], "updates=400: set either it or epochs, and the other to null"),
        (["updates=null"], "updates=null: set either it or epochs, and the other to null"),
        (["epochs=0", "updates=null"], "epochs=0: must be greater than 0"),
        (["warmup_share=0.1", "warmup_updates=40"], "warmup_share=0.1: must be 0 with warmup_updates (=40), or that 0"),
        (["alpha"], "alpha: a setting is written key=value, e.g. alpha=..."),
        (["alpha=1", "alpha=1"], "alpha=1: given twice"),
        (["model.heads=5"], "model.hidden_size=64: must be divisible by model.heads (=5)"),
        (["model.patch_size=3"], "model.patch_size=3: must divide the edge of the image, 8 pixels"),
        (["data.train_labels=31"], "batch_size=32: must be at most data.train_labels (=31)"),
        (
            ["data.valid_size=498"],
            "data.train_labels=300: with data.valid_size and data.test_size it makes 1798 images, but there are 1797",
        ),
    ],
)
def test_a_refusal_names_key_value_and_rule(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override(BASE, settings)
    assert str(caught.value) == message


def test_a_section_is_set_key_by_key() -> None:
    assert "set one of its keys: data.train_labels" in str(refusal("data=3"))


def test_rdrop_without_any_dropout_is_refused_and_plain_training_without_dropout_is_not() -> None:
    without = ["model.dropout=0", "model.attention_dropout=0"]
    assert "alpha=0 for plain training" in str(refusal("alpha=1", *without))
    assert override(BASE, ["alpha=1", *without[:1]]).method.alpha == 1
    assert override(BASE, ["alpha=0", *without]).method.alpha == 0


def test_a_value_that_floods_the_line_is_cut() -> None:
    assert len(str(refusal("alpha=" + "x" * 10_000))) < 200
    assert len(str(refusal("alpha=" + "[" * 10_000))) < 200
    assert len(str(refusal("x" * 10_000 + "=1"))) < 200


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("", "recipe", "is not JSON"),
        ("[1, 2]", "recipe", "must be a JSON object"),
        ("{" * 100_000, "recipe", "is not JSON"),
        ("[" * 100_000, "recipe", "is nested too deeply"),
        ('{"alpha": 1, "alpha": 2}', "alpha", "given twice"),
        ('{"alpha": 1}', "task", "must be one of "),
        ('{"task": "digts"}', "task", "must be one of "),
        (json.dumps({**BASE.saved(), "alhpa": 1}), "alhpa", "the nearest is alpha"),
        (json.dumps({**BASE.saved(), "method": {"alpha": "1"}}), "alpha", "must be a number"),
        (json.dumps({**BASE.saved(), "method": {"alpha": float("nan")}}), "alpha", "must be a finite number"),
        (json.dumps({**BASE.saved(), "alpha": 1.0}), "alpha", "belongs into the section method"),
        (json.dumps({**BASE.saved(), "method": {"alpha": 1.0}}), "passes", "is missing; a saved recipe has every key"),
        (
            json.dumps({**BASE.saved(), "format": saved.FORMAT + 1}),
            "format",
            "reads recipes of the formats 1 to 3; take the version that",
        ),
        (json.dumps({**BASE.saved(), "data": {"train_labels": 3}}), "data.valid_size", "is missing"),
        (json.dumps({**BASE.saved(), "model": None}), "model", "must be a valid dictionary"),
        (" " * (2**20 + 1), "recipe", "at most 1048576 bytes"),
    ],
)
def test_a_damaged_recipe_file_is_one_error_with_its_path(text: str, named: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert caught.value.key == named
    assert str(caught.value).startswith(f"{path}: ")


def test_no_key_of_a_saved_recipe_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for key in BASE.saved().keys() - {"format"}:
        path.write_text(json.dumps({name: value for name, value in BASE.saved().items() if name != key}))
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.key == key


def test_a_file_that_is_not_there_or_not_text_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(tmp_path / "recipe.json")


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert find_recipe("digits-vit") is DIGITS_VIT
    (tmp_path / "recipe.json").write_text(BASE.to_json())
    assert find_recipe(str(tmp_path / "recipe.json")) == BASE
    (tmp_path / "recipe.json").write_text(BASE.to_json(), encoding="utf-8-sig")
    assert find_recipe(str(tmp_path / "recipe.json")) == BASE
    with pytest.raises(RecipeError, match="the nearest is digits"):
        find_recipe("digit")


def test_the_name_of_a_file_must_be_utf_8() -> None:
    recipe = RECIPES["text-classification"]
    with pytest.raises(RecipeError, match=r"^data\.train=.*: is not UTF-8, and cannot be saved; rename the file"):
        recipe.replace(**{"data.train": "donn\udce9es.csv"})
    with pytest.raises(RecipeError, match=r"^data\.hub_splits=.*: is not UTF-8"):
        recipe.replace(**{"data.hub_splits": ["train", "\udce9"]})


def test_every_key_is_described() -> None:
    for recipe in RECIPES.values():
        for key, description in recipe.descriptions().items():
            assert description.endswith("."), key


def test_the_nearest_name_prefers_the_last_part_then_the_initials() -> None:
    names = ["learning_rate", "model.dropout", "every"]
    assert nearest_name("dropout", names) == "model.dropout"
    assert nearest_name("lr", names) == "learning_rate"
    assert nearest_name("evry", names) == "every"
    assert nearest_name("EVERY", names) == "every"


def test_a_name_that_is_like_no_other_has_no_nearest() -> None:
    assert nearest_name("device", ["views", "learning_rate", "every"]) is None
    assert nearest_name("nope", RECIPES) is None
    assert refusal("device=cpu").nearest is None


@pytest.mark.parametrize("name", ["text-classification", "image-classification", "cnn-dailymail"])
def test_a_model_from_scratch_is_made_by_following_the_message(name: str) -> None:
    with pytest.raises(RecipeError, match=r"must be given for a model from scratch .*, as in: ") as error:
        override(RECIPES[name], ["model.name=null", "model.heads=2"])
    sizes = str(error.value).partition(", as in: ")[2].split()
    assert not any(size.startswith("model.heads") for size in sizes)
    override(RECIPES[name], ["model.name=null", "model.heads=2", *sizes])


def test_the_table_of_keys_in_the_documentation_is_the_code_s() -> None:
    rows = [f"| `{key}` | {description} |" for key, description in DIGITS_VIT.descriptions().items()]
    table = "\n".join(["| key | meaning |", "|---|---|", *rows])
    assert table in (DOCS / "recipes.md").read_text(), f"docs/recipes.md must hold this table:\n{table}"


OWN_DATA = sorted(task.replace("_", "-") for task in set(TASKS) - {"digits"})


@pytest.mark.parametrize("name", OWN_DATA)
def test_of_two_sources_neither_is_left_unread(name: str) -> None:
    for settings, said in (
        (["data.train=a", "data.folder=b"], r'^data\.folder="b": must be null with data\.train'),
        (["tiny=true", "data.train=a"], r'^data\.train="a": must be null with data\.tiny'),
        (["tiny=true", "data.folder=a"], r'^data\.folder="a": must be null with data\.tiny'),
    ):
        with pytest.raises(RecipeError, match=said):
            override(RECIPES[name], settings)


@pytest.mark.parametrize("name", OWN_DATA)
@pytest.mark.parametrize("source", ["train", "folder"])
def test_the_tiny_form_of_a_recipe_with_files_has_none(name: str, source: str) -> None:
    tiny = override(RECIPES[name].replace(**{f"data.{source}": "x"}), ["tiny=true"])
    assert tiny == RECIPES[name].tiny()


@pytest.mark.parametrize("name", OWN_DATA)
@pytest.mark.parametrize("key", ["valid", "test"])
def test_a_file_that_no_task_would_read_is_refused(name: str, key: str) -> None:
    with pytest.raises(RecipeError, match=rf'^data\.{key}="x": needs data\.train$'):
        RECIPES[name].replace(**{f"data.{key}": "x"})


def test_a_batch_larger_than_the_labels_is_refused_before_anything_is_trained() -> None:
    recipe = find_recipe("text-classification").replace(**{"data.train": "a.csv", "data.labels": 12, "batch_size": 8})
    with pytest.raises(
        RecipeError, match=r"^batch_size=16: must be at most data\.labels \(=12\); this is the baseline with 2"
    ):
        plan_arms(recipe, larger_batch=True)
    assert len(plan_arms(recipe, larger_batch=False).arms) == 2


EPOCHS = BASE.replace(updates=None, epochs=2.5, warmup_updates=0, warmup_share=0.1, evaluate_every=None)


def test_epochs_are_updates_once_the_number_of_examples_is_known() -> None:
    trained = EPOCHS.in_updates(100.0)
    assert (trained.updates, trained.epochs) == (250, None)
    assert (trained.warmup_updates, trained.warmup_share) == (25, 0.0)
    assert (trained.evaluate_every, trained.checkpoint_every) == (100, BASE.checkpoint_every)
    assert EPOCHS.in_updates(3.4).updates == 8


def test_a_training_is_at_least_one_update() -> None:
    trained = EPOCHS.in_updates(0.1)
    assert (trained.updates, trained.warmup_updates, trained.evaluate_every) == (1, 1, 1)


def test_a_recipe_in_updates_is_trained_as_it_is() -> None:
    assert BASE.in_updates(3.0) == BASE


def test_a_part_that_is_longer_than_the_epochs_is_refused_once_that_is_known() -> None:
    with pytest.raises(RecipeError, match=re.escape("every=500: must be at most updates (=250)")):
        EPOCHS.replace(every=500).in_updates(100.0)


def test_a_recipe_in_epochs_is_saved_as_that_and_others_without_the_key() -> None:
    assert (EPOCHS.saved()["updates"], EPOCHS.saved()["epochs"]) == (None, 2.5)
    assert "epochs" not in BASE.saved()
    assert EPOCHS.parse(EPOCHS.saved()) == EPOCHS


def test_of_two_keys_that_exclude_each_other_the_typed_one_holds() -> None:
    changed = override(EPOCHS, ["updates=500"])
    assert (changed.updates, changed.epochs) == (500, None)
    assert changed.in_updates(7.0).warmup_updates == 50
    assert override(changed, ["epochs=2.5"]) == EPOCHS
    changed = override(EPOCHS, ["updates=500", "warmup_steps=7"])
    assert (changed.warmup_updates, changed.warmup_share) == (7, 0.0)
    assert override(BASE, ["updates=500"]) == BASE.replace(updates=500)


def test_a_warmup_of_zero_is_none() -> None:
    assert EPOCHS.warmup_share > 0
    assert override(EPOCHS, ["warmup_updates=0"]).in_updates(100.0).warmup_updates == 0
    assert BASE.warmup_updates > 0
    assert override(BASE, ["warmup_share=0.0"]).warmup_updates == 0


def test_both_lengths_or_neither_are_refused() -> None:
    for settings in (["updates=500", "epochs=2.0"], ["updates=null", "epochs=null"]):
        with pytest.raises(RecipeError, match="set either it or epochs, and the other to null"):
            override(EPOCHS, settings)


def test_alpha_auto_is_four_with_the_square_of_progress() -> None:
    recipe = override(DIGITS_VIT, ["alpha=auto"])
    assert (recipe.method.alpha, recipe.method.alpha_schedule) == (4.0, "quadratic")
    assert override(DIGITS_VIT, ["method.alpha=auto"]) == recipe
    with pytest.raises(RecipeError, match='must be left out with alpha="auto"'):
        recipe.replace(alpha="auto", alpha_schedule="linear")


def test_a_compiled_model_is_not_cut_at_some_updates_only() -> None:
    cut = ["tiny=true", "compile=true", "cutoff=embedding", "cutoff_ratio=0.3"]
    with pytest.raises(RecipeError, match=r"compile=true: must be false with a cutoff .* and every \(=3\) above 1"):
        override(RECIPES["glue-rte"], [*cut, "every=3"])
    override(RECIPES["glue-rte"], [*cut, "every=1"])


def test_columns_that_are_one_are_named_by_the_key_that_repeats_it() -> None:
    with pytest.raises(RecipeError, match=r"data\.label_column=.text.: must differ from data\.text_column"):
        override(RECIPES["text-classification"], ["tiny=true", "data.label_column=text"])


def test_an_arm_in_updates_of_a_recipe_in_epochs_is_called_by_its_updates() -> None:
    plan = plan_arms(RECIPES["text-classification"], ["updates=50"], larger_batch=False)
    assert [label for label in plan.arms if "updates" in label] == ["R-Drop (alpha 1), 50 updates"]
