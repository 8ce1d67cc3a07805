"""R-Drop in Lightning: exact to the label over accumulation and processes, and resumed to the same bits.

    python examples/lightning_loop.py --processes 2 --epochs 4
    python examples/lightning_loop.py --processes 2 --epochs 8     goes on where the first stopped

A tagger says of every token whether it is larger than the one before it; sentences differ in length, so batches differ
in how many labels they have. Needs Lightning: pip install '.[lightning]' in the clone.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rdrop.integrations.lightning import RDropCallback

Batch = tuple[Tensor, Tensor]


def sentences(count: int, seed: int) -> list[Batch]:
    """3 to 20 tokens each, and a label for every token but the first."""
    draw = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(1, 12, (int(torch.randint(3, 21, (), generator=draw)),), generator=draw) for _ in range(count)
    ]
    return [(text, torch.cat([torch.tensor([-100]), (text[1:] > text[:-1]).long()])) for text in texts]


def padded(examples: list[Batch]) -> Batch:
    tokens, labels = zip(*examples, strict=True)
    return pad_sequence(tokens, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


class Tagger(L.LightningModule):
    def __init__(self, alpha: float, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 48)
        self.recurrent = nn.GRU(48, 48, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(48, 2)
        self.rdrop = RDropCallback(alpha=alpha)

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.rdrop]

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.dropout(self.embedding(tokens)))
        logits: Tensor = self.head(self.dropout(states))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, labels = batch
        # Other masks in every step and process, and the same ones when a run is resumed.
        place = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed(place * self.trainer.world_size + self.global_rank)
        return self.rdrop.loss(self(self.rdrop.repeat(tokens)), labels)  # a sum; the callback makes it the mean

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, labels = batch
        right = (self(tokens).argmax(-1) == labels)[labels != -100]
        self.log("accuracy", right.float().mean(), batch_size=len(right), sync_dist=True)

    def train_dataloader(self) -> DataLoader[Batch]:
        order = DistributedSampler(TRAIN, self.trainer.world_size, self.global_rank)  # a function of the epoch alone
        return DataLoader(TRAIN, batch_size=16, sampler=order, collate_fn=padded)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(VALID, batch_size=16, collate_fn=padded)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


TRAIN, VALID = sentences(640, seed=1), sentences(256, seed=2)


def train(folder: Path, alpha: float, epochs: int, processes: int = 1, accumulation: int = 2) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_last=True)],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(Tagger(alpha), ckpt_path=last if last.exists() else None)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args()
    for alpha in (0.0, 1.0):
        trainer = train(options.folder / f"alpha-{alpha:g}", alpha, options.epochs, options.processes)
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            print(f"alpha {alpha:g}: " + ", ".join(f"{name} {scores[name]:.3f}" for name in sorted(scores)))


if __name__ == "__main__":
    main()
