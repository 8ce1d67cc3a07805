"""The adaptive softmax: its loss and divergence are those of the whole distribution, written out word by word."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from rdrop import rdrop_loss, symmetric_kl
from rdrop.experiments.tasks.language_modeling.adaptive import (
    AdaptiveEmbedding,
    AdaptiveLanguageModel,
    AdaptiveSoftmax,
    Clusters,
    band_widths,
)

CLUSTERS = Clusters((4, 7), 12)  # 4 words, then clusters of 3 and of 5
WIDTH = 4 + 2 + 3 + 5


def random_logits(*shape: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit_divergence(passes: Tensor) -> Tensor:
    """The mean over ordered pairs of KL(P||Q) over all 12 words."""
    log_p = CLUSTERS.log_probabilities(passes)
    m = len(log_p)
    pairs = [(log_p[a].exp() * (log_p[a] - log_p[b])).sum(-1) for a in range(m) for b in range(m) if a != b]
    return torch.stack(pairs).mean(0)


def test_the_layout_of_wikitext_103() -> None:
    clusters = Clusters((20_000, 60_000), 267_735)
    assert clusters.bands == [(0, 20_000), (20_000, 60_000), (60_000, 267_735)]
    assert clusters.sizes == [20_002, 40_000, 207_735]
    assert band_widths(3, 1024, 4) == [1024, 256, 64]


@pytest.mark.parametrize("cutoffs", [(), (0,), (5, 5), (7, 4), (12,), (4, 13)])
def test_cutoffs_that_do_not_divide_the_vocabulary_are_refused(cutoffs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be rising numbers above 0 and below the vocabulary \(=12\)"):
        Clusters(cutoffs, 12)


def test_a_factor_that_leaves_a_cluster_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factor \(=4\) leaves no width for cluster 2 of hidden_size \(=15\)"):
        band_widths(3, 15, 4)


def test_the_probabilities_of_all_words_are_those_of_torch_and_sum_to_one() -> None:
    torch.manual_seed(0)
    reference = nn.AdaptiveLogSoftmaxWithLoss(16, 12, [4, 7], div_value=2.0).double()
    hidden = torch.randn(5, 16, dtype=torch.float64)
    logits = torch.cat([reference.head(hidden), *[tail(hidden) for tail in reference.tail]], -1)
    log_p = CLUSTERS.log_probabilities(logits)
    torch.testing.assert_close(log_p, reference.log_prob(hidden))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    labels = torch.tensor([0, 3, 4, 7, 11])
    torch.testing.assert_close(CLUSTERS.cross_entropy(logits, labels), -reference(hidden, labels).output)


def test_cross_entropy_is_that_of_the_full_softmax_for_every_word() -> None:
    logits, labels = random_logits(3, 12), torch.arange(12).expand(3, 12)
    expected = -CLUSTERS.log_probabilities(logits).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(CLUSTERS.cross_entropy(logits, labels), expected, rtol=0, atol=1e-14)


def test_cross_entropy_of_labels_that_are_all_in_the_head_reaches_every_logit_with_a_gradient() -> None:
    logits = random_logits(2).requires_grad_()
    CLUSTERS.cross_entropy(logits, torch.tensor([0, 1])).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 6:] == 0).all()


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_the_divergence_is_that_of_the_full_softmax(passes: int) -> None:
    logits = random_logits(passes, 5, 7)
    torch.testing.assert_close(CLUSTERS.divergence(logits), explicit_divergence(logits), rtol=1e-13, atol=0)


@pytest.mark.parametrize("passes", [2, 3])
def test_the_gradients_are_those_of_the_values(passes: int) -> None:
    logits = random_logits(passes, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(CLUSTERS.divergence, [logits])
    labels = torch.tensor([1, 5, 11]).expand(passes, 3)
    assert torch.autograd.gradcheck(lambda rows: CLUSTERS.cross_entropy(rows, labels), [logits])


def test_many_positions_are_the_same_in_parts_and_at_once() -> None:
    logits = random_logits(2, 3, 4000).requires_grad_()  # more than are taken at once
    upstream = torch.linspace(-1, 1, 12_000, dtype=torch.float64).view(3, 4000)
    for function in (CLUSTERS.divergence, lambda rows: CLUSTERS.divergence_of_rows(rows.flatten(1, 2)).view(3, 4000)):
        value = function(logits)
        (gradient,) = torch.autograd.grad(value, logits, upstream)
        if function == CLUSTERS.divergence:
            expected = value, gradient
    torch.testing.assert_close((value, gradient), expected, rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(CLUSTERS.divergence(logits), value, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("distance", "tolerance"), [(1.0, 1e-5), (1e-2, 1e-5), (1e-4, 1e-3)])
def test_in_float32_the_divergence_keeps_its_digits_where_the_passes_nearly_agree(
    distance: float, tolerance: float
) -> None:
    first = random_logits(200)
    exact_in_float32 = torch.stack([first, first + distance * random_logits(200, seed=1)]).float()
    expected = explicit_divergence(exact_in_float32.double())
    torch.testing.assert_close(CLUSTERS.divergence(exact_in_float32).double(), expected, rtol=tolerance, atol=0)


def test_symmetric_kls_of_the_tails_weighted_by_the_mean_head_are_something_else() -> None:
    logits = random_logits(2, 50)
    head, *tails = CLUSTERS.split(logits)
    mean_head = head.softmax(-1).mean(0)
    wrong = symmetric_kl(head) + sum(mean_head[:, 4 + i] * symmetric_kl(tail) for i, tail in enumerate(tails))
    assert ((wrong - explicit_divergence(logits)).abs() > 1e-2).any()


def test_the_sum_over_the_clusters_of_the_labels_is_something_else() -> None:
    """KL of the head, and of a tail only where the label is in it: so the authors' code has it."""
    logits, labels = random_logits(2, 50), torch.arange(50) % 12
    head, *tails = CLUSTERS.split(logits)
    by_label = symmetric_kl(head)
    for tail, (low, high) in zip(tails, CLUSTERS.bands[1:], strict=True):
        by_label = by_label + symmetric_kl(tail) * ((labels >= low) & (labels < high))
    expected = explicit_divergence(logits)
    assert (by_label - expected).abs().mean() > 0.1 * expected.mean()


