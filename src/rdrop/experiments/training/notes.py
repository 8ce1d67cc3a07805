"""Notes for the reader of a result, beside its numbers: the length, the batch, alpha, and how training went."""

from collections.abc import Mapping, Sequence
from typing import Any

from rdrop.experiments.comparison.learning import how_rows_diverged
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.training.beginning import note_on_beginning
from rdrop.experiments.training.feed import Feed
from rdrop.experiments.training.state import RunState


def notes_on(
    state: RunState,
    asked: Recipe,
    feed: Feed,
    rows: Sequence[Mapping[str, Any]],
    valid: Mapping[str, float],
    constant: Mapping[str, float],
) -> dict[str, str]:
    """Returns the notes on a finished training by their names.

    `asked` is the recipe as it is saved. `rows` are the `valid` rows of metrics.jsonl, `valid` the scores of the
    weights that count, `constant` those of the best constant prediction.
    """
    recipe = feed.recipe
    return (
        _on_length(state, asked, feed)
        | _on_batch(feed)
        | _on_alpha(state, recipe)
        | (_on_divergence(recipe, rows, valid, constant) or note_on_beginning(rows, recipe, constant))
    )


def _on_length(state: RunState, asked: Recipe, feed: Feed) -> dict[str, str]:
    """Returns how long a training in epochs is in updates."""
    if asked.epochs is None:
        return {}
    updates = f"{feed.recipe.updates} updates"
    if state.step < feed.recipe.total_updates:
        updates += f", of which {state.step} were done"
    return {"epochs": f"{asked.epochs:g} of {feed.order.size} examples: {updates}"}


def _on_batch(feed: Feed) -> dict[str, str]:
    """Returns a word where a larger batch would be the same training."""
    tokens = feed.recipe.batch_tokens
    if tokens is None or feed.order.updates_per_epoch > 1:
        return {}
    return {"batch": f"batch_tokens (={tokens}) holds all examples; with twice as many it is the same training"}


def _on_alpha(state: RunState, recipe: Recipe) -> dict[str, str]:
    """Returns a word where the weights that are scored were not trained with much of alpha."""
    method = recipe.method
    if method.is_plain or method.alpha_schedule == "constant":
        return {}
    scored = state.averaged_steps[-1] if state.averaged_steps else state.best_step or state.step
    in_scored = method.alpha_at(scored - 1, recipe.total_updates)
    if in_scored < method.alpha / 2:
        reached, why = in_scored, f"the weights that are scored are of update {scored} of {recipe.updates}"
    elif state.step < recipe.total_updates:
        reached = method.alpha_at(state.step - 1, recipe.total_updates)
        why = f"training ended after {state.step} of {recipe.updates} updates"
    else:
        return {}
    return {"alpha": f"rose to {reached:.3g} of {method.alpha:g}: {why}"}


def _on_divergence(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], valid: Mapping[str, float], constant: Mapping[str, float]
) -> dict[str, str]:
    """Returns a word where all was finite, and yet training has diverged."""
    seen = how_rows_diverged([*rows, {"kind": "valid", **valid}], constant)
    if seen is None:
        return {}
    rate, warmup = f"learning_rate (={recipe.learning_rate:g})", f"warmup_updates (={recipe.warmup_updates})"
    return {"diverged": f"{seen}; lower {rate} or raise {warmup}"}
