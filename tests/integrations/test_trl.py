"""`RDropSFTTrainer`: R-Drop in TRL's supervised fine-tuning has the gradient written out, and is TRL at alpha 0."""

import pytest
from gradient_agreement import worst_difference
from sft_agreement import SFT, by_hand, drawn, llama, rdrop, with_stand_in


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SFT)
def test_the_gradient_of_fine_tuning_is_that_of_every_sequence_alone(name: str, fused: bool, folder: str) -> None:
    found = rdrop(with_stand_in(drawn(llama())), SFT[name], folder, fused=fused)
    assert worst_difference(found.gradients[0], by_hand(with_stand_in(drawn(llama())), SFT[name])) < 1e-12
