"""Files that want to be a program: every reader refuses them, or takes them for the text they are, and runs nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.comparison.finished_runs import split_usable
from rdrop.experiments.comparison.looks import read_looks
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import load_recipe
from rdrop.experiments.run_folder import ResultsError, find_runs, holder_of
from rdrop.experiments.run_folder.predictions import read_predictions
from rdrop.experiments.tasks.files import DataError, read_lines
from rdrop.experiments.tasks.image_classification.images import read_class_folders, read_npz
from rdrop.experiments.tasks.pretrained import pretrained_config, pretrained_tokenizer
from rdrop.experiments.tasks.tables import read_table
from rdrop.experiments.tasks.translation.subwords import read_codes
from rdrop.experiments.training.checkpoints import CheckpointError, load_newest_good
from rdrop.integrations.transformers.durable import MANIFEST, why_damaged

REFUSALS = (DataError, RecipeError, ResultsError, CheckpointError)


class Program:
    """Runs a shell command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def zipped(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def object_array(program: Program) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([program, program], dtype=object), allow_pickle=True)
    return content.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Returns files that, taken for what they claim to be, make the file `canary`."""
    command = f"touch {canary}"
    pickled = pickle.dumps(Program(command))
    array = object_array(Program(command))
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    return {
        "pickle": pickled,
        "torch file": zipped(**{"archive/data.pkl": pickled, "archive/version": b"3"}),
        "object array": array,
        "archive of object arrays": zipped(**{"images.npy": array, "labels.npy": array}),
        "absurd header": zipped(**{"images.npy": header.ljust(128), "labels.npy": header.ljust(128)}),
        "names that climb": zipped(**{f"../../../../../../../../{canary}": b"x", "images.npy": array}),
        "bomb": gzip.compress(bytes(50_000_000)),
        "PostScript": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({canary}) (w) file closefile\n".encode(),
        "YAML": f"!!python/object/apply:os.system ['{command}']\n".encode(),
        "Python": f"import os; os.system('{command}')\n".encode(),
        "shell": f"#!/bin/sh\n{command}\n".encode(),
        "page": f"<script>fetch('file://{canary}')</script>\n".encode(),
        "JSON that names a class": json.dumps(
            {
                "__reduce__": ["os.system", command],
                "py/object": "os.system",
                "auto_map": {"AutoConfig": "x--evil.Config"},
            }
        ).encode(),
        "nested JSON": b"[" * 50_000,
        "a number of 5,000 digits": b'{"runs": ' + b"9" * 5_000 + b', "files": ' + b"9" * 5_000 + b"}\n",
        "model settings": json.dumps(
            {"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "someone/kernel"}
        ).encode(),
    }


def run_folder(path: Path) -> None:
    path.with_suffix("").mkdir()
    for name in ("recipe.json", "result.json", "metrics.jsonl", "failed.json", "lock.json", "predictions.jsonl.gz"):
        (path.with_suffix("") / name).write_bytes(path.read_bytes())
    assert split_usable(find_runs(path.with_suffix("")))[0] == []
    read_predictions(path.with_suffix(""))


def remembered(path: Path) -> None:
    path.with_suffix("").mkdir()
    for name in ("looks.jsonl", "arms.jsonl"):
        (path.with_suffix("") / name).write_bytes(path.read_bytes())
    read_looks(path.with_suffix(""))
    read_designs(path.with_suffix(""))


def checkpoint(path: Path) -> None:
    folder = path.with_suffix("") / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).write_bytes(path.read_bytes())
    load_newest_good(path.with_suffix(""))


def durable_checkpoint(path: Path) -> None:
    path.with_suffix("").mkdir()
    (path.with_suffix("") / MANIFEST).write_bytes(path.read_bytes())
    assert why_damaged(path.with_suffix("")) is not None


def images(path: Path) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/1.gif", "b/2.tif"):
        file = path.with_suffix("") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.read_bytes())
    for row in range(4):
        read_class_folders(path.with_suffix("")).read(row)


def model_folder(path: Path) -> None:
    folder = path.with_suffix("")
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "evil.py"):
        (folder / name).write_bytes(path.read_bytes())
    pretrained_tokenizer(str(folder), pretrained_config(str(folder), AutoModel, "text encoder"))


READERS: dict[str, Callable[[Path], object]] = {
    ".txt": read_lines,
    ".txt.gz": read_lines,
    ".csv": lambda path: read_table(path, ["text", "label"]),
    ".tsv.xz": lambda path: read_table(path, ["text", "label"]),
    ".jsonl": lambda path: read_table(path, ["text", "label"]),
    ".codes": read_codes,
    ".npz": read_npz,
    ".images": images,
    ".json": load_recipe,
    ".run": run_folder,
    ".remembered": remembered,
    ".checkpoint": checkpoint,
    ".durable": durable_checkpoint,
    ".model": model_folder,
}


@pytest.mark.parametrize("reader", READERS)
def test_nothing_that_is_read_is_run(reader: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for number, (what, content) in enumerate(payloads(canary).items()):
        path = tmp_path / f"{number}{reader}"
        path.write_bytes(content)
        before = {file for file in tmp_path.iterdir() if file.is_file()}
        with suppress(*REFUSALS):  # and nothing else: a traceback is a failure
            READERS[reader](path)
        assert not canary.exists(), what
        assert {file for file in tmp_path.iterdir() if file.is_file()} == before, what
    assert list(tmp_path.parent.glob("canary")) == []


def test_the_payloads_do_run_where_nobody_takes_care(tmp_path: Path) -> None:
    pickle.loads(payloads(tmp_path / "canary")["pickle"])
    assert (tmp_path / "canary").exists()


def of_run(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        path.parent.joinpath(name).symlink_to(path)
        path.parent.joinpath("metrics.jsonl").touch()
        (run,) = find_runs(path.parent)
        raise ResultsError(str(run.problem))

    return read


def folder_of_model(path: Path) -> object:
    path.parent.joinpath("config.json").symlink_to(path)
    return pretrained_config(str(path.parent), AutoModel, "text encoder")


PIPES: dict[str, Callable[[Path], object]] = {
    "x.txt": read_lines,
    "x.csv": lambda path: read_table(path, ["text", "label"]),
    "x.codes": read_codes,
    "x.npz": read_npz,
    "x.json": load_recipe,
    "looks.jsonl": lambda path: read_looks(path.parent),
    "arms.jsonl": lambda path: read_designs(path.parent),
    "predictions.jsonl.gz": lambda path: read_predictions(path.parent),
    "recipe": of_run("recipe.json"),
    "result": of_run("result.json"),
    "model": folder_of_model,
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_refused_wherever_a_file_is_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(REFUSALS, match=r"is a pipe|a folder, a pipe, a socket or a device|is no file"):
        PIPES[name](tmp_path / name)


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock.json")
    assert "an unknown host" in str(holder_of(tmp_path))
