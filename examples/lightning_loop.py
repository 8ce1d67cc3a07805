"""R-Drop in Lightning: exact to the label over accumulation and processes, and resumed to the same bits.

    python examples/lightning_loop.py 2 4     in 2 processes to the end of epoch 4; without numbers, in 1 process
    python examples/lightning_loop.py 2 8     goes on where the first stopped

A tagger says of every token whether it is larger than the one before it; sentences differ in length, so batches differ
in how many labels they have. Needs Lightning: pip install '.[lightning]' in the clone.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from rdrop.integrations.lightning import RDropCallback


def sentences(count: int, seed: int) -> TensorDataset:
    """3 to 20 tokens each, and a label for every token but the first; -100 stands where there is none."""
    draw = torch.Generator().manual_seed(seed)
    tokens, lengths = (
        torch.randint(1, 12, (count, 20), generator=draw),
        torch.randint(3, 21, (count, 1), generator=draw),
    )
    labels, place = (tokens > tokens.roll(1, 1)).long(), torch.arange(20)
    return TensorDataset(tokens, labels.masked_fill((place == 0) | (place >= lengths), -100))


class Tagger(L.LightningModule):
    def __init__(self, alpha: float, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(12, 48), nn.GRU(48, 48, batch_first=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(48, 2)
        self.rdrop = RDropCallback(alpha=alpha)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(states))

    def train_dataloader(self) -> DataLoader:
        data = sentences(640, seed=1)
        order = DistributedSampler(data, self.trainer.world_size, self.global_rank)  # a function of the epoch alone
        return DataLoader(data, 16, sampler=order)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        # Other masks in every step and process, and the same ones when a run is resumed.
        place = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed(place * self.trainer.world_size + self.global_rank)
        return self.rdrop.loss(self(self.rdrop.repeat(tokens)), labels)  # a sum; the callback makes it the mean

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        tokens, labels = batch
        right = (self(tokens).argmax(-1) == labels)[labels != -100]
        self.log("accuracy", right.float().mean(), batch_size=len(right), sync_dist=True)


def train(folder: Path, alpha: float, epochs: int, processes: int = 1) -> None:
    L.seed_everything(0, verbose=False)
    model = Tagger(alpha)
    spread = {"accelerator": "cpu", "devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    method = {"max_epochs": epochs, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    callbacks = [model.rdrop, ModelCheckpoint(folder, filename="{epoch}", save_last=True)]
    trainer = L.Trainer(**spread, **method, callbacks=callbacks, logger=False, enable_progress_bar=False)
    trainer.fit(model, val_dataloaders=DataLoader(sentences(256, seed=2), 16), ckpt_path="last")
    trainer.print(f"alpha {alpha:g}: accuracy on other sentences {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    processes, epochs = map(int, sys.argv[1:] or (1, 4))
    for alpha in (0.0, 1.0):
        train(Path(f"runs/lightning/alpha-{alpha:g}"), alpha, epochs, processes)
