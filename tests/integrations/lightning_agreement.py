"""Updates of Lightning and of Fabric against the whole batch at once, and a run that was interrupted; N processes.

`test_lightning.py` starts it; it prints one line for each comparison.
"""

import os
import runpy
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rdrop import rdrop_loss, repeat_batch

EXAMPLES = Path(__file__).parents[2] / "examples"
LIGHTNING = runpy.run_path(str(EXAMPLES / "lightning_loop.py"), run_name="example")
FABRIC = runpy.run_path(str(EXAMPLES / "fabric_loop.py"), run_name="example")
ALPHA = 50.0  # so that the divergence cannot hide behind the task loss
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
Batch = tuple[Tensor, Tensor]
Gradients = list[Tensor]


class Tagger(LIGHTNING["Tagger"]):  # type: ignore[misc]
    """Has a fixed second pass in place of dropout, so that the passes differ alike however a batch is cut."""

    def __init__(self, batches: list[Batch], alpha: float = ALPHA) -> None:
        torch.manual_seed(0)
        super().__init__(alpha, dropout=0.0)
        self.batches = batches
        self.gradients: list[Gradients] = []
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        if self.rdrop.alpha == 0 or not self.training:
            return logits
        first, second = logits.chunk(2)
        return torch.cat([first, 1.5 * second])

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called by Lightning after the callbacks, before it clips."""
        self.gradients.append(gradients_of(self))


def gradients_of(model: nn.Module) -> Gradients:
    return [parameter.grad.clone() for parameter in model.parameters()]


def ragged(count: int) -> list[Batch]:
    """`count` batches of 2 to 5 sentences, of 3 to 20 tokens each; the second has no label at all."""
    batches = [LIGHTNING["sentences"](2 + number % 4, seed=number)[:] for number in range(count)]
    for _, labels in batches[1:2]:
        labels.fill_(-100)
    return batches


def whole(batches: list[Batch]) -> Batch:
    tokens, labels = map(torch.cat, zip(*batches, strict=True))
    return tokens, labels


def expected_gradients(batches: list[Batch], alpha: float) -> Gradients:
    tokens, labels = whole(batches)
    model = Tagger([], alpha).train()
    if alpha == 0:
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    else:
        rdrop_loss(model(repeat_batch(tokens)), labels, alpha=alpha).loss.backward()
    return gradients_of(model)


def difference(found: Gradients, expected: Gradients) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((own - right).norm() / right.norm()) for own, right in pairs)


def trainer(model: Tagger, accumulation: int) -> L.Trainer:
    return L.Trainer(
        callbacks=[model.rdrop],
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def of_lightning(accumulation: int, alpha: float = ALPHA) -> tuple[float, L.Trainer]:
    batches = ragged(PROCESSES * accumulation)
    rank = int(os.environ.get("RANK", 0))
    model = Tagger(batches[rank::PROCESSES], alpha)
    trained = trainer(model, accumulation)
    trained.fit(model)
    return difference(model.gradients[0], expected_gradients(batches, alpha)), trained


def of_fabric(accumulation: int) -> float:
    torch.manual_seed(0)
    model = FixedSecondPass(FABRIC["build_model"](dropout=0.0)).double()
    images, labels = torch.rand(40, 64, dtype=torch.double), torch.randint(10, (40,))
    labels[5:12] = -100
    sizes = [3, 9, 1, 7, 2, 8, 4, 6][: PROCESSES * accumulation]
    batches = list(zip(images.split([*sizes, 40 - sum(sizes)]), labels.split([*sizes, 40 - sum(sizes)]), strict=True))
    total = sum(sizes)
    rdrop_loss(model(repeat_batch(images[:total])), labels[:total], alpha=ALPHA).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    fabric = Fabric(accelerator="cpu", devices=PROCESSES, strategy="ddp" if PROCESSES > 1 else "auto")
    fabric.launch()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    FABRIC["add_gradients"](fabric, wrapped, batches[: len(sizes)][fabric.global_rank :: PROCESSES], ALPHA)
    return difference(gradients_of(model), expected)


class FixedSecondPass(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.model(images).chunk(2)
        return torch.cat([first, 1.5 * second])


def resumed_is_uninterrupted(folder: Path) -> bool:
    train = LIGHTNING["train"]
    train(folder / "interrupted", alpha=1.0, epochs=1, processes=PROCESSES)
    train(folder / "interrupted", alpha=1.0, epochs=2, processes=PROCESSES)
    train(folder / "whole", alpha=1.0, epochs=2, processes=PROCESSES)
    one, other = (torch.load(folder / name / "last.ckpt")["state_dict"] for name in ("interrupted", "whole"))
    first = torch.load(next((folder / "whole").glob("epoch=*.ckpt")))["global_step"]
    assert first == 2 * -(-640 // (16 * PROCESSES * 2)), "the run has not gone to its end"
    return all(torch.equal(one[name], other[name]) for name in other)


def main() -> None:
    lines = []
    for accumulation in (1, 4):
        lines.append(f"lightning {PROCESSES}x{accumulation}: {of_lightning(accumulation)[0]:.1e}")
        lines.append(f"fabric {PROCESSES}x{accumulation}: {of_fabric(accumulation):.1e}")
    lines.append(f"resumed {PROCESSES}: {resumed_is_uninterrupted(Path(sys.argv[1]))}")
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main()
