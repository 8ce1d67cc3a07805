"""R-Drop in a training loop of your own: a small network on scikit-learn's digits, with and without.

    python examples/raw_loop.py

Needs scikit-learn for its data: pip install scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from rdrop import check_rdrop, rdrop_loss, repeat_batch


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def train(alpha: float, images: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int = 30) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(20):
            logits = model(repeat_batch(images[batch]))  # one forward of [x; x]: two dropout masks
            loss, _, _ = rdrop_loss(logits, labels[batch], alpha=alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train_rows, test_rows = train_test_split(range(len(labels)), train_size=100, stratify=labels, random_state=0)

    print(check_rdrop(build_model(), images[:8]))
    for alpha in (0.0, 5.0):
        scores = []
        for seed in range(2):
            model = train(alpha, images[train_rows], labels[train_rows], seed)
            with torch.no_grad():
                scores.append(float((model(images[test_rows]).argmax(-1) == labels[test_rows]).float().mean()))
        print(f"alpha {alpha:g}: test accuracy " + ", ".join(f"{score:.3f}" for score in scores))


if __name__ == "__main__":
    main()
