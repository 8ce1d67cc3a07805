"""HTML that cannot be broken by what it shows: every text is escaped unless it is `Markup` already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is HTML, to be written as it is."""

    __slots__ = ()


def element(tag: str, *children: str | None, **attributes: str | None) -> Markup:
    """`element("td", "a < b", class_="wide")` is `<td class="wide">a &lt; b</td>`.

    Children and attributes that are None are left out. In the name of an attribute an underscore is a hyphen, and one
    at the end is dropped.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opening = "".join(f' {name}="{escape(value)}"' for name, value in given.items())
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>")
    return Markup(f"<{tag}{opening}>{joined(children)}</{tag}>")


def joined(children: Iterable[str | None]) -> Markup:
    """The children one after the other, texts escaped, None left out."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))
