"""The protocol of a task: all that the training loop asks of its data, model and scores."""

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import data_files
from rdrop.experiments.run_folder.predictions import Predictions
from rdrop.experiments.tasks.share import Share
from rdrop.terms import Divergence, TaskLoss

Batch = dict[str, Any]
"""What `train_batch` gives and `logits` and `labels` read: tensors by name, the examples in the first dimension."""


class Task(Protocol):
    """All the training loop knows of a task. A task knows nothing of optimizer, schedule and alpha."""

    metric: str
    """The score that selects the checkpoint and is compared: a name of `rdrop.experiments.metrics`."""
    task_loss: TaskLoss
    divergence: Divergence
    notes: dict[str, str]
    """What a reader of the scores should know beside the numbers: signatures, what was skipped, what decoded."""

    def __init__(self, recipe: Any, test: str | None = None) -> None:
        """Loads the data; nothing is trained. Raises `DataError` for data that are not what they should be.

        `test` is a file, as `data.test` names one, that takes the place of the test split after a training without it:
        what was held out of the training data stays held out.
        """

    def build_model(self) -> nn.Module:
        """A new model, initialized from torch's global generator, which the caller has seeded; or a pre-trained one."""

    def train_size(self) -> int:
        """Number of training examples: the indices are `range(train_size())`."""

    def train_lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each training example, of its longest sequence; None where it has no tokens."""

    def train_batch(self, indices: list[int], epoch: int) -> Batch:
        """The examples at `indices`, on the CPU: a pure function of the recipe, `indices` and `epoch`.

        Called in a thread, one call at a time: it must not touch the global random generators, nor the model.

        For a cutoff its tensors have the names that transformers' models give them: `input_ids`, `attention_mask`, ...
        """

    def special_ids(self) -> frozenset[int]:
        """The tokens that a cutoff leaves alone: padding, beginning, end, unknown, mask. Empty where it has none."""

    def unknown_id(self) -> int | None:
        """The token that stands for any other; None where the vocabulary has none, or there is no vocabulary."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`(N, ..., V)` for a batch of N examples, which may be repeated: all of pass 1, then all of pass 2."""

    def labels(self, batch: Batch) -> Tensor:
        """Class indices `(N, ...)`, -100 where there is nothing to learn; or numbers `(N, ..., K)`."""

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """`loss` and the metrics of "valid" or "test": plain, a single pass, with `model` in eval mode."""


@runtime_checkable
class LearnsFromUnlabeled(Protocol):
    """A task that may also have examples without labels, from which R-Drop learns by the divergence alone."""

    unlabeled_per_update: int
    """How many of them an update has beside its batch."""

    def unlabeled_size(self) -> int:
        """Number of examples without labels; 0 where the recipe names none."""

    def unlabeled_lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each of them, as `train_lengths` has them."""

    def unlabeled_batch(self, indices: list[int], epoch: int) -> Batch:
        """Returns a batch as `train_batch` does. Its labels only say which positions count: those that are not -100."""


class WithoutTokens:
    """A base of tasks whose examples have no tokens: images."""

    def train_lengths(self) -> None:
        return None

    def unlabeled_lengths(self) -> None:
        return None

    def special_ids(self) -> frozenset[int]:
        return frozenset()

    def unknown_id(self) -> None:
        return None


@runtime_checkable
class NamesItsIds(Protocol):
    """A task that says what its ids mean, so that the weights of one run may start another."""

    def names_of_ids(self) -> Iterable[str]:
        """Yields what each id of the vocabulary stands for, then each class, in their order."""


@runtime_checkable
class Augments(Protocol):
    """A task whose training inputs change at random, so that each pass of R-Drop may have a view of its own."""

    augments: bool
    """Whether they do with this recipe."""

    def train_batch(self, indices: list[int], epoch: int, view: int = 0) -> Batch:
        """Returns `train_batch` as another view has it: a pure function of the recipe and these three.

        View 0 is what all passes share where each has no view of its own. All views of a batch have the same shapes and
        the same labels. A task that learns from examples without labels too has the same argument in `unlabeled_batch`.
        """


@runtime_checkable
class KeepsPredictions(Protocol):
    """A task whose runs keep their predictions of the test split, to be compared example by example."""

    predictions: Predictions | None
    """Those of the last `evaluate` of "test"."""


@runtime_checkable
class SharesEvaluation(Protocol):
    """A task of whose `evaluate` several processes compute a part each. Any other task computes all in each of them."""

    share: Share
    """This process's part, for the `evaluate` that follows; a task begins as `ALONE`."""


@runtime_checkable
class KnowsConstant(Protocol):
    """A task that knows what can be scored without learning anything from the inputs."""

    def constant_scores(self) -> dict[str, float]:
        """Returns the test scores of the best constant prediction, by the names that `evaluate` gives them.

        Without the scores that a constant cannot have: a correlation, a translation.
        """


@runtime_checkable
class ShowsLearning(Protocol):
    """A task that measures whether its model has begun to learn from its inputs, which the loss alone hides.

    `source_use` is by how many nats the loss of a label rises with the source of another example. `prediction_spread`
    is how far predictions differ between examples, as a share of how far the labels do. Either is 0 for a model that
    ignores its input.
    """

    signs: dict[str, float]
    """One of them, of the last `evaluate` of "valid"; empty where the split is too small to tell."""


def load_task(recipe: Recipe, test: str | None = None) -> Task:
    """Returns the task of the recipe, with its data loaded; `test` is another file to score than the recipe's.

    The files that the section `data` names count as read for a task of a package of its own: it may read them by any
    means. Raises `DataError` for data that are not what they should be, and `RecipeError` for a recipe that names no
    task.
    """
    place = recipe.TASK
    if isinstance(place, str):
        module, _, name = place.partition(":")
        try:
            place = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            rule = f"{type(recipe).__name__}.TASK (={recipe.TASK!r}) is not there: {error}"
            raise RecipeError("task", rule, value=recipe.task) from error
    task: Task = place(recipe) if test is None else place(recipe, test)
    if not type(task).__module__.startswith("rdrop."):
        for path in recipe.saved()["data"].values():
            if isinstance(path, str) and os.path.isfile(path):
                data_files.note_read(path)
    return task
