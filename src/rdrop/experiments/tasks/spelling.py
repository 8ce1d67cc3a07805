"""Tells what a reader sees of a string: whether it is blank, two labels look alike, its script has spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import MAX_PREC, Context, Decimal
from functools import lru_cache
from itertools import chain, islice

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A number as data files write it; `float` also reads "1_000", full-width digits and "nan"."""

UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"})
"""The Unicode categories of characters that show nothing, or nothing by themselves."""
BLANKS = "\u115f\u1160\u2800\u3164\uffa0\U00013441\U00013442\U0001d159"
"""Letters and symbols that show nothing, with a width: Hangul fillers, the empty Braille cell, empty hieroglyphs."""
IGNORED = re.compile("[\u034f\u17b4\u17b5\u180b-\u180f\u2065\ufe00-\ufe0f\ufff0-\ufff8\U00016fe4\U000e0000-\U000e0fff]")
"""What Unicode has renderers leave out, beside the categories Cc and Cf: selectors of variants, and their like."""

# As pandas, R, spreadsheets, databases and C write a missing value; spreadsheets do it in the language of their user.
MISSING = re.compile(
    r"[+-]?[qs]?nan(\(\w*\))? | [+-]?1\.\#(ind|[qs]?nan)0* | nat | n/a | n\.a\.? | null | nil | \\n"
    r"| na_(character|integer|real|complex)_"
    r"| \#(null|na|nv|yok|saknas|puuttuu|hiányzik|není_k_dispozici|getting_data) | \#\w/\w(\ .*)?"
    r"| \#[¡¿]?[^\W\d_][\w/]*[!?] | err:\d{3}",
    re.VERBOSE,
)
MISSING_AS_SPELLED = frozenset({"NA", "na", "None", "NONE"})  # sodium is Na, and "none" may be an answer
MISSING_IN_BRACKETS = MISSING_AS_SPELLED | {"none", ""}
LONGEST_MISSING = 40
"""Characters of the longest that is asked for its spelling: a summary is not."""

LATIN_FORMS = ("АВЕЅІЈКМНОРСТХУаеѕіјорсхуΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABESIJKMHOPCTXYaesijopcxyABEZHIKMNOPTYXo")  # noqa: RUF001
ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u2033", '"'),
        **dict(zip(*LATIN_FORMS, strict=True)),
        **dict.fromkeys(BLANKS, " "),
    }
)
"""What looks like another character: office programs' hyphens and quotes, Cyrillic and Greek letters, blanks."""
EXACT = Context(prec=MAX_PREC)
VALUE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
"""A `NUMBER` that a float may be; an id such as 5e1234567 is none."""
GROUPED = re.compile(r"[+-]?\d{1,3}([ ',]\d{3})+([.,]\d+)?", re.ASCII)
BETWEEN_GROUPS = re.compile(r"[ ',](?=\d{3}(\D|$))", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a00-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u3029\u3031-\u3035\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9ff"
    "\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00011000-\U0001107f\U00011700-\U0001174f\U00011f00-\U00011f5f"
    "\U00012000-\U0001345f\U00016fe0-\U0001b2ff\U00020000-\U0003ffff]"
)
"""A letter of a script without spaces: of Southeast Asia, as Thai, Khmer, Tai Le, Balinese and Javanese; kana and
Bopomofo, Chinese characters, Yi, Tangut, Nushu; Brahmi, cuneiform, hieroglyphs."""


SAMPLE = 100_000


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing of it: it has only spaces, control and zero-width characters, or is empty."""
    return all(unicodedata.category(letter) in UNSEEN or letter in BLANKS or IGNORED.match(letter) for letter in text)


def is_missing(label: str) -> bool:
    """Whether the label is blank, or what programs write for a value that is not there: "nan", "NA", "null"."""
    if len(label) > LONGEST_MISSING or is_blank(label):
        return is_blank(label)
    text = _as_seen(label)
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    inner = text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()", "<>", "{}") else None
    if inner is not None and inner in MISSING_IN_BRACKETS:
        return True
    return not text or text in MISSING_AS_SPELLED or MISSING.fullmatch((inner or text).casefold()) is not None


@lru_cache(maxsize=2**16)
def label_key(label: str) -> str:
    """Returns what all spellings of one label share.

    Blanks at the ends, composition of letters and invisible characters do not count, nor which of the characters that
    look alike it has, nor how a number is written: "1", "1.0" and "1,0" are one label.
    """
    text = _as_seen(label)
    plain = BETWEEN_GROUPS.sub("", text) if GROUPED.fullmatch(text) else text
    if DECIMAL_COMMA.fullmatch(plain):
        plain = plain.replace(",", ".")
    if not VALUE.fullmatch(plain):
        return text
    value = Decimal(plain).normalize(EXACT)
    return str(value) if value else "0"


def is_unspaced(lines: Sequence[str]) -> bool:
    """Whether most of the text is in a script without spaces; its first `SAMPLE` characters decide."""
    text = "".join(islice(chain.from_iterable(lines), SAMPLE))
    return 2 * len(UNSPACED.findall(text)) > len("".join(text.split()))


def note_on_case(names: Iterable[str]) -> dict[str, str]:
    """Returns a note on classes whose names differ in case alone, as "Cat" and "cat" do; else nothing."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(label_key(name.casefold()), []).append(name)
    pairs = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    return {"names of classes": f"{', '.join(pairs)} are different classes by case alone"} if pairs else {}


def _as_seen(label: str) -> str:
    """Returns the label with one character for all that look alike, and without those that show nothing."""
    if label.isascii() and label.isprintable():
        return " ".join(label.split())
    composed = unicodedata.normalize("NFKC", label).translate(ALIKE)
    return " ".join("".join(letter for letter in composed if not _is_ignored(letter)).split())


def _is_ignored(letter: str) -> bool:
    is_control = unicodedata.category(letter) in ("Cf", "Cc") and not letter.isspace()
    return is_control or IGNORED.match(letter) is not None
