"""What a training step costs: `python benchmarks/steps.py`, every way of it side by side in one run.

A step is forward, loss, backward and AdamW, of a translation model (Marian, 6 + 6 layers of width 512) with a small and
a large vocabulary, and of an encoder classifier (BERT); dropout 0.1, label smoothing 0.1, alpha 5, ragged lengths.
Ours are steps of `RDropTrainer`, its own work included. Measured and recorded as in benchmarks/rows.py, in
benchmarks/results/steps.jsonl. Times are printed as ratios to a plain step on twice the batch, the memory (highest
resident size above that before the step: gradients and activations, not weights) as ratios to one on the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import ALPHA, CLOCKS, IGNORED, SMOOTHING, _resident_bytes, official, record
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainingArguments,
)

from rdrop.dropout import dropout_sources
from rdrop.integrations.transformers import RDropSeq2SeqTrainer
from rdrop.views import repeat_batch

MODELS = ("translation V=10000", "translation V=50000", "classification")
RESULTS = Path(__file__).with_name("results") / "steps.jsonl"
Batch = dict[str, Tensor]
Step = Callable[[], None]


# ---------------------------------------------------------------------------------------------- models and batches


def translation_model(classes: int, options: argparse.Namespace) -> nn.Module:
    sizes = {"layers": options.layers, "ffn_dim": 4 * options.width, "attention_heads": max(1, options.width // 64)}
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in sizes.items()}
    config = MarianConfig(
        vocab_size=classes,
        d_model=options.width,
        dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        max_position_embeddings=512,
        scale_embedding=True,
        **halves,
    )
    return MarianMTModel(config)


def classification_model(options: argparse.Namespace) -> nn.Module:
    config = BertConfig(
        vocab_size=30_522,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def ragged(options: argparse.Namespace, classes: int) -> tuple[Tensor, Tensor]:
    """Tokens and their mask: lengths from half of `--length` to all of it."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.length // 2, options.length + 1, (options.batch, 1), generator=g)
    mask = torch.arange(options.length) < lengths
    return torch.randint(2, classes, mask.shape, generator=g).masked_fill(~mask, 0), mask


def translation_batch(classes: int, options: argparse.Namespace) -> Batch:
    tokens, mask = ragged(options, classes)
    before = F.pad(tokens[:, :-1], (1, 0))
    labels = tokens.flip(0).masked_fill(~mask.flip(0), IGNORED)
    return {"input_ids": tokens, "attention_mask": mask.long(), "decoder_input_ids": before.flip(0), "labels": labels}


def classification_batch(options: argparse.Namespace) -> Batch:
    tokens, mask = ragged(options, 30_522)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": torch.arange(options.batch) % 2}


# ---------------------------------------------------------------------------------------------- the ways of a step


def plain(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels = model(**without_labels(batch)).logits, batch["labels"]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=SMOOTHING)


def official_form(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**repeat_batch(without_labels(batch))).logits
    return official(logits.flatten(0, -2), batch["labels"].flatten())


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def ours(model: nn.Module, batch: Batch, **method: Any) -> Callable[[], Tensor]:
    """Forward and backward of the Trainer, as after its first steps, in which it looks at the model."""
    folder = tempfile.mkdtemp()
    args = Seq2SeqTrainingArguments(folder, use_cpu=True, report_to=[], label_smoothing_factor=SMOOTHING)
    trainer = RDropSeq2SeqTrainer(model=model, args=args, alpha=ALPHA, **({"encoder_once": False} | method))
    _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.training_step(model, batch, counts)
    trainer._checks_left = 0
    return lambda: trainer.training_step(model, batch, counts)


