"""R-Drop in Keras 3 on its torch backend, on scikit-learn's digits: a training step of its own, the rest is Keras'.

    python examples/keras_fit.py

Needs pip install keras scikit-learn.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

from typing import Any

import keras
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rdrop import rdrop_loss, repeat_batch, split_passes


def as_tensor(array: Any) -> Any:
    return None if array is None else keras.ops.convert_to_tensor(array)


class RDropModel(keras.Model):
    """A Keras model whose `fit` has R-Drop; its last layer gives logits. alpha 0 is plain training.

    `evaluate` and `predict` are Keras' own: one pass, no dropout.
    """

    alpha = 1.0

    def train_step(self, data: Any) -> dict[str, Any]:
        """Called by Keras for every batch."""
        if self.alpha == 0:
            return super().train_step(data)
        images, labels, _ = map(as_tensor, keras.utils.unpack_x_y_sample_weight(data))
        logits: Tensor = self(repeat_batch(images), training=True)  # one forward of [x; x]: two dropout masks
        loss = rdrop_loss(logits, labels, alpha=self.alpha).loss
        self.zero_grad()
        self._loss_tracker.update_state(loss.detach(), sample_weight=len(labels))
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([weight.value.grad for weight in self.trainable_weights], self.trainable_weights)
        return self.compute_metrics(images, labels, split_passes(logits.detach())[0])


def build_model(alpha: float) -> RDropModel:
    inputs = keras.Input((64,))
    hidden = keras.layers.Dropout(0.3)(keras.layers.Dense(128, activation="relu")(inputs))
    model = RDropModel(inputs, keras.layers.Dense(10)(hidden))
    model.alpha = alpha
    return model


def train(alpha: float, epochs: int = 20) -> float:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images, labels = digits.data.astype("float32") / 16, digits.target
    model = build_model(alpha)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images[:200], labels[:200], batch_size=20, epochs=epochs, verbose=0)
    return float(model.evaluate(images[200:], labels[200:], verbose=0, return_dict=True)["accuracy"])


def main() -> None:
    for alpha in (0.0, 5.0):
        print(f"alpha {alpha:g}: accuracy on other images {train(alpha):.3f}")


if __name__ == "__main__":
    main()
