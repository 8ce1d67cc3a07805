"""One process of two that train together; `test_transformers_processes.py` starts both."""

import os
import sys
from typing import Any

import torch
from gradient_agreement import ALPHA, CASES, build, train
from torch import Tensor

from rdrop.integrations.transformers import RDropTrainer

LOGGED = ("loss", "task_loss", "divergence")


def one_update(case_name: str, method: dict[str, Any], accumulation: int, folder: str) -> dict[str, Any]:
    """Gradients and logs of one update over all four ragged micro-batches of a case."""
    case = CASES[case_name]
    # DDP looks for parameters outside the graph of the model's outputs where the output layer is left out.
    settings = {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": "fused" in method}
    trained = train(RDropTrainer, build(case), case.batches, folder, settings, **method)
    logs = {name: row[name] for row in trained.state.log_history for name in LOGGED if name in row}
    gradients: dict[str, Tensor] = {n.removeprefix("module."): g for n, g in trained.gradients[0].items()}
    return {"logs": logs, "gradients": gradients}


TRAININGS = (
    ("token classification", {"alpha": ALPHA}),
    ("token classification", {"alpha": 0.0}),
    ("causal LM, Llama", {"alpha": 0.0}),
    ("causal LM, Llama", {"alpha": ALPHA, "fused": True, "micro_batches": 2}),
)


def all_updates(accumulation: int, folder: str) -> list[dict[str, Any]]:
    return [one_update(name, method, accumulation, folder) for name, method in TRAININGS]


if __name__ == "__main__":
    result = all_updates(accumulation=2, folder=sys.argv[1])
    if os.environ["RANK"] == "0":
        torch.save(result, f"{sys.argv[1]}/result.pt")
