"""R-Drop in the Hugging Face Trainer: a small Vision Transformer on 300 of scikit-learn's 8x8 digits, with and without.

    python examples/hf_trainer.py

Needs pip install '.[transformers]' scikit-learn in the clone. Two lines differ from plain Trainer code: the import, and
`alpha=`. It shows the code, not whether R-Drop helps; for that, `rdrop compare digits` compares over seeds.
"""

import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from rdrop.integrations.transformers import RDropTrainer

Example = dict[str, torch.Tensor]


def digits() -> tuple[list[Example], list[Example]]:
    """300 training and 500 validation images, as `(1, 8, 8)` pixels in [0, 1] with their class."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[:800]
    pixels = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    examples = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, torch.tensor(labels[order]), strict=True)]
    return examples[:300], examples[300:]


def small_vit() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.1,  # 0 in ViT unless set, and without dropout all passes agree
        attention_probs_dropout_prob=0.1,
    )
    return ViTForImageClassification(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(alpha: float, folder: str) -> dict[str, float]:
    train_set, valid_set = digits()
    set_seed(0)
    trainer = RDropTrainer(
        model=small_vit(),
        args=TrainingArguments(
            folder,
            max_steps=200,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            logging_steps=100,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=train_set,
        eval_dataset=valid_set,
        compute_metrics=accuracy,
        alpha=alpha,  # the paper's; 0 is plain training
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    for alpha in (0.0, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            scores = train(alpha, folder)
        print(f"alpha={alpha:g}: accuracy {scores['eval_accuracy']:.3f}, loss {scores['eval_loss']:.3f}")
