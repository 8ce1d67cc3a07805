"""The search for a text, and what a decoder of it can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Ids = Sequence[int]


@dataclass(frozen=True)
class Search:
    """The settings of a beam search, which scores a text by its log-probability over its length to `length_penalty`.

    The search for a sentence ends with as many finished hypotheses as there are beams. Of hypotheses with the same
    score either may be returned: the two decoders add up in a different order. Where `min_length` and
    `no_repeat_ngram` rule tokens out, CTranslate2 shares their probability among the others, and `generate` (as
    fairseq) does not: with several beams they then often differ, and `generate` searches.
    """

    beams: int
    length_penalty: float = 1.0
    min_length: int = 0
    """Tokens, without the end."""
    no_repeat_ngram: int = 0
    """Runs of so many tokens occur once at most. 0: no such rule."""
    never: tuple[int, ...] = ()
    """Ids that are not for output: padding, and what the model has no token for."""
    prefix: tuple[int, ...] = ()
    """The ids with which every output begins, e.g. BART's `<s>`; they are not returned."""

    @property
    def rules_tokens_out(self) -> bool:
        """Whether tokens are ruled out while there are several hypotheses to choose from.

        To forbid an empty output costs all of them the same.
        """
        return self.beams > 1 and (self.min_length > 1 or self.no_repeat_ngram > 0)


class Decoder(Protocol):
    name: str
    """The program that searches, with its version."""

    def __call__(self, sources: Sequence[Ids], max_length: int) -> list[list[int]]:
        """Returns the best output for each source, whose ids are as the model reads them: with an end, not padded.

        At most `max_length` ids, without start, prefix and end.
        """
