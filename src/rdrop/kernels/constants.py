"""Marks functions whose results torch.compile takes as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def assume_constant_result(function: _Function) -> _Function:
    """Does what `torch.compiler.assume_constant_result` does, but imports no torch._dynamo, which takes seconds.

    So `import rdrop` is quick; the first call of a kernel makes torch's custom operators import it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