def ways(model: nn.Module, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Each computes the gradients of one step."""
    twice = repeat_batch(batch)
    table: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: backward(plain(model, batch)),
        "plain_twice_the_batch": lambda: backward(plain(model, twice)),
        "official": lambda: backward(official_form(model, batch)),
        "ours_from_logits": ours(model, batch, fused=False),
        "ours_from_logits_micro_batches": ours(model, batch, fused=False, micro_batches=2),
    }
    if not isinstance(model, MarianMTModel):
        return table
    fused = {
        "ours_fused": ours(model, batch, fused=True),
        "ours_fused_micro_batches": ours(model, batch, fused=True, micro_batches=2),
    }
    with without_dropout(model.get_encoder()):
        every_pass = ours(model, batch, fused=True)
        once = ours(model, batch, fused=True, encoder_once=True)
    quiet = {
        "ours_fused_encoder_without_dropout": within(lambda: without_dropout(model.get_encoder()), every_pass),
        "ours_fused_encoder_once": within(lambda: without_dropout(model.get_encoder()), once),
    }
    return table | fused | quiet


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def within(context: Callable[[], Any], way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def inside() -> Tensor:
        with context():
            return way()

    return inside


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    modules = dict(module.named_modules())
    sources = [source for source in dropout_sources(module) if source.rate > 0]
    for source in sources:
        setattr(modules[source.module], source.attribute, 0.0)
    try:
        yield
    finally:
        for source in sources:
            setattr(modules[source.module], source.attribute, source.rate)


# ---------------------------------------------------------------------------------------------- measuring


def seconds(step: Step, clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def peak_extra_bytes(step: Step) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident_bytes("VmRSS")
        step()
        return _resident_bytes("VmHWM") - before
    except OSError:
        return None


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    task, _, size = name.partition(" V=")
    classes = min(int(size), options.most_classes) if size else 2
    if task == "translation":
        model, batch = translation_model(classes, options), translation_batch(classes, options)
    else:
        model, batch = classification_model(options), classification_batch(options)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def stepping(way: Callable[[], Tensor]) -> Step:
        def step() -> None:
            way()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    table = {way_name: stepping(way) for way_name, way in ways(model, batch).items()}
    optimizer.zero_grad(set_to_none=True)
    for step in table.values():  # loads, warms up
        step()
    memory = {way_name: peak_extra_bytes(step) for way_name, step in table.items()}
    times: dict[str, list[float]] = {way_name: [] for way_name in table}
    for _ in range(options.rounds):
        for way_name, step in table.items():
            times[way_name].append(seconds(step, CLOCKS[options.clock]))
    return [
        record(way_name, times[way_name], memory[way_name], options.batch, classes, options)
        | {
            "what": f"{way_name}: one training step with AdamW, {options.clock} time",
            "model": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "length": options.length,
            "command": " ".join(["python", "benchmarks/steps.py", *sys.argv[1:]]),
        }
        for way_name in table
    ]


def show(records: list[dict[str, Any]]) -> None:
    forms = {r["form"]: r for r in records}
    first = records[0]
    tokens = f"{first['rows']} x {first['length']} tokens"
    print(f"\n{first['model']}: {first['parameters'] / 1e6:.0f} M parameters, {tokens}, {first['threads']} threads")
    print(f"{'step':36} {'median s':>9} {'p20':>8} {'p80':>8} {'/ 2B':>6} {'MB':>7} {'/ B':>6}")
    for r in records:
        memory = "      -      -"
        if r["peak_extra_bytes"] is not None and forms["plain"]["peak_extra_bytes"]:
            ratio = r["peak_extra_bytes"] / forms["plain"]["peak_extra_bytes"]
            memory = f"{r['peak_extra_bytes'] / 1e6:7.0f} {ratio:6.2f}"
        ratio = r["median"] / forms["plain_twice_the_batch"]["median"]
        print(f"{r['form']:36} {r['median']:9.4f} {r['p20']:8.4f} {r['p80']:8.4f} {ratio:6.3f} {memory}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    arguments.add_argument("--batch", type=int, default=16, help="examples, before they are repeated")
    arguments.add_argument("--length", type=int, default=32, help="tokens of the longest")
    arguments.add_argument("--layers", type=int, default=6, help="of the encoder, and of the decoder")
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--most-classes", type=int, default=sys.maxsize, help="for a quick look")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--clock", choices=CLOCKS, default="cpu")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    options = arguments.parse_args()
    options.dtype = "float32"
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        records = measure(name, options)
        show(records)
        with options.output.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()
