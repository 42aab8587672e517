"""A text has the same token ids wherever it becomes some: in shards, for prompts, and in an export for transformers."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from checkpoints.exports.transformers_tokenizer import byte_letters, write_transformers_tokenizer
from data_prep.documents import TextRules
from data_prep.encoding import BlockEncoder
from data_prep.gpt2_ranks import NUM_RANKS
from data_prep.records import Values
from data_prep.recovery import Recovery
from data_prep.tokenizer_settings import TokenizerSettings
from data_prep.tokenizers import (
    END_OF_DOCUMENT,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)

# Among these: unknown letters in a row and across words, white space and controls of all kinds, marks that combine,
# spellings of special tokens and bytes, what SentencePiece uses for spaces and what a conversion may use for itself.
PARTS = (
    *" \n\t\r\x00\x0b\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff\u2581\u2585\u2047\u0301\ue000\ue001éЖ日本½²9.,'-_<>/[]",
    "  ", "\n\n\n", "ЖЖ ЖЖ", "日本 日本", "🦑", "👩‍🚀", "the", " the", " river", "sea", "don't", "x" * 300, "=" * 80,
    "Ж" * 70, "<s>", "</s>", "<unk>", "<pad>", "[UNK]", "[CLS]", "[SEP]", "<|user|>", "<0x41>", "<0xE2>",
    END_OF_DOCUMENT,
)  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>"]
TEXT = st.lists(st.sampled_from(PARTS), max_size=25).map("".join) | st.text(max_size=30)


def corpus() -> list[str]:
    rng = random.Random(1)
    return TEXTS * 20 + ["".join(rng.choices(PARTS, k=8)) for _ in range(100)]


def trained(texts: list[str] | None = None, **changes: Any) -> Tokenizer:
    """By this program; the corpus has characters that get no piece, the most frequent ones do."""
    changes = {"vocab_size": 400 if changes.get("byte_fallback", True) else 120, "character_coverage": 0.98} | changes
    return build_tokenizer(TokenizerSettings("sentencepiece", **changes), lambda: iter(texts or corpus()))


def foreign(**changes: Any) -> Tokenizer:
    """As SentencePiece trains by itself."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 400 if changes.get("byte_fallback") else 120, "control_symbols": ["<pad>", "[CLS]"]} | changes,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "sentencepiece_model")


def byte_level(
    normalizer: Any = None, split: Any = None, added: str | None = None, dropout: float | None = None
) -> Backend:
    backend = Backend(models.BPE(dropout=dropout))
    backend.normalizer = normalizer
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_]) if split else bytes_
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END_OF_DOCUMENT, *SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    if added:
        backend.add_tokens([AddedToken(added, lstrip=True, normalized=False)])
    return backend


def word_piece() -> Backend:
    """As BERT's, which adds tokens to a text."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", END_OF_DOCUMENT]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS * 20, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return backend


def unigram() -> Backend:
    """As T5's."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", END_OF_DOCUMENT, *SPECIAL]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 20, trainer)
    return backend


def metaspace_bpe() -> Backend:
    """As Llama 2's, without bytes."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", END_OF_DOCUMENT], show_progress=False)
    backend.train_from_iterator(TEXTS * 20, trainer)
    return backend


def huggingface(backend: Backend) -> Tokenizer:
    return HuggingFaceTokenizer(backend.to_str(), END_OF_DOCUMENT, "test")


def gpt2() -> Tokenizer:
    """GPT-2's pattern with merges learned here, since its own are on the network only, and then pairs of bytes."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocab = byte_level().get_vocab(with_added_tokens=False)
    learned = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in (END_OF_DOCUMENT, *SPECIAL)]
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(byte_of[letter] for letter in token) for token in learned]
    pairs = (bytes(divmod(pair, 256)) for pair in range(1 << 16))
    return GPT2Tokenizer({token: rank for rank, token in enumerate([*dict.fromkeys([*tokens, *pairs])][:NUM_RANKS])})


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": trained,
    "bpe without bytes": lambda: trained(byte_fallback=False),
    "unigram": lambda: trained(TEXTS * 20, model_type="unigram", vocab_size=310),
    "unigram without bytes": lambda: trained(TEXTS * 20, model_type="unigram", byte_fallback=False, vocab_size=58),
    "unigram with runs": lambda: trained(model_type="unigram", vocab_size=340),
    "foreign bpe": lambda: foreign(model_type="bpe", user_defined_symbols=["<|user|>"]),
    "foreign bpe with bytes": lambda: foreign(model_type="bpe", byte_fallback=True),
    "foreign unigram": lambda: foreign(model_type="unigram", user_defined_symbols=["<|user|>", "sea"]),
    "foreign unigram with bytes": lambda: foreign(model_type="unigram", byte_fallback=True),
    "foreign bpe as it is": lambda: foreign(model_type="bpe", normalization_rule_name="identity"),
    "foreign unigram as it is": lambda: foreign(
        model_type="unigram", byte_fallback=True, normalization_rule_name="identity"
    ),
    "foreign words": lambda: foreign(model_type="word"),
    "foreign characters": lambda: foreign(model_type="char"),
    "gpt2": gpt2,
    "byte-level": lambda: huggingface(byte_level()),
    "byte-level with dropout": lambda: huggingface(byte_level(dropout=0.5)),
    "byte-level with NFC": lambda: huggingface(byte_level(normalizers.NFC())),
    "byte-level with its own pattern": lambda: huggingface(byte_level(split=pre_tokenizers.Digits())),
    "byte-level with an added token": lambda: huggingface(byte_level(added="<|user|>")),
    "word pieces": lambda: huggingface(word_piece()),
    "Metaspace unigram": lambda: huggingface(unigram()),
    "Metaspace bpe": lambda: huggingface(metaspace_bpe()),
}


