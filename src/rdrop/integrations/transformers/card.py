"""The section of a model card that states the settings of R-Drop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAPER = "[R-Drop](https://arxiv.org/abs/2106.14448) (Liang et al., NeurIPS 2021)"


def add_section(card: Path, settings: dict[str, Any]) -> None:
    """Writes the section at the end of the card, in the place of one that is there; with alpha 0 none."""
    text, _, _ = card.read_text(encoding="utf-8").partition("\n## R-Drop\n")
    if settings["alpha"] > 0:
        text = f"{text.rstrip()}\n\n{_section(settings)}"
    card.write_text(text, encoding="utf-8")


def _section(settings: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    table = "\n".join(["| setting | value |", "|---|---|", *rows])
    return (
        f"## R-Drop\n\nTrained with {PAPER} by rdrop. The loss is the task loss of "
        f"{settings['passes']} passes, each with its own dropout masks, plus alpha / 2 times their mean divergence.\n\n"
        f"{table}\n"
    )
