"""Texts from a file, a path or a setting as they may be shown: nothing in them is a command to the terminal."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Iterable

_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""The Unicode categories of characters that move, hide or color others, or are no characters."""


def escaped(text: str) -> str:
    """Returns the text with its control characters, but tab and newline, as Python writes them: "\\x1b"."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if _is_command(letter) and letter not in "\n\t" else letter
        for letter in text
    )


def shell_word(value: str | os.PathLike[str]) -> str:
    """Returns a word of a shell command that can be shown and pasted: as bash and zsh read it, on one line.

    That is what `shlex.quote` returns, but where there are control characters: `$'...'`, with their bytes as "\\x1b".
    """
    word = os.fspath(value)
    if not any(map(_is_command, word)):
        return shlex.quote(word)
    return f"$'{''.join(map(_in_dollar_quotes, word))}'"


def shell_line(words: Iterable[str]) -> str:
    """Returns a shell command of these words."""
    return " ".join(map(shell_word, words))


def _is_command(letter: str) -> bool:
    return unicodedata.category(letter) in _COMMANDS


def _in_dollar_quotes(letter: str) -> str:
    if _is_command(letter):
        return "".join(f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))
    return f"\\{letter}" if letter in "\\'" else letter
