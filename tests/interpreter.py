"""Triton's interpreter as the tests need it: rounding bfloat16 as a GPU does, and several times faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from rdrop.kernels import triton


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Mends the interpreter within the block; does nothing where kernels are compiled or there is no triton."""
    if triton.why_not() is not None or not triton._interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang
    patched = set()

    def convert_rounding_to_nearest(data, source, target, mode):  # the interpreter's own cuts the bits off
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = data.view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (np.where(np.isnan(data), bits | 0x400000, rounded) >> 16).astype(np.uint16)

    def call(function, *args, **options):  # the interpreter's own patches all of triton.language again at each call
        if function.fn.__module__ not in patched:
            patch(function.fn)
            patched.add(function.fn.__module__)
        return function.rewrite()(*args, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_convert_float", convert_rounding_to_nearest)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
