"""Training of a SentencePiece model that loses nothing: decode(encode(text)) == text."""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from sentencepiece import SentencePieceTrainer

from data_prep.tokenizer_settings import TokenizerSettings
from kraken_train.common.errors import ConfigError, DataError

END_PIECE = "<|endoftext|>"
# SentencePiece leaves out whole texts with these (a tab, and its marks of a space and of an unknown piece).
RESERVED = re.compile("[\t\0\u2581\u2585]+")


def train_sentencepiece(settings: TokenizerSettings, texts: Iterable[str]) -> bytes:
    """A serialized model of exactly `settings.vocab_size` pieces: unknown (0), end of document (1), bytes, the rest.

    Deterministic in the texts and the settings. Raises ConfigError if the text supports no vocabulary of that size,
    and DataError if there is no text.
    """
    sample = sample_texts(texts, settings.max_training_documents, settings.max_training_bytes)
    if not sample:
        raise DataError("the source holds no document with text to train a tokenizer on; use another source")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_trainable(sample),
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.model_type,
            byte_fallback=settings.byte_fallback,
            character_coverage=settings.character_coverage,
            # Keep each character as it is, white space above all.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # bytes; longer texts would be left out
            unk_id=0,
            eos_id=1,
            eos_piece=END_PIECE,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        raise ConfigError(_explain(settings, str(error))) from error
    return model.getvalue()


def sample_texts(texts: Iterable[str], max_documents: int, max_bytes: int) -> list[str]:
    """A sample of about `max_bytes` UTF-8 bytes from the first `max_documents` texts, in their order.

    A text is chosen by its hash, so that a source sorted by topic or by length still gives a fair sample.
    """
    chosen: list[tuple[int, int, int, str]] = []  # a heap: negative hash, negative position, bytes, text
    size = 0
    for position, text in enumerate(islice(texts, max_documents)):
        encoded = text.encode()
        key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8, person=b"sample").digest(), "big")
        heapq.heappush(chosen, (-key, -position, len(encoded), text))
        size += len(encoded)
        while size - chosen[0][2] >= max_bytes:
            size -= heapq.heappop(chosen)[2]
    return [text for _, _, _, text in sorted(chosen, key=lambda entry: -entry[1])]


def _trainable(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (part for part in RESERVED.split(text) if part)


def _explain(settings: TokenizerSettings, message: str) -> str:
    asked = f"tokenizer.vocab_size={settings.vocab_size}"
    if largest := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return f"{asked} is more than the text supports; use at most {largest.group(1)}, or more text"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{asked} has no room for the text's characters; use at least {smallest.group(1)}, "
            "or a smaller tokenizer.character_coverage"
        )
    return f"the tokenizer cannot be trained with {asked} on this text: {message}"
