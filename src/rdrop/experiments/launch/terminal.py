"""The terminal, to which nothing that a file or a path says is a command."""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""The Unicode categories of characters that move, hide or color others, or are no characters."""


class Terminal(Console):
    """A console that takes texts as they are: brackets are no markup, and control characters are shown escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_as_it_is, objects), **options)


def escaped(text: str) -> str:
    """Returns the text with its control characters, but tab and newline, as Python writes them: "\\x1b"."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _COMMANDS and letter not in "\n\t"
        else letter
        for letter in text
    )


def _as_it_is(shown: Any) -> Any:
    if isinstance(shown, str):
        return Text(escaped(shown))
    if isinstance(shown, Text) and escaped(shown.plain) != shown.plain:
        return Text(escaped(shown.plain), shown.style)
    return shown
