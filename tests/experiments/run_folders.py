"""Run folders as the training loop leaves them, but synthetic: learning curves of a small network that overfits."""

import json
import math
import random
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder import saved

RECIPE: dict[str, Any] = {
    "name": "digits",
    "task": "digits",
    "alpha": 0.0,
    "passes": 2,
    "every": 1,
    "dropout": None,
    "cutoff": None,
    "cutoff_ratio": 0.0,
    "task_passes": "all",
    "divergence": "symmetric",
    "updates": 400,
    "batch_size": 32,
    "batch_tokens": None,
    "accumulation": 1,
    "learning_rate": 0.001,
    "schedule": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "label_smoothing": 0.0,
    "precision": "fp32",
    "fused": False,
    "encoder_once": False,
    "evaluate_every": 20,
    "checkpoint_every": 100,
    "keep_checkpoints": 2,
    "seed": 0,
    "data": {"train_labels": 300, "valid_size": 497, "test_size": 1000, "split_seed": 0},
    "model": {"layers": 4, "hidden_size": 64, "heads": 4, "dropout": 0.1, "attention_dropout": 0.1},
}
VERSIONS = {"rdrop": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"}


def write_run(runs: Path, score: float, *, unfinished: bool = False, **changes: Any) -> Path:
    """Write the folder of one run with this test score; `changes` go into the recipe or, by name, the result."""
    recipe = {**RECIPE, **{key: value for key, value in changes.items() if key in RECIPE}}
    digest = saved.digest(saved.upgraded(recipe))
    folder = runs / recipe["name"] / digest
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(saved.upgraded(recipe)))
    rows = metrics(recipe, score)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not unfinished:
        result = result_of(recipe, digest, score) | {k: v for k, v in changes.items() if k not in RECIPE}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def result_of(recipe: dict[str, Any], digest: str, score: float) -> dict[str, Any]:
    passes = 1 if recipe["alpha"] == 0 else recipe["passes"]
    work = passes * recipe["batch_size"] / 32
    return {
        "format": 1,
        "recipe": saved.upgraded(recipe),
        "digest": digest,
        "finished": f"2026-11-22T20:00:{recipe['seed'] % 60:02d}Z",
        "metric": "accuracy",
        "best_step": 280,
        "valid": {"accuracy": round(score + 0.01, 4), "loss": round(1.6 - score, 4)},
        "test": {"accuracy": score, "loss": round(1.62 - score, 4)},
        "cost": {
            "train_seconds": 9.7 * work + 0.1 * recipe["seed"],
            "step_milliseconds": 24.0 * work + 0.1 * recipe["seed"],
            "peak_extra_bytes": int(41e6 * (0.5 + 0.5 * work)),
            "parameters": 205_834,
        },
        "machine": {"device": "cpu", "threads": 2, "processes": 1, "kernel": "cpu"},
        "versions": VERSIONS,
        "resumed": 0,
    }


def metrics(recipe: dict[str, Any], level: float) -> list[dict[str, Any]]:
    """Training loss to nearly zero, validation loss through a minimum, accuracy up to about `level`."""
    noise = random.Random(f"{recipe['alpha']} {recipe['batch_size']} {recipe['seed']}")
    slowness = 1 + 0.35 * recipe["alpha"]
    rows = []
    for step in range(10, recipe["updates"] + 1, 10):
        progress = step / recipe["updates"]
        task_loss = 2.3 * math.exp(-5 * progress / slowness) + 0.02 + noise.gauss(0, 0.03) * math.exp(-3 * progress)
        divergence = 0.55 * progress * math.exp(-2.5 * progress) + 0.01 + abs(noise.gauss(0, 0.008))
        divergence_or_null = divergence if recipe["alpha"] else None
        place = {"step": step, "epoch": step * recipe["batch_size"] / 300, "seconds": 0.024 * step}
        rows.append(
            {
                "kind": "train",
                **place,
                "loss": task_loss + recipe["alpha"] / 2 * divergence,
                "task_loss": task_loss,
                "divergence": divergence_or_null,
                "learning_rate": 1e-3 * (1 - progress),
                "gradient_norm": 1.0,
            }
        )
        if step % recipe["evaluate_every"] == 0:
            overfit = 1.1 * progress**1.5 / slowness**2
            rows.append(
                {
                    "kind": "valid",
                    **place,
                    "loss": 2.3 * math.exp(-6 * progress / slowness) + 0.75 + overfit + noise.gauss(0, 0.03),
                    "accuracy": (level + 0.01) * (1 - 0.85 * math.exp(-7 * progress)) + noise.gauss(0, 0.006),
                }
            )
    return rows


def write_three_arms(runs: Path) -> None:
    """Five seeds of the baseline, of R-Drop and of the baseline with twice the batch."""
    scores = {
        (0.0, 32): [0.739, 0.724, 0.751, 0.733, 0.742],
        (1.0, 32): [0.779, 0.768, 0.772, 0.770, 0.781],
        (0.0, 64): [0.741, 0.735, 0.744, 0.738, 0.749],
    }
    for (alpha, batch_size), of_arm in scores.items():
        for seed, score in enumerate(of_arm):
            write_run(runs, score, alpha=alpha, batch_size=batch_size, seed=seed)
