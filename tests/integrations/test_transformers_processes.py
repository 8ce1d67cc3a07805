"""Two processes with DDP do what one process does with the same data."""

from pathlib import Path

import pytest
import torch
from gradient_agreement import worst_difference
from other_trainers import ALPHA, BATCHES, TOGETHER, trained_by_hand
from sharded import OF_FSDP2
from tests.several_processes import outputs_of
from two_processes import OTHERS, TRAININGS, all_updates

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they trained, one after the other: to start them takes most of the time."""
    tmp_path = tmp_path_factory.mktemp("two")
    outputs_of(2, str(HERE / "two_processes.py"), str(tmp_path))
    return tmp_path


def test_two_processes_are_one_process(folder_of_two: Path, tmp_path: Path) -> None:
    """R-Drop; plain training of a model that ignores the count of labels; R-Drop in unequal micro-batches, where every
    forward is joint; plain training of a model that divides by the count; fused R-Drop; and those of
    `OTHERS`. An update that one process finds infinite is left out by both.
    """
    together = torch.load(folder_of_two / "result.pt")
    alone = all_updates(accumulation=4, folder=str(tmp_path))
    for training, two, one in zip([*TRAININGS, *OTHERS], together, alone, strict=True):
        assert worst_difference(two["gradients"], one["gradients"]) < 1e-6, training
        assert two["logs"] == pytest.approx(one["logs"], rel=1e-6), training
    assert set(together[0]["logs"]) == {"loss", "task_loss", "divergence"}


def test_an_update_of_fsdp2_is_that_of_the_loss_by_hand(folder_of_two: Path) -> None:
    """Two processes with sharded parameters; ragged batches in two accumulation steps, of unequal size."""
    differences, _ = torch.load(folder_of_two / "sharded.pt")
    assert differences.keys() == OF_FSDP2.keys()
    assert max(differences.values()) < 1e-12, differences


def test_fsdp2_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits(folder_of_two: Path) -> None:
    """With checkpoints of the shards."""
    _, (loss, of_stock, is_resumed_the_same) = torch.load(folder_of_two / "sharded.pt")
    assert loss == of_stock
    assert is_resumed_the_same


@pytest.mark.parametrize("library", TOGETHER)
def test_an_update_of_two_processes_of_another_trainer_is_that_of_the_mean_of_their_batches(
    library: str, folder_of_two: Path
) -> None:
    found = torch.load(folder_of_two / "others.pt")
    if library not in found:
        pytest.skip(f"{library} is not installed")
    expected = trained_by_hand(ALPHA, [[(1 / 2, batch) for batch in BATCHES[:2]]])
    for one, other in zip(found[library], expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
