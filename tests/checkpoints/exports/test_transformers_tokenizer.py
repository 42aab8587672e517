"""Our tokenizers in the form that transformers reads: the same ids, or a note that they are not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers

from checkpoints.exports.transformers_tokenizer import (
    byte_letters,
    convert,
    convert_gpt2,
    prose,
    write_transformers_tokenizer,
)
from data_prep.tokenizer_settings import TokenizerSettings
from data_prep.tokenizers import (
    END_OF_DOCUMENT,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)


def trained(**settings: Any) -> Tokenizer:
    return build_tokenizer(TokenizerSettings(kind="sentencepiece", vocab_size=1000, **settings), lambda: iter(prose()))


def foreign(**settings: Any) -> Tokenizer:
    """As SentencePiece trains by itself: with NFKC, a space before each text, and no double spaces."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(prose()), model_writer=model, vocab_size=1000, minloglevel=2, **settings
    )
    return SentencePieceTokenizer(model.getvalue(), "sentencepiece_model")


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (trained, {}),
        (trained, {"byte_fallback": False}),
        (trained, {"model_type": "unigram"}),
        (foreign, {"model_type": "bpe", "normalization_rule_name": "identity"}),
        (foreign, {"model_type": "unigram", "normalization_rule_name": "identity"}),
    ],
)
def test_sentencepiece_is_the_same(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make(**settings)
    assert write_transformers_tokenizer(tokenizer, tmp_path, 128) is None
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    text = "It is  an example\n of the text."
    assert backend.decode(backend.encode(text).ids) == tokenizer.decode(tokenizer.encode_batch([text])[0])
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert backend.token_to_id(settings["eos_token"]) == tokenizer.end_of_document
    assert settings["model_max_length"] == 128


def test_a_note_on_ids_that_differ(tmp_path: Path) -> None:
    """NFKC of `tokenizers` goes by graphemes."""
    note = write_transformers_tokenizer(foreign(model_type="unigram"), tmp_path, 128)
    assert note is not None
    assert "does not give the ids that the model was trained with on 1 of" in note
    assert repr("½\u0301") in note
    assert (tmp_path / "tokenizer.json").exists()


def test_a_note_on_a_kind_that_cannot_be_converted(tmp_path: Path) -> None:
    note = write_transformers_tokenizer(foreign(model_type="char", character_coverage=1.0, hard_vocab_limit=False),
                                        tmp_path, 128)  # fmt: skip
    assert note is not None
    assert "AutoTokenizer finds none" in note
    assert not list(tmp_path.iterdir())


def byte_level_bpe() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    backend.train_from_iterator(prose(), trainer)
    return backend


class SmallGPT2(GPT2Tokenizer):
    """GPT-2's tokenizer with fewer merges: its own are on the network only."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.ranks = ranks
        self.end_of_document = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            "small", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_DOCUMENT: len(ranks)}
        )


def test_gpt2_is_the_same(tmp_path: Path) -> None:
    """Ids, and the merges, which tiktoken's ranks do not name."""
    original = byte_level_bpe()
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    tokenizer = SmallGPT2({bytes(byte_of[c] for c in token): i for token, i in original.get_vocab().items()})
    assert write_transformers_tokenizer(tokenizer, tmp_path, 128) is None
    converted = json.loads(convert_gpt2(tokenizer).to_str())["model"]["merges"]
    assert converted == json.loads(original.to_str())["model"]["merges"]
    assert Backend.from_file(str(tmp_path / "tokenizer.json")).token_to_id(END_OF_DOCUMENT) == len(tokenizer.ranks)


def test_huggingface_is_the_same_without_added_tokens(tmp_path: Path) -> None:
    backend = byte_level_bpe()
    backend.add_special_tokens(["<s>", "</s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = HuggingFaceTokenizer(backend.to_str(), "</s>", "x")
    assert write_transformers_tokenizer(tokenizer, tmp_path, 128) is None
    assert convert(tokenizer).encode("a b").ids == list(tokenizer.encode_batch(["a b"])[0])
