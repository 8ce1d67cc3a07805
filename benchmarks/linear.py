"""What the loss costs from hidden states: `python benchmarks/linear.py`, every form side by side in one run.

Each form projects N pairs of hidden states of D features to V classes, computes the loss (label smoothing 0.1, alpha 5,
no label ignored unless its name says so) and the gradients in the hidden states and the weight. Measured and recorded
as in benchmarks/rows.py, in benchmarks/results/linear.jsonl; ratios are to `F.linear` and eager `F.cross_entropy` of
the same 2N rows. Memory includes both gradients; hidden states and weight themselves are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import rows
import torch
import torch.nn.functional as F
from rows import ALPHA, CLOCKS, DTYPES, IGNORED, SMOOTHING, Form, peak_extra_bytes, record, seconds, show
from torch import Tensor

from rdrop import linear_rdrop_loss

SIZES = ((1024, 512, 32_768), (512, 768, 50_265), (256, 1024, 128_256))
PADDING = 0.3
RESULTS = Path(__file__).with_name("results") / "linear.jsonl"


# ---------------------------------------------------------------------------------------------- the forms


class _Parameter(torch.autograd.Function):
    """The weight as an optimizer's step leaves it: without a gradient; the one it gets is dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def forms(weight: Tensor, *, compiled: bool) -> dict[str, Form]:
    """Each from hidden states `(2N, D)` and labels `(N,)`, with `weight` `(V, D)`."""

    def parameter() -> Tensor:
        return _Parameter.apply(torch.zeros((), requires_grad=True), weight)

    def after_linear(loss: Form) -> Form:
        return lambda hidden, labels: loss(F.linear(hidden, parameter()), labels)

    def torch_linear_cross_entropy(hidden: Tensor, labels: Tensor) -> Tensor:
        """Plain cross-entropy of the same rows by PyTorch, in chunks, which exclude label smoothing."""
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, parameter(), labels.repeat(2), options=options)

    def ours(hidden: Tensor, labels: Tensor, alpha: float = ALPHA) -> Tensor:
        return linear_rdrop_loss(hidden, parameter(), labels, alpha=alpha, label_smoothing=SMOOTHING).loss

    def ours_padded(hidden: Tensor, labels: Tensor) -> Tensor:
        padding = torch.arange(len(labels)) % 10 < 10 * PADDING
        return ours(hidden, labels.masked_fill(padding, IGNORED))

    def ours_cross_entropy(hidden: Tensor, labels: Tensor) -> Tensor:
        """Plain cross-entropy of the same rows by the same technique: the floor of `ours`."""
        return ours(hidden, labels, alpha=0.0)

    table = {form.__name__: after_linear(form) for form in (rows.cross_entropy, rows.official, rows.tidy)}
    if compiled:
        tidy = torch.compile(lambda hidden, weight, labels: rows.tidy(F.linear(hidden, weight), labels))
        table["tidy_compiled"] = lambda hidden, labels: tidy(hidden, parameter(), labels)
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        table["torch_linear_cross_entropy"] = torch_linear_cross_entropy
    return table | {"ours": ours, "ours_30_percent_padding": ours_padded, "ours_cross_entropy": ours_cross_entropy}


# ---------------------------------------------------------------------------------------------- measuring


def measure(pairs: int, features: int, classes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, features, generator=g)
    hidden = torch.cat([first, first + 0.2 * torch.randn(pairs, features, generator=g)]).to(DTYPES[options.dtype])
    weight = (3 * torch.randn(classes, features, generator=g) / features**0.5).to(DTYPES[options.dtype])
    labels = torch.randint(0, classes, (pairs,), generator=g)
    table = forms(weight, compiled=options.compile)
    if options.forms:
        table = {name: table[name] for name in ("cross_entropy", *options.forms)}
    clock = CLOCKS[options.clock]
    for form in table.values():  # compiles, loads, warms up
        seconds(form, hidden, labels, clock)
    memory = {name: peak_extra_bytes(form, hidden, labels) for name, form in table.items()}
    times: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(options.rounds):
        for name, form in table.items():
            times[name].append(seconds(form, hidden, labels, clock))
    return [
        record(name, times[name], memory[name], pairs, classes, options)
        | {
            "what": f"{name}: forward and backward from hidden states, {options.clock} time",
            "features": features,
            "command": " ".join(["python", "benchmarks/linear.py", *sys.argv[1:]]),
        }
        for name in table
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument, what, default in zip(
        ("--rows", "--features", "--classes"), ("N, one per size", "D", "V"), zip(*SIZES, strict=True), strict=True
    ):
        arguments.add_argument(argument, type=int, nargs="+", default=default, help=what)
    arguments.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--clock", choices=CLOCKS, default="cpu")
    arguments.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile's form")
    arguments.add_argument("--forms", nargs="+", help="these only, beside cross_entropy, which all are compared with")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    options = arguments.parse_args()
    if not len(options.rows) == len(options.features) == len(options.classes):
        arguments.error("give as many --rows as --features and --classes")
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for pairs, features, classes in zip(options.rows, options.features, options.classes, strict=True):
        records = measure(pairs, features, classes, options)
        show(records)
        with options.output.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()
