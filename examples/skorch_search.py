"""R-Drop in skorch, with scikit-learn's grid search over alpha, on scikit-learn's digits.

    python examples/skorch_search.py

Needs pip install skorch.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from rdrop import check_rdrop, rdrop_loss, repeat_batch, symmetric_kl


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


class RDrop:
    """Written before a class of skorch, gives its training steps R-Drop. alpha 0 is plain training.

    The task loss is the criterion of the net, which gets logits and is a mean over the batch; its class weights act on
    it alone. The divergence must fit it: `symmetric_kl` fits a cross-entropy, `bernoulli_kl` a binary cross-entropy,
    `squared_difference` a squared error. Predictions, `forward` and the validation loss are skorch's own.
    """

    def __init__(
        self,
        module: Any,
        alpha: float = 1.0,
        criterion: Any = nn.CrossEntropyLoss,
        divergence: Any = symmetric_kl,
        **options: Any,
    ) -> None:
        super().__init__(module, criterion=criterion, **options)
        self.alpha, self.divergence = alpha, divergence

    def get_loss(self, y_pred: Tensor, y_true: Tensor, *args: Any, training: bool = False, **options: Any) -> Tensor:
        if not training or self.alpha == 0:
            return super().get_loss(y_pred, y_true, *args, training=training, **options)
        task_loss = super().get_loss(y_pred, repeat_batch(y_true), *args, training=training, **options)
        of_loss = {"ignore_index": getattr(self.criterion_, "ignore_index", -100), "divergence": self.divergence}
        labels = y_true.to(y_pred.device)
        return task_loss + rdrop_loss(y_pred, labels, alpha=self.alpha, task_passes=(), **of_loss).loss

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        if self.alpha == 0:
            return super().train_step_single(batch, **fit_params)
        x, y = batch
        step = super().train_step_single((repeat_batch(x), y), **fit_params)  # of [x; x]: two dropout masks
        return step | {"y_pred": step["y_pred"][: len(y)]}  # the first pass, for skorch's scores


class RDropClassifier(RDrop, NeuralNetClassifier):
    pass


def main() -> None:
    digits = load_digits()
    images, labels = digits.data.astype("float32") / 16, digits.target
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, train_size=100, stratify=labels, random_state=0
    )
    print(check_rdrop(build_model(), torch.tensor(train_images[:8])))
    torch.manual_seed(0)
    settings = {"max_epochs": 15, "lr": 3e-3, "optimizer": torch.optim.AdamW, "batch_size": 20, "verbose": 0}
    net = RDropClassifier(build_model, train_split=None, **settings)
    search = GridSearchCV(net, {"alpha": [0.0, 1.0, 5.0]}, cv=3, scoring="accuracy")
    search.fit(train_images, train_labels)
    for setting, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"alpha {setting['alpha']:g}: accuracy in cross-validation {score:.3f}")
    print(f"best alpha {search.best_params_['alpha']:g}: test accuracy {search.score(test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
