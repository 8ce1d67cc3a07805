"""R-Drop in sentence-transformers: a small cross-encoder from scratch that says whether a number is larger.

    python examples/cross_encoder.py

Needs pip install '.[sentence-transformers]' datasets in the clone. With a model of the Hub it is
`CrossEncoder("microsoft/MiniLM-L12-H384-uncased", num_labels=1)` and everything below `train` stays.
"""

import tempfile
from itertools import permutations
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from rdrop.integrations.sentence_transformers import RDropBinaryCrossEntropyLoss

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
PAIRS = [
    {"query": first, "number": second, "label": float(NUMBERS.index(first) > NUMBERS.index(second))}
    for first, second in permutations(NUMBERS, 2)
]


def new_model(folder: Path, num_labels: int = 1) -> CrossEncoder:
    """Returns a BERT with one layer of random weights, by way of files, as one from the Hub comes."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + NUMBERS), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(special + NUMBERS), num_labels=num_labels, initializer_range=0.1, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return CrossEncoder(str(folder))


def train(alpha: float, updates: int = 120) -> float:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(Path(folder))
        arguments = CrossEncoderTrainingArguments(
            folder,
            max_steps=updates,
            per_device_train_batch_size=33,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            logging_steps=60,
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = RDropBinaryCrossEntropyLoss(model, alpha=alpha)
        CrossEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(PAIRS), loss=loss).train()
    scores = model.predict([(pair["query"], pair["number"]) for pair in PAIRS])  # one pass, no dropout
    return sum((score > 0.5) == (pair["label"] > 0.5) for score, pair in zip(scores, PAIRS, strict=True)) / len(PAIRS)


def main() -> None:
    for alpha in (0.0, 1.0):
        print(f"alpha {alpha:g}: accuracy on the pairs {train(alpha):.3f}")


if __name__ == "__main__":
    main()
