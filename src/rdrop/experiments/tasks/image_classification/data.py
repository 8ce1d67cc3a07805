"""Which images are trained on, choose the checkpoint and score it. What has no source of its own is held out of train.

The split that the literature calls the test set is never the one that chooses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.recipe.settings import nearest_name
from rdrop.experiments.tasks.class_scores import notes_on_classes
from rdrop.experiments.tasks.files import DataError, MissingDataError
from rdrop.experiments.tasks.image_classification.images import ImageSet, entries_of, read_hub, read_images
from rdrop.experiments.tasks.image_classification.labels import require_classes_in_use
from rdrop.experiments.tasks.image_classification.repeats import MOST_BYTES, MOST_IMAGES, are_the_same, count_repeated
from rdrop.experiments.tasks.image_classification.sources import Source
from rdrop.experiments.tasks.spelling import note_on_case
from rdrop.experiments.tasks.splits import WHERE_REPEATED, with_every_class

if TYPE_CHECKING:
    from rdrop.experiments.tasks.image_classification.recipes import ImageData

SUFFIXES = ("", ".npz", ".bin")
"""What is tried after the name of a split: a folder of class folders, or a file."""
SYNONYMS = (("train",), ("valid", "validation", "val"), ("test",))
PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))


class Split(NamedTuple):
    images: ImageSet
    rows: NDArray[np.int64]
    """Those of the images that are in this split."""


class Unlabeled(NamedTuple):
    source: Source
    rows: NDArray[np.int64]
    """Those of the images that are learned from without a label."""


def load_splits(data: ImageData, test: str | None = None) -> dict[str, Split]:
    """Loads "train", "valid" and "test" of the first source that is set; `test` of that folder or file."""
    splits = _load(data)
    if test is not None:
        if data.train is not None:
            _require_own_places({"train": Path(data.train), "test": Path(test)})
        images = _read_own(Path(test)).with_classes(splits["train"].images.classes)
        splits["test"] = Split(images, np.arange(len(images)))
    _require_own_images(splits)
    for images, rows in splits.values():
        require_light(images.source, rows, images.where)
    _require_different(*splits["train"])
    return splits


def require_light(source: Source, rows: NDArray[np.int64], where: str) -> None:
    """Refuses images none of which has a pixel above 1: those of masks, or divided by 255. Reads until one has."""
    if all(np.asarray(source.read(int(row))).max() <= 1 for row in rows):
        raise DataError(
            f"{where}: no pixel of its {len(rows)} images is above 1, and white is 255; multiply them by 255"
        )


def _require_different(images: ImageSet, rows: NDArray[np.int64]) -> None:
    """Refuses images to train on that are all one. Reads until two differ."""
    first, *others = (int(row) for row in rows)
    content = images.source.stored(first)
    if others and all(images.source.stored(row) == content for row in others):
        raise DataError(f"{images.where}: all {len(rows)} images to train on are the same; give different ones")


def notes_on(splits: Mapping[str, Split]) -> dict[str, str]:
    """Returns what a reader of the scores should know of the images: classes without any, images in two splits."""
    classes = splits["train"].images.classes
    labels = {name: images.labels[rows] for name, (images, rows) in splits.items()}
    notes = note_on_case(classes) | notes_on_classes(classes, labels)
    for first, second in PAIRS:
        known, rows = splits[first]
        said = _said_of_repeats(known.source, rows, splits[second])
        if said is not None:
            notes[f"{second} images that are {WHERE_REPEATED[first]}"] = said
    return notes


def note_on_unlabeled(test: Split, unlabeled: Unlabeled | None) -> dict[str, str]:
    """Returns how many images of test are among those that are learned from without a label, if any are."""
    if unlabeled is None:
        return {}
    said = _said_of_repeats(unlabeled.source, unlabeled.rows, test)
    return {} if said is None else {f"test images that are {WHERE_REPEATED['unlabeled']}": said}


def _said_of_repeats(known: Source, known_rows: NDArray[np.int64], scored: Split) -> str | None:
    """Says how many of the images that are scored are among the known ones; None where none is."""
    count = count_repeated(known, known_rows, scored.images.source, scored.rows)
    if count is None:
        return f"not counted: above {MOST_IMAGES:,} images or {MOST_BYTES >> 30} GiB nothing is compared"
    return f"{count} of {len(scored.rows)}, byte for byte" if count else None


def _load(data: ImageData) -> dict[str, Split]:
    if data.train is not None:
        named = {"train": data.train, "valid": data.valid, "test": data.test}
        own = {name: Path(path) for name, path in named.items() if path is not None}
        _require_own_places(own)
        return _with_held_out({name: _read_own(path) for name, path in own.items()}, data)
    if data.folder is not None:
        found = _read_folder(Path(data.folder), data)
    elif data.hub is not None:
        found = _read_hub(data.hub, data)
    else:
        raise DataError(
            "no images are given; set data.train or data.folder to a folder with a sub-folder for each class, or "
            "data.hub to the id of a data set"
        )
    _require_count(found, "train", data.expected_train)
    _require_count(found, "test", data.expected_test)
    return _with_held_out(found, data)


def _read_own(path: Path) -> ImageSet:
    if _is_cut_into_splits(path):
        raise DataError(
            f"{path}: has a split {_find_split(path, 'train')}; give it as data.folder, or its parts one by one"
        )
    return read_images(path)


def _read_folder(folder: Path, data: ImageData) -> dict[str, ImageSet]:
    """A folder of splits; or one split, from which the others are held out: class folders, or one file."""
    if not os.path.isdir(folder):
        raise MissingDataError(f"{folder}: there is no such folder; set data.folder to the one with the images")
    if not _is_cut_into_splits(folder):
        paths = [Path(entry.path) for entry in entries_of(folder)]
        files = [path for path in paths if path.suffix in SUFFIXES[1:]]
        is_one_file = len(files) == 1 and not any(map(os.path.isdir, paths))
        return {"train": read_images(files[0] if is_one_file else folder)}
    _require_known_names(folder)
    wanted = {"train": "train", "valid": data.valid_split, "test": data.test_split}
    found = {name: _find_split(folder, split) for name, split in wanted.items() if split is not None}
    places = {name: place for name, place in found.items() if place is not None}
    _require_own_places(places)
    return {name: read_images(place) for name, place in places.items()}


def _read_hub(hub: str, data: ImageData) -> dict[str, ImageSet]:
    wanted = {"train": "train", "valid": data.valid_split, "test": data.test_split}
    return {
        name: read_hub(hub, data.hub_config, split, data.image_column, data.label_column)
        for name, split in wanted.items()
        if split is not None
    }


def _is_cut_into_splits(folder: Path) -> bool:
    """Whether it has train images of its own. A class may be called "train" too: its folder holds no folders."""
    found = _find_split(folder, "train")
    return found is not None and (found.is_file() or any(os.path.isdir(entry.path) for entry in entries_of(found)))


def _find_split(folder: Path, split: str) -> Path | None:
    names = next((names for names in SYNONYMS if split in names), (split,))
    paths = [folder / f"{name}{suffix}" for name in (split, *names) for suffix in SUFFIXES]
    return next((path for path in paths if os.path.isdir(path) or (path.suffix and os.path.isfile(path))), None)


def _require_own_places(places: Mapping[str, Path]) -> None:
    resolved = [(place.resolve(), name) for name, place in places.items()]
    for (place, name), (other_place, other) in combinations(resolved, 2):
        if place == other_place:
            raise DataError(f"{place}: is both {name} and {other}; each needs images of its own, so name another")


def _require_known_names(folder: Path) -> None:
    """A split whose name has a slip, or that is packed, would be silently replaced by one that is held out."""
    known = [name for names in SYNONYMS for name in names]
    for names in SYNONYMS:
        found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        there = [path for path in found if os.path.exists(path)]
        if len(there) > 1:
            raise DataError(f"{there[0]} and {there[1].name} are one split; move the one away that is not meant")
    for entry in sorted(folder.iterdir()):
        if entry.name.partition(".")[0] in known and entry.suffix not in SUFFIXES:
            raise DataError(f"{entry}: is no folder, .npz or .bin file; unpack or convert it, or move it away")
        is_split = (entry.is_dir() or entry.suffix in SUFFIXES[1:]) and not entry.name.startswith(".")
        if is_split and entry.stem not in known:
            nearest = nearest_name(entry.stem, known)
            hint = f"they are {', '.join(known)}" if nearest is None else f"the nearest name is {nearest}"
            raise DataError(f"{entry}: is no split beside train; {hint}; rename it or move it away")


def _require_count(found: Mapping[str, ImageSet], name: str, expected: int | None) -> None:
    if expected is None:
        return
    if name not in found:
        raise DataError(
            f"{found['train'].where}: there is no {name} split beside it, and data.expected_{name}={expected}; add it, "
            f"or set data.expected_{name}=null"
        )
    if len(found[name]) != expected:
        raise DataError(
            f"{found[name].where}: has {len(found[name])} images, and data.expected_{name}={expected}; get it again, "
            f"or set data.expected_{name}=null"
        )


def _with_held_out(found: Mapping[str, ImageSet], data: ImageData) -> dict[str, Split]:
    train = found["train"]
    asked = {"valid": data.valid_size, "test": data.test_size}
    sizes = {name: asked[name] or len(train) // 10 for name in asked if name not in found}
    if 0 in sizes.values():
        others = [f"data.{name}" if data.train else f"{name} images" for name in sizes if asked[name] is None]
        remedy = f"give 10 or more, or {' and '.join(others)}"
        raise DataError(f"{train.where}: {len(train)} images are too few to hold out 10 %; {remedy}")
    if sum(sizes.values()) >= len(train):
        parts = " and ".join(f"{size} for {name}" for name, size in sizes.items())
        keys = " and ".join(f"data.{name}_size" for name in sizes if asked[name] is not None)
        raise DataError(
            f"{train.where}: {len(train)} images are too few to hold out {parts}; give more, or others for "
            f"{' and '.join(sizes)}, or lower {keys}"
        )
    require_classes_in_use(train.labels, train.classes, train.where, declared=train.declares_classes)
    order = np.random.default_rng(data.split_seed).permutation(len(train))
    drawn = {}
    for name, size in sizes.items():
        drawn[name], order = np.split(order, [size])
    rows = {"train": order, **drawn}
    if data.stratified:
        rows = with_every_class(rows, train.labels, data.split_seed)
    splits = {name: Split(train, np.sort(own)) for name, own in rows.items()}
    for name in sorted(found.keys() - rows.keys()):
        own = found[name].with_classes(train.classes)
        splits[name] = Split(own, np.arange(len(own)))
    return splits


def _require_own_images(splits: Mapping[str, Split]) -> None:
    """Refuses a copy of the images to train on in the place of others."""
    train = splits["train"].images
    for name in ("valid", "test"):
        images = splits[name].images
        if images is not train and len(images) == len(train) and are_the_same(train.source, images.source, len(train)):
            raise DataError(
                f"{images.where}: has the images of {train.where}, which are train, and is {name}; give others, or "
                f"none, so that {name} is held out of train"
            )