def test_rdrop_loss_with_both_is_rdrop_loss_of_the_full_log_probabilities() -> None:
    labels = torch.tensor([[0, 5, -100], [11, 3, 8]])
    results = []
    for full in (False, True):
        logits = random_logits(4, 3, seed=2).requires_grad_()
        if full:
            terms = rdrop_loss(CLUSTERS.log_probabilities(logits), labels, alpha=3.0)
        else:
            kinds = {"task_loss": CLUSTERS.cross_entropy, "divergence": CLUSTERS.divergence}
            terms = rdrop_loss(logits, labels, alpha=3.0, **kinds)
        terms.loss.backward()
        assert logits.grad is not None
        results.append((*terms, logits.grad))
    for adaptive, full_softmax in zip(*results, strict=True):
        torch.testing.assert_close(adaptive, full_softmax)


def test_a_word_is_the_vector_of_its_band_times_the_projection() -> None:
    embedding = AdaptiveEmbedding(CLUSTERS, hidden_size=8, factor=2)
    assert [tuple(band.weight.shape) for band in embedding.bands] == [(4, 8), (3, 4), (5, 2)]
    ids = torch.tensor([[3, 4], [11, 0]])
    embedded = embedding(ids)
    for place, band, row in (((0, 0), 0, 3), ((0, 1), 1, 0), ((1, 0), 2, 4), ((1, 1), 0, 0)):
        expected = embedding.bands[band].weight[row] @ embedding.projections[band]
        torch.testing.assert_close(embedded[place], expected)


def test_every_parameter_has_a_gradient_though_no_word_of_the_batch_needs_it() -> None:
    torch.manual_seed(0)
    model = adaptive_model(tied=False)
    logits = model(torch.zeros(1, 2, dtype=torch.long)).logits
    CLUSTERS.cross_entropy(logits, torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def adaptive_model(*, tied: bool, dropout: float = 0.0) -> AdaptiveLanguageModel:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=1, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False, **rates)
    return AdaptiveLanguageModel(GPT2Model(config), CLUSTERS, factor=2, dropout=dropout, tied=tied)


def test_tied_input_and_softmax_share_words_and_tail_projections() -> None:
    tied, apart = adaptive_model(tied=True), adaptive_model(tied=False)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (apart, tied)]
    assert counts[0] - counts[1] == 4 * 8 + 3 * 4 + 5 * 2 + 4 * 8 + 2 * 8
    embedding = tied.body.get_input_embeddings()
    assert tied.softmax.words[2] is embedding.bands[2].weight
    assert tied.softmax.projections[0] is embedding.projections[1]
    logits = tied(torch.tensor([[1, 5, 9]])).logits
    assert logits.shape == (1, 3, WIDTH)


def test_the_logits_of_head_and_tails_are_products_with_the_word_vectors() -> None:
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(CLUSTERS, 8, 2, dropout=0.0, tied_to=None)
    hidden = torch.randn(3, 8)
    head, first, second = CLUSTERS.split(softmax(hidden))
    torch.testing.assert_close(head[:, :4], hidden @ softmax.words[0].T)
    torch.testing.assert_close(head[:, 4:], hidden @ softmax.cluster_vectors.T)
    torch.testing.assert_close(first, hidden @ softmax.projections[0].T @ softmax.words[1].T)
    torch.testing.assert_close(second, hidden @ softmax.projections[1].T @ softmax.words[2].T)


def test_the_softmax_dropout_makes_two_passes_differ() -> None:
    model = adaptive_model(tied=True, dropout=0.5).train()
    first, second = model(torch.tensor([[1, 5, 9]] * 2)).logits
    assert not torch.equal(first, second)
    first, second = model.eval()(torch.tensor([[1, 5, 9]] * 2)).logits
    assert torch.equal(first, second)
