"""R-Drop in Keras 3 on its torch backend, on scikit-learn's digits: a repeated batch, a divergence; the rest is Keras'.

    python examples/keras_fit.py

Needs pip install keras scikit-learn.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

from typing import Any

import keras
from sklearn.datasets import load_digits
from torch import Tensor

from rdrop import rdrop_loss, repeat_batch, split_passes, symmetric_kl


class RDropModel(keras.Model):
    """A Keras model whose `fit` has R-Drop; its last layer gives logits. alpha 0 is plain training.

    The task loss is the compiled one, a mean over the batch, with the weights of classes and examples and with what the
    layers add; the divergence is of all examples alike. It must fit that loss: `symmetric_kl` fits a cross-entropy; for
    a binary one make a subclass with `divergence = staticmethod(bernoulli_kl)`, for a squared error with
    `squared_difference`. Metrics of the training are of both passes. `evaluate` and `predict` are Keras' own.
    """

    alpha = 1.0
    divergence = staticmethod(symmetric_kl)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "alpha": self.alpha}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        model = super().from_config({name: value for name, value in config.items() if name != "alpha"}, custom_objects)
        model.alpha = config["alpha"]
        return model

    def train_step(self, data: Any) -> dict[str, Any]:
        """Called by Keras for every batch."""
        if self.alpha > 0:  # one forward of [x; x]: two dropout masks
            data = repeat_batch(keras.tree.map_structure(keras.ops.convert_to_tensor, data, none_is_leaf=False))
        return super().train_step(data)

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Tensor:
        """Called by Keras for every batch, also while it evaluates."""
        loss: Tensor = super().compute_loss(x, y, y_pred, sample_weight, training)
        if training and self.alpha > 0:
            labels = split_passes(y)[0]
            if labels.ndim == y_pred.ndim and labels.shape[-1] == 1 < y_pred.shape[-1]:  # classes (N, 1)
                labels = labels.squeeze(-1)
            loss = loss + rdrop_loss(y_pred, labels, alpha=self.alpha, task_passes=(), divergence=self.divergence).loss
        return loss


def build_model(alpha: float) -> RDropModel:
    inputs = keras.Input((64,))
    hidden = keras.layers.Dropout(0.3)(keras.layers.Dense(128, activation="relu")(inputs))
    model = RDropModel(inputs, keras.layers.Dense(10)(hidden))
    model.alpha = alpha
    return model


def train(alpha: float, epochs: int = 20) -> float:
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, model = images.astype("float32") / 16, build_model(alpha)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(3e-3), loss=loss, metrics=["accuracy"])
    model.fit(images[:200], labels[:200], batch_size=20, epochs=epochs, verbose=0)
    return float(model.evaluate(images[200:], labels[200:], verbose=0, return_dict=True)["accuracy"])


if __name__ == "__main__":
    for alpha in (0.0, 5.0):
        print(f"alpha {alpha:g}: accuracy on other images {train(alpha):.3f}")
