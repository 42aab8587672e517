"""A tokenizer made faster by remembering words.

Text repeats its words. Where a tokenizer is known to encode the parts of a text independently, each part is encoded
once, natively and in batches, and looked up from then on; the ids are exactly those of the whole text.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import token_dtype

MOST_WORDS = 300_000  # remembered, about 70 MB
LONGEST_WORD = 64  # characters; longer ones are hardly ever seen again

# A run of letters or of other characters, with the spaces before it. SentencePiece's training makes no piece that
# crosses these borders, which is verified for each model.
SENTENCEPIECE_WORDS = (re.compile(r" *(?:[^\W\d_]+|(?:(?! )[\W\d_])+)| +"), re.compile(r" *[^ ]+| +"))
# White space and what follows it up to the next white space, or up to an ASCII letter before another ASCII character.
# No alternative of GPT-2's pattern crosses these borders, and none looks back. Unicode's White_Space, not Python's \s.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ASCII_OTHER = r"\x00-\x08\x0e-\x1f!-@\[-`{-\x7f"
GPT2_WORDS = re.compile(
    rf"[{_SPACE}]*[{_ASCII_OTHER}]*[A-Za-z]+(?=[{_ASCII_OTHER}{_SPACE}]|\Z)|[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+"
)


def exact_pattern(patterns: Sequence[re.Pattern[str]], pieces: Iterable[str]) -> re.Pattern[str] | None:
    """The first pattern none of whose borders is inside any of `pieces`."""
    pieces = list(pieces)
    return next((p for p in patterns if all(len(p.findall(piece)) <= 1 for piece in pieces)), None)


class WholeTextTokenizer(Protocol):
    """The tokenizer that is made faster (`data_prep.tokenizers`)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def words(self) -> re.Pattern[str] | None:
        """Matches the parts of a text that it encodes independently; None: it has none."""
        ...

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class CachedTokenizer:
    """Encodes texts to token ids of the data's type, on one thread; word by word where `tokenizer.words` says how."""

    def __init__(self, tokenizer: WholeTextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._code = "H" if self.dtype.itemsize == 2 else "i"
        self._known: dict[str, bytes] = {}

    def encode_batch(self, texts: list[str]) -> list[NDArray[Any]]:
        """(length,) ids of each text, equal to `tokenizer.encode_batch`."""
        if self.tokenizer.words is None:
            return [np.array(ids, dtype=self.dtype) for ids in self.tokenizer.encode_batch(texts)]
        words = [self.tokenizer.words.findall(text) for text in texts]
        if len(self._known) > MOST_WORDS:
            self._known.clear()  # what is frequent comes back at once
        known = self._known
        new = list({word for part in words for word in part if word not in known})
        for word, ids in zip(new, self.tokenizer.encode_batch(new), strict=True):
            known[word] = array(self._code, ids).tobytes()
        encoded = [np.frombuffer(b"".join(map(known.__getitem__, part)), self.dtype) for part in words]
        for word in new:
            if len(word) > LONGEST_WORD:
                del known[word]
        return encoded
