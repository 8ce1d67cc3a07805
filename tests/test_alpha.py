"""The course of alpha; the converter of other implementations' alpha, proven on their formulas, and its page."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rdrop import alpha_at, legacy_alpha, rdrop_loss
from rdrop.alpha import LEGACY_FORMS, AlphaSchedule

ROWS, CLASSES = 6, 4


def halves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(2 * ROWS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return *logits.chunk(2), torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The terms of (KL(p||q) + KL(q||p)) / 2, `(rows, classes)`, for the implementation to reduce as it does."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none")
    return (forward + F.kl_div(log_p, log_q, log_target=True, reduction="none")) / 2


def mean_ce(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean of the two cross-entropies: our task loss."""
    return (F.cross_entropy(a, y) + F.cross_entropy(b, y)) / 2


@pytest.mark.parametrize(
    ("name", "what_it_computes"),
    [
        # 2 * mean CE + alpha * mean KL: the paper's formula
        ("official-fairseq", lambda a, b, y, alpha: 2 * mean_ce(a, b, y) + alpha * kl(a, b).sum() / ROWS),
        # mean CE + alpha * summed KL
        ("official-readme-sum", lambda a, b, y, alpha: mean_ce(a, b, y) + alpha * kl(a, b).sum()),
        ("official-readme-mean", lambda a, b, y, alpha: mean_ce(a, b, y) + alpha * kl(a, b).sum() / ROWS),
        # 2 * mean CE + alpha * summed KL
        ("official-bert", lambda a, b, y, alpha: 2 * mean_ce(a, b, y) + alpha * kl(a, b).sum()),
        # mean CE of the doubled batch + alpha * summed KL
        (
            "official-vit",
            lambda a, b, y, alpha: F.cross_entropy(torch.cat([a, b]), y.repeat(2)) + alpha * kl(a, b).sum(),
        ),
        # 2 * mean CE + alpha * KL averaged over rows and classes
        ("bert4torch", lambda a, b, y, alpha: 2 * mean_ce(a, b, y) + alpha * kl(a, b).mean()),
    ],
)
def test_the_converted_alpha_gives_the_same_direction(name, what_it_computes):
    first, second, labels = halves()
    leaf = torch.cat([first, second]).requires_grad_()
    (theirs,) = torch.autograd.grad(what_it_computes(*leaf.chunk(2), labels, 0.5), leaf)
    alpha = legacy_alpha(name, 0.5, rows=ROWS, classes=CLASSES)
    (ours,) = torch.autograd.grad(rdrop_loss(leaf, labels, alpha=alpha).loss, leaf)
    torch.testing.assert_close(theirs / theirs.norm(), ours / ours.norm())


def test_the_page_has_every_form_and_nothing_else():
    page = (Path(__file__).parents[1] / "docs" / "alpha.md").read_text(encoding="utf-8")
    table = page.split("<!-- legacy table", 1)[1].split("\n\n", 1)[0]
    expected = []
    for name, form in LEGACY_FORMS.items():
        strength = f"{form.factor:g} * alpha" if form.factor != 1 else "alpha"
        strength += " * B" * form.times_rows + " / C" * form.by_classes
        expected.append(f"| `{name}` | {form.what} | {strength} | {form.note} |")
    assert table.splitlines()[3:] == expected


def test_an_unknown_implementation_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"implementation \(='hf'\) must be one of official-fairseq, "):
        legacy_alpha("hf", 1.0)


def test_a_strength_that_follows_the_batch_asks_for_it():
    with pytest.raises(ValueError, match=r"rows \(=None\) must be a positive number: the strength of 'official-bert'"):
        legacy_alpha("official-bert", 0.5)


def test_rows_that_are_neighbors_are_put_into_the_order_of_passes():
    """As docs/alpha.md converts a batch of bert4keras."""
    passes = torch.randn(2, 4, 3)
    neighbors = torch.stack([passes[0], passes[1]], 1).flatten(0, 1)  # x1, x1, x2, x2, ...
    assert torch.equal(neighbors.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1), passes.flatten(0, 1))


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", [2.0, 2.0, 2.0, 2.0]), ("linear", [0.5, 1.0, 1.5, 2.0]), ("quadratic", [0.125, 0.5, 1.125, 2.0])],
)
def test_alpha_is_a_function_of_the_step_that_ends_at_its_value(schedule: AlphaSchedule, weights: list[float]) -> None:
    assert [alpha_at(step, 4, 2.0, schedule) for step in range(4)] == weights
    assert alpha_at(9, 4, 2.0, schedule) == 2.0


def test_a_course_over_an_unknown_number_of_updates_is_refused_and_a_constant_needs_none() -> None:
    assert alpha_at(3, 0, 2.0) == 2.0
    with pytest.raises(ValueError, match=r"a linear schedule of alpha rises over all updates, and their number \(=0\)"):
        alpha_at(0, 0, 2.0, "linear")
    with pytest.raises(ValueError, match="of alpha \\(='cosine'\\) must be 'constant', 'linear' or 'quadratic'"):
        alpha_at(0, 4, 2.0, "cosine")  # type: ignore[arg-type]
