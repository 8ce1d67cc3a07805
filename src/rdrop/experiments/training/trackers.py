"""Experiment trackers by the names that Accelerate knows: whether each can be used here."""

from __future__ import annotations

from collections.abc import Iterable


class TrackerError(ValueError):
    """A tracker that Accelerate does not know or cannot use."""


def require_trackers(names: Iterable[str]) -> None:
    """Raises `TrackerError` unless Accelerate knows each tracker and finds its package.

    Accelerate itself leaves out a tracker that is not installed, without a word.
    """
    names = list(names)
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted(str(kind) for kind in LoggerType if kind is not LoggerType.ALL)
    available = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise TrackerError(f"--tracker {name}: no such tracker; Accelerate knows {', '.join(known)}")
        if name not in available:
            package = name.replace("_", "-")
            raise TrackerError(
                f"--tracker {name}: Accelerate does not find it; pip install {package}, or take another of "
                f"{', '.join(known)}"
            )
