"""The gradient of an update in examples/accelerate_loop.py against the whole batch at once, in one process or several.

`test_accelerate_example.py` starts it; it prints the largest relative difference.
"""

import runpy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rdrop import rdrop_loss, repeat_batch

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "accelerate_loop.py"), run_name="example")
ALPHA = 50.0  # so that the divergence cannot hide behind the task loss


class ScaledSecondPass(nn.Module):
    """Stands in for dropout: the passes differ, the same way however a batch is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = EXAMPLE["Tagger"](dropout=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = self.tagger(tokens).chunk(2)
        return torch.cat([first, 1.5 * second])


def model() -> nn.Module:
    torch.manual_seed(0)
    return ScaledSecondPass().double()


def main() -> None:
    tokens, labels = EXAMPLE["sentences"](24, seed=3)[:]
    batches = list(zip(tokens.split(6), labels.split(6), strict=True))
    for _, of_batch in batches[1::2]:  # of two processes, the second has nothing to learn
        of_batch.fill_(-100)
    expected = model()
    rdrop_loss(expected(repeat_batch(tokens)), labels, alpha=ALPHA).loss.backward()

    accelerator = Accelerator(cpu=True)
    trained = accelerator.prepare(model())
    part = batches[accelerator.process_index :: accelerator.num_processes]
    EXAMPLE["add_gradients"](accelerator, trained, part, ALPHA)

    pairs = zip(trained.parameters(), expected.parameters(), strict=True)
    worst = max(float((own.grad - right.grad).norm() / right.grad.norm()) for own, right in pairs)
    accelerator.print(f"processes {accelerator.num_processes}, difference {worst:.1e}")


if __name__ == "__main__":
    main()
