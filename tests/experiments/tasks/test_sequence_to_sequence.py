"""How much a model uses its source: against a sum by hand, and for models that do and do not read."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdrop.experiments.tasks import sequence_to_sequence
from rdrop.experiments.tasks.sequence_to_sequence import source_use
from rdrop.experiments.tasks.share import ALONE

SIZE, VOCABULARY = 7, 5
SOURCES = torch.arange(SIZE) % VOCABULARY
LENGTHS = np.array([1, 2, 3, 1, 2, 3, 1])


class Reader(nn.Module):
    """Says the token of the source, as loudly as `weight`."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    said = F.one_hot(batch["input_ids"], VOCABULARY).float()[:, None].expand(-1, batch["labels"].shape[1], -1)
    weight: Tensor = model.weight  # type: ignore[assignment]
    return weight * said


def batch_of(rows: list[int], sources: list[int]) -> dict[str, Tensor]:
    labels = SOURCES[rows][:, None].repeat(1, 3)
    labels[torch.arange(3) >= torch.tensor(LENGTHS[rows])[:, None]] = -100
    return {"input_ids": SOURCES[sources], "labels": labels}


def test_a_model_of_the_targets_alone_uses_nothing_of_its_source() -> None:
    assert source_use(Reader(0.0), logits, batch_of, LENGTHS, 3, ALONE) == {"source_use": 0.0}


def test_the_rise_is_that_of_the_mean_loss_of_a_label_where_none_has_its_own_source() -> None:
    seen: dict[int, int] = {}

    def watched(rows: list[int], sources: list[int]) -> dict[str, Tensor]:
        if rows != sources:
            seen.update(zip(rows, sources, strict=True))
        return batch_of(rows, sources)

    found = source_use(Reader(2.0), logits, watched, LENGTHS, 3, ALONE)["source_use"]
    assert sorted(seen.values()) == sorted(seen) == list(range(SIZE))
    assert all(row != source for row, source in seen.items())
    # A right source makes the label's logit 2 and the others 0, a wrong one the reverse: the loss rises by 2.
    wrong = sum(int(LENGTHS[row]) for row, source in seen.items() if SOURCES[row] != SOURCES[source])
    assert found == pytest.approx(2.0 * wrong / LENGTHS.sum(), rel=1e-6)
    assert source_use(Reader(2.0), logits, batch_of, LENGTHS, 2, ALONE)["source_use"] == pytest.approx(found, rel=1e-6)


def test_one_example_has_no_other_source() -> None:
    assert source_use(Reader(1.0), logits, batch_of, LENGTHS[:1], 3, ALONE) == {}


def test_of_a_large_split_the_first_examples_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_to_sequence, "MOST_SOURCES", 3)
    rows_seen: set[int] = set()

    def watched(rows: list[int], sources: list[int]) -> dict[str, Tensor]:
        rows_seen.update(rows, sources)
        return batch_of(rows, sources)

    source_use(Reader(1.0), logits, watched, LENGTHS, 2, ALONE)
    assert rows_seen == {0, 1, 2}