ALL_IS_IN_THE_IDS = (
    "bpe", "unigram", "unigram with runs", "gpt2", "byte-level", "byte-level with dropout",
    "byte-level with its own pattern",
)  # fmt: skip


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_prompts(kind: str, tmp_path: Path) -> None:
    """What preparation writes is what `generate` makes of a prompt, from the files that travel with both."""
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path)
    prompts = load_tokenizer(tmp_path)
    shards = BlockEncoder(load_tokenizer(tmp_path), TextRules(max_document_bytes=1 << 24), append_end_of_document=False)

    def check(texts: list[str]) -> None:
        documents = [text for text in texts if text and not text.isspace()]
        encoded = shards.encode(Values([("here", text) for text in texts], 0))
        found = [part.tolist() for part in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])]
        assert found[: len(documents)] == [list(map(int, prompts.encode_batch([text])[0])) for text in documents]
        assert len(encoded.lengths) == len(documents)

    settings(max_examples=60, deadline=None)(given(st.lists(TEXT, max_size=5))(check))()
    check(["a" * 100_000, " " * 5000 + "x", "Ж " * 20_000])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_their_text(kind: str) -> None:
    """`data_prep.verify` finds a text that gives a document's ids, or says that it cannot tell."""
    tokenizer = tokenizer_of(kind)
    recovery = Recovery(tokenizer)
    found: Counter[bool] = Counter()

    def check(text: str) -> None:
        ids = [int(token) for token in tokenizer.encode_batch([text])[0]]
        recovered = recovery.text_of(ids)
        found[recovered is not None] += 1
        if recovered is not None:
            assert [int(token) for token in tokenizer.encode_batch([recovered])[0]] == ids
        if recovery.loses_nothing:
            assert recovered == text

    settings(max_examples=100, deadline=None)(given(TEXT)(check))()
    assert recovery.loses_nothing == (kind in ALL_IS_IN_THE_IDS)
    assert found[False] == 0 or not recovery.loses_nothing
    found.clear()
    for text in TEXTS:  # ordinary text, of which this one kind does not know all characters
        check(text)
    assert not found[False] or kind == "unigram without bytes"


# What an export for transformers cannot do. Pieces of the user's cut a text, and each part gets a space before it; NFKC
# goes by graphemes; scores are added in float64, which decides between equal sums for runs of one character.
NOT_EXPORTED = (
    "foreign bpe", "foreign unigram", "foreign bpe with bytes", "foreign unigram with bytes", "unigram with runs",
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("foreign words", "foreign characters")])
def test_exports(kind: str, tmp_path: Path) -> None:
    """The same ids as in shards and prompts, also when imported again, or a note."""
    tokenizer = tokenizer_of(kind)
    note = write_transformers_tokenizer(tokenizer, tmp_path, 64)
    if kind in NOT_EXPORTED:
        assert note is not None
        assert "does not give the ids" in note
        return
    assert note is None
    loaded = Backend.from_file(str(tmp_path / "tokenizer.json"))
    loaded.encode_special_tokens = True  # split_special_tokens of transformers
    imported = HuggingFaceTokenizer.from_path(tmp_path, None)  # as checkpoints.import_transformers does
    assert imported.end_of_document == tokenizer.end_of_document

    @settings(max_examples=100, deadline=None)
    @given(TEXT)
    def check(text: str) -> None:
        ids = list(map(int, tokenizer.encode_batch([text])[0]))
        assert loaded.encode(text).ids == imported.encode_batch([text])[0] == ids
        if kind in ALL_IS_IN_THE_IDS:
            assert loaded.decode(ids, skip_special_tokens=False) == text

    check()


def test_transformers_takes_special_tokens_for_text_when_asked(tmp_path: Path) -> None:
    """What the model card says; by default it takes the text for the token."""
    tokenizer = tokenizer_of("unigram")
    write_transformers_tokenizer(tokenizer, tmp_path, 64)
    text = f"a {END_OF_DOCUMENT} <unk> <0x41>"
    ours = list(map(int, tokenizer.encode_batch([text])[0]))
    assert AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)(text).input_ids == ours
    assert tokenizer.end_of_document in AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
