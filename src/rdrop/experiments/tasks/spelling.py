"""Tells what a reader sees of a string: whether it is blank, two labels look alike, its script has spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import chain, islice

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A number as data files write it; `float` also reads "1_000", full-width digits and "nan"."""

UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"})
"""The Unicode categories of characters that show nothing, or nothing by themselves."""
UNSEEN_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul fillers, the empty Braille cell

# As pandas, R, spreadsheets, databases and C write a missing value.
MISSING = frozenset(
    {
        *("nan", "-nan", "-nan(ind)", "1.#qnan", "-1.#ind", "nat", "null", "(null)", "\\n", "n/a", "<na>"),
        *("#n/a", "#na", "#n/a n/a", "#value!", "#div/0!", "#ref!", "#name?", "#num!", "#null!"),
    }
)
MISSING_AS_SPELLED = frozenset({"NA", "na", "None"})  # sodium is Na, and "none" may be an answer

ALIKE = str.maketrans(
    {**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"), **dict.fromkeys("\u2018\u2019\u02bc", "'")}
)
"""What office programs write in the place of hyphens, minus signs and apostrophes."""

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""A letter of a script without spaces: Thai, Lao, Burmese, Khmer, kana, or a Chinese character."""


SAMPLE = 100_000


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing of it: it has only spaces, control and zero-width characters, or is empty."""
    return all(unicodedata.category(letter) in UNSEEN or letter in UNSEEN_LETTERS for letter in text)


def is_missing(label: str) -> bool:
    """Whether the label is blank, or what programs write for a value that is not there: "nan", "NA", "null"."""
    text = label.strip()
    return is_blank(text) or text.casefold() in MISSING or text in MISSING_AS_SPELLED


@lru_cache(maxsize=2**16)
def label_key(label: str) -> str:
    """Returns what all spellings of one label share.

    Blanks at the ends, composition of letters and invisible characters do not count, nor which of the dashes and
    apostrophes that look alike it has, nor how a number is written: "1" and "1.0" are one label.
    """
    composed = unicodedata.normalize("NFKC", label).translate(ALIKE)
    seen = (letter for letter in composed if not _is_ignorable(letter))
    text = " ".join("".join(seen).split())
    return str(Decimal(text).normalize() + 0) if NUMBER.fullmatch(text) else text


def is_unspaced(lines: Sequence[str]) -> bool:
    """Whether most of the text is in a script without spaces; its first `SAMPLE` characters decide."""
    text = "".join(islice(chain.from_iterable(lines), SAMPLE))
    return 2 * len(UNSPACED.findall(text)) > len("".join(text.split()))


def note_on_case(names: Iterable[str]) -> dict[str, str]:
    """Returns a note on classes whose names differ in case alone, as "Cat" and "cat" do; else nothing."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(label_key(name).casefold(), []).append(name)
    pairs = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    return {"names of classes": f"{', '.join(pairs)} are different classes by case alone"} if pairs else {}


def _is_ignorable(letter: str) -> bool:
    is_selector = "\ufe00" <= letter <= "\ufe0f" or letter == "\u034f"
    return is_selector or (unicodedata.category(letter) in ("Cf", "Cc") and not letter.isspace())
