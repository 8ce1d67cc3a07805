"""The findings of `check_rdrop`, and the report as people and programs read it."""

import json
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from ..dropout import DropoutSource

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing `check_rdrop` found."""

    code: str
    """Stable, for programs: e.g. `no-dropout`. docs/check.md lists them all."""
    severity: Severity
    """`error`: R-Drop cannot act, or acts wrongly; `warning`: it acts, but know this; `note`: for the record."""
    message: str
    remedy: str
    modules: tuple[str, ...] = ()
    """The names of the modules concerned, as in `model.named_modules()`."""


@dataclass(frozen=True)
class Trial:
    """The outcome of two forwards and a backward; with these defaults, nothing was tried."""

    findings: tuple[Finding, ...] = ()
    passes_differ: bool | None = None
    recomputed_differently: tuple[str, ...] = ()
    divergence: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """The report of `check_rdrop`: `print(report)` is for people, `report.as_dict()` for programs."""

    model: str
    findings: tuple[Finding, ...]
    sources: tuple[DropoutSource, ...]
    divergence: float | None
    """Between the two passes, mean over all positions; None where there is nothing to measure."""
    divergence_name: str = "symmetric KL"
    """What it is: `symmetric_kl`, but for recipes with another one."""

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report in what JSON has: dicts, lists, strings, numbers, null."""
        report: dict[str, Any] = json.loads(json.dumps({"ok": self.ok, **asdict(self)}))
        return report

    def __str__(self) -> str:
        verdict = "can act" if self.ok else "cannot act as it should"
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{counts[severity]} {severity}{'s' * (counts[severity] > 1)}" for severity in counts)
        return "\n\n".join(
            [
                f"R-Drop {verdict} on {self.model}: {found or 'nothing found'}",
                *map(_paragraph, self.findings),
                _measurements(self.sources, self.divergence, self.divergence_name),
            ]
        )


def _paragraph(finding: Finding) -> str:
    wrap = partial(textwrap.fill, width=79, break_long_words=False, break_on_hyphens=False)
    message = wrap(finding.message, initial_indent="  ", subsequent_indent="  ")
    remedy = wrap(finding.remedy, initial_indent="  Remedy: ", subsequent_indent="  ")
    return f"{finding.severity}: {finding.code}\n{message}\n{remedy}"


def _measurements(sources: Collection[DropoutSource], divergence: float | None, name: str) -> str:
    rates = Counter(f"{source.kind.replace('_', ' ')} {source.rate:g}" for source in sources if source.active)
    listed = ", ".join(f"{kind_and_rate} (x{count})" for kind_and_rate, count in rates.items())
    lines = [f"sources     {sum(rates.values())} of {len(sources)} active" + (f": {listed}" if listed else "")]
    if divergence is not None:
        lines.append(f"divergence  {divergence:.3g} ({name} of two passes of this batch, in training mode)")
    return "\n".join(lines)


def some(names: Iterable[str], limit: int = 4) -> str:
    names = [name or "the model itself" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
