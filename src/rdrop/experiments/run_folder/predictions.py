"""The predictions of the test split that a run keeps, so that runs can be compared example by example later.

    runs/<recipe name>/<digest>/predictions.jsonl.gz

The first line says what is predicted, each further line is one example of the split, in its order:

    {"format": 1, "kind": "classes", "classes": ["negative", "positive"]}
    {"example": "a fine film", "label": 1, "predicted": 1, "confidence": 0.97, "loss": 0.03}

`kind` is "classes" (`label` and `predicted` are places in `classes`), "numbers" (they are numbers) or "texts"
(`references` and `predicted`; `scores` has the scores of this example alone, `bleu` the counts that BLEU adds up).
`example` is the beginning of the input, or its name. Equal predictions are equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.run_folder.folder import PREDICTIONS as FILE
from rdrop.experiments.run_folder.folder import ResultsError, read_file, write_atomically

FORMAT = 1
LONGEST_EXAMPLE = 200
"""Characters of an input that are kept, so that a reader recognizes it."""
MOST_BYTES = 2**29
"""Of the file when it is unpacked: a small file that unpacks to more is damaged, or an attack."""

_NUMBER = (int, float)
_ROW_TYPES: Mapping[str, Mapping[str, Any]] = {
    "classes": {"example": str, "label": int, "predicted": int, "confidence": _NUMBER, "loss": _NUMBER},
    "numbers": {"example": str, "label": _NUMBER, "predicted": _NUMBER},
    "texts": {"example": str, "references": list, "predicted": str},
}
BLEU_COUNTS = 10
"""Numbers that BLEU adds up: two lengths, then the matching and all n-grams of 1 to 4 words."""


@dataclass(frozen=True)
class Predictions:
    """The answers of a model to the examples of the test split, in its order; the module says which keys a row has."""

    kind: str
    rows: Sequence[Mapping[str, Any]]
    classes: tuple[str, ...] = ()


def class_rows(
    examples: Iterable[str], logits: NDArray[np.floating], labels: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Makes the rows of logits `(N, V)` for `labels` `(N,)`, each with its confidence and its loss."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    log_probabilities = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return [
        {
            "example": excerpt(example),
            "label": int(label),
            "predicted": int(own.argmax()),
            "confidence": _rounded(np.exp(own.max())),
            "loss": _rounded(-own[label]),
        }
        for example, label, own in zip(examples, labels, log_probabilities, strict=True)
    ]


def number_predictions(
    examples: Iterable[str], predicted: NDArray[np.floating], labels: NDArray[np.floating]
) -> Predictions:
    """Makes the predictions of numbers `(N,)` for `labels` `(N,)`."""
    rows = [  # with all their digits: rounded, predictions near 200,000 would be equal
        {"example": excerpt(example), "label": float(label), "predicted": float(own)}
        for example, label, own in zip(examples, labels, predicted, strict=True)
    ]
    return Predictions("numbers", rows)


def text_predictions(
    examples: Iterable[str], texts: Sequence[str], references: Sequence[Sequence[str]], **more: Sequence[Any]
) -> Predictions:
    """Makes the predictions of texts; `more` are further keys of a row by name, an entry an example: scores, bleu."""
    columns = zip(*more.values(), strict=True) if more else [()] * len(texts)
    rows = [
        {"example": excerpt(example), "references": list(own), "predicted": text} | dict(zip(more, values, strict=True))
        for example, text, own, values in zip(examples, texts, references, columns, strict=True)
    ]
    return Predictions("texts", rows)


def excerpt(text: str) -> str:
    """Returns the text in one line, at most `LONGEST_EXAMPLE` characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_EXAMPLE else line[: LONGEST_EXAMPLE - 1] + "…"


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Writes them into the folder of their run."""
    head = {"format": FORMAT, "kind": predictions.kind, "classes": list(predictions.classes)}
    lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in (head, *predictions.rows))
    # Without a date in it, equal predictions are equal bytes.
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    write_atomically(folder / FILE, packed)


def read_predictions(folder: Path) -> Predictions | None:
    """Reads them from the folder of their run; None where it keeps none.

    Raises `ResultsError` for a file that is not what it should be.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        head, *rows = (json.loads(line, parse_constant=_refuse) for line in _unpacked(path).split(b"\n")[:-1])
        predictions = Predictions(head["kind"], rows, tuple(map(str, head["classes"])))
        is_whole = head["format"] == FORMAT and all(_is_whole(row, predictions) for row in rows)
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(f"{path}: cannot be read ({type(error).__name__}: {error}). {_REMEDY}") from error
    if not is_whole:
        raise ResultsError(f"{path}: is of another version of rdrop, or damaged. {_REMEDY}")
    return predictions


_REMEDY = "Delete it: the run is compared without its predictions, or run the recipe again."


def _unpacked(path: Path) -> bytes:
    with gzip.open(io.BytesIO(read_file(path))) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes unpacked")
    return content


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _is_whole(row: Any, predictions: Predictions) -> bool:
    types = _ROW_TYPES[predictions.kind]
    if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in types.items()):
        return False
    if predictions.kind == "classes":
        return all(0 <= row[key] < len(predictions.classes) for key in ("label", "predicted"))
    if predictions.kind == "numbers":
        return True
    numbers = [*row.get("scores", {}).values(), *(count for counts in row.get("bleu", {}).values() for count in counts)]
    return (
        bool(row["references"])
        and all(isinstance(number, int | float) for number in numbers)
        and all(len(counts) == BLEU_COUNTS for counts in row.get("bleu", {}).values())
    )


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")
