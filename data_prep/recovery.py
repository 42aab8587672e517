"""Compares token ids with those of the tokenizer, without the text that they were made of.

Any text that the tokenizer treats as equal to the original is enough. If the ids determine such a text and the
tokenizer gives it other ids, then this tokenizer has not made them:

    a trained SentencePiece model with bytes, GPT-2's and those like it: decoding loses nothing
    other SentencePiece models: the pieces are the text after normalization, if normalizing what they spell gives it
        again; of BPE, an unknown character can be any that no piece has
    others of `tokenizers`: what is decoded can be another text, so only equal ids say something
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers.pre_tokenizers import ByteLevel

from data_prep.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

SPACE_MARK = SentencePieceTokenizer.SPACE_MARK
BPE_MODEL = 2  # SentencePiece's number of it
PRIVATE_USE = range(0xE000, 0xF900)


class Recovery:
    """Finds texts for the ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._unknown: str | None = None
        if isinstance(tokenizer, SentencePieceTokenizer):
            self.loses_nothing = tokenizer.loses_nothing
            self._unknown = unknown_character(tokenizer)
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            self.loses_nothing = keeps_bytes(json.loads(tokenizer.backend.to_str()))
        else:
            self.loses_nothing = True

    def text_of(self, ids: Sequence[int]) -> str | None:
        """A text whose ids are `ids`, if these are the ids of any text; None where that is not known."""
        if self.loses_nothing:
            return self.tokenizer.decode(ids)
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            return self._text_of_pieces(self.tokenizer.processor, ids)
        text = self.tokenizer.decode(ids)
        return text if list(self.tokenizer.encode_batch([text])[0]) == list(ids) else None

    def _text_of_pieces(self, processor: Any, ids: Sequence[int]) -> str | None:
        spelled = bytearray()
        for token in ids:
            if processor.is_byte(token):
                spelled.append(int(processor.id_to_piece(token)[3:5], 16))
            elif processor.is_unknown(token):
                if self._unknown is None:
                    return None
                spelled += self._unknown.encode()
            elif not processor.is_control(token):
                spelled += processor.id_to_piece(token).encode()
        normal = spelled.decode(errors="replace")
        text = normal.replace(SPACE_MARK, " ")
        if str(processor.normalize("a")).startswith(SPACE_MARK):
            text = text.removeprefix(" ")
        return text if processor.normalize(text) == normal else None


def unknown_character(tokenizer: SentencePieceTokenizer) -> str | None:
    """Of a BPE model, a character that is in no piece and that normalization keeps."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.model)
    if model.trainer_spec.model_type != BPE_MODEL:
        return None  # unigram's scores are sums, rounded otherwise after other characters; words are unknown as a whole
    used = set().union(*(piece.piece for piece in model.pieces))
    kept = (chr(code) for code in PRIVATE_USE if str(tokenizer.processor.normalize(chr(code))).endswith(chr(code)))
    return next((character for character in kept if character not in used), None)


def keeps_bytes(description: dict[str, Any]) -> bool:
    """Whether a tokenizer of `tokenizers` cuts the bytes of a text into tokens and does nothing else to them."""
    model, decoder = description["model"], description["decoder"] or {}
    steps = description["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    return (
        description["normalizer"] is None
        and decoder.get("type") == "ByteLevel"
        and all(
            (step.get("type") == "ByteLevel" and not step["add_prefix_space"])
            or (step.get("type") == "Split" and step["behavior"] != "Removed")
            or step.get("type") == "Digits"
            for step in steps
        )
        and any(step.get("type") == "ByteLevel" for step in steps)
        and model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and set(ByteLevel.alphabet()) <= set(model["vocab"])
        and all(token["special"] for token in description["added_tokens"])
    )
