"""The terminal, to which nothing that a file or a path says is a command."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Span, Text

from rdrop.experiments.shown import escaped


class Terminal(Console):
    """A console that takes texts as they are: brackets are no markup, and control characters are shown escaped.

    That holds for every text, also in tables and bars: all that a console shows goes through `render`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = _escaped_text(renderable)  # before it is broken into lines: it gets longer
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


@contextmanager
def escaped_warnings() -> Iterator[None]:
    """Escapes Python's warnings, too, where they are shown on the standard error."""
    original = warnings.formatwarning

    def formatted(*what: Any, **more: Any) -> str:
        return escaped(original(*what, **more))

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = original


def _escaped_text(text: Text) -> Text:
    """Returns the text with its control characters escaped and its own colors where they were."""
    if escaped(text.plain) == text.plain:
        return text
    at = [0, *accumulate(len(escaped(letter)) for letter in text.plain)]
    found = text.copy()
    found.plain = escaped(text.plain)
    found.spans = [Span(at[span.start], at[min(span.end, len(at) - 1)], span.style) for span in text.spans]
    return found
