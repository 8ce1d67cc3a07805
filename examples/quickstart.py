# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does R-Drop help on my texts?
#
# R-Drop runs the model twice on each batch, with different dropout masks, and adds the divergence between the two
# predictions to the loss. This notebook goes from a table of labeled texts to a comparison of training with and
# without R-Drop, over several seeds, and to a picture of it.
#
# It runs in about two minutes on a CPU, without a network: the texts are synthetic, and the model is a small
# Transformer that is trained from scratch. At the end it says what to change for your own texts and a pre-trained
# model.
#
# You need `pip install '.[experiments]'` in a clone of the repository.

# %%
SEEDS, UPDATES = 5, 500

# %% [markdown]
# ## A table of texts
#
# One row for each text, with the columns `text` and `label`. Each of these reviews has two words that fit its label
# and one that does not, in a random place among words that say nothing.

# %%
import random
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd

PRAISE = "great lovely crisp warm clever fresh generous charming".split()
BLAME = "dull stale cold rude slow bland noisy broken".split()
FILLERS = "the soup staff film room table story music was and with a very quite evening menu actor service".split()

draw = random.Random(0)


def review(label: str) -> str:
    fitting, other = (PRAISE, BLAME) if label == "positive" else (BLAME, PRAISE)
    words = draw.choices(fitting, k=2) + draw.choices(other, k=1) + draw.choices(FILLERS, k=8)
    return " ".join(draw.sample(words, len(words)))


labels = ["positive", "negative"] * 500
texts = pd.DataFrame({"text": [review(label) for label in labels], "label": labels})
folder = Path(mkdtemp())
texts.to_csv(folder / "reviews.csv", index=False, lineterminator="\n")
texts.head()

# %% [markdown]
# ## A recipe
#
# A recipe is the complete description of a run. `text-classification` is the one for your own texts. 10 % of the
# table chooses the checkpoint, another 10 % gives the final score, once, and the rest is trained on. `tiny=true`
# takes a small model and few updates; without `data.tiny=false` it would take synthetic data of its own as well.

# %%
from rdrop.experiments.recipe import override
from rdrop.experiments.recipes import find_recipe

settings = [
    "tiny=true",
    "data.tiny=false",
    f"data.train={folder / 'reviews.csv'}",
    f"updates={UPDATES}",
    f"evaluate_every={max(UPDATES // 8, 1)}",
]
recipe = override(find_recipe("text-classification"), settings)

# %% [markdown]
# ## Training with and without R-Drop
#
# The plan has two runs for each seed: the baseline (`alpha=0`) and R-Drop (`alpha=1`). Both start from the same
# weights and see the same texts in the same order. With `larger_batch=True` there would be a third, which spends the
# compute of R-Drop's second pass on a larger batch. Finished runs are kept in their folders: when this cell runs
# again, it trains nothing.

# %%
from rich.console import Console

from rdrop.experiments.launch.jobs import train_all
from rdrop.experiments.launch.plan import plan_comparison

plan = plan_comparison(recipe, range(SEEDS), folder / "runs", larger_batch=False)
failed = train_all(plan, Console(quiet=True))
assert not failed, failed

# %% [markdown]
# ## The comparison
#
# The arms are compared seed by seed. `diff.` is the mean difference to the baseline, with its 95 % interval.

# %%
from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.terminal_table import terminal_table
from rdrop.experiments.run_folder import find_runs

(comparison,) = comparisons(find_runs(folder / "runs"))
Console(width=100).print(terminal_table(comparison))
print(comparison.verdict())

# %% [markdown]
# ## A picture of it
#
# A point for each seed, above the line where R-Drop was better; on the right their mean with its 95 % interval.

# %%
import matplotlib.pyplot as plt

baseline, rdrop = comparison.arms
difference = comparison.difference(rdrop, baseline)
points = [100 * value for value in difference.per_seed]

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.axhline(0, color="gray", linewidth=1)
axes.vlines(difference.seeds, 0, points, color="tab:blue", alpha=0.5)
axes.plot(difference.seeds, points, "o", color="tab:blue")
half_width = 100 * difference.half_width if difference.half_width is not None else None
axes.errorbar(SEEDS + 0.5, 100 * difference.mean, half_width, fmt="s", color="tab:blue", capsize=4)
axes.set_xticks([*difference.seeds, SEEDS + 0.5], [*(f"seed {seed}" for seed in difference.seeds), "mean"])
axes.set_title(f"{rdrop.label} minus baseline: {comparison.metric} on test, points", loc="left", fontsize=10)
axes.spines[["top", "right", "bottom"]].set_visible(False)

# %% [markdown]
# The whole report, with curves, settings and cost, is one HTML file:

# %%
from rdrop.experiments.report.page import write_report

print("Open", write_report(folder / "runs").name, "in the folder of the runs.")

# %% [markdown]
# ## Your own texts
#
# Leave out `tiny=true` and `data.tiny=false`, name your file, and choose a pre-trained model. In a terminal it is one
# line:
#
# ```bash
# rdrop compare text-classification --train reviews.csv --model bert-base-uncased
# ```
#
# The other tasks have such a line too: see `docs/tasks/README.md`. For R-Drop in a training loop of your own, see
# `examples/raw_loop.py`; in the Hugging Face Trainer, `examples/hf_trainer.py`.
