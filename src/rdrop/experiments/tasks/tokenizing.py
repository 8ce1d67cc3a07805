"""Tokenizers of the tasks that read text: a byte-level BPE learned from the training texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def learned_bpe(
    texts: Iterable[str],
    vocabulary: int,
    special_tokens: Sequence[str],
    *,
    unknown: str | None = None,
    lowercase: bool = False,
    add_prefix_space: bool = True,
) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocabulary` entries, or of the special tokens and the 256 bytes alone.

    It knows any text: the bytes are always in it. The same texts give the same tokenizer, which BERT's own WordPiece
    does not promise: its trainer numbers the letters inside words in an order that changes from run to run.
    `add_prefix_space` makes the first word one like any other.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
