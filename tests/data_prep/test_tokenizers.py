from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from data_helpers import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data_prep import gpt2_ranks
from data_prep.tokenizers import Tokenizer, TokenizerSettings, build_tokenizer, load_tokenizer
from data_prep.train_tokenizer import sample_texts
from kraken_train.common.errors import ConfigError, DataError

HARD_TEXTS = [
    "  two  leading,   trailing \n\n",
    "tab\there\r\n\n\n    indented",
    "emoji 🦑👩‍🚀 and 日本語 and e\u0301, é",
    "space mark \u2581 and \u2581\u2581, unknown mark \u2585, \u2047",
    "<|endoftext|> <unk> </s> <0x41>",
    "\x00\x01\ufeff\u200b",
    " ",
    "\n",
]


def build(texts: list[str] | None = None, **changes: Any) -> Tokenizer:
    settings = TokenizerSettings(**({"kind": "sentencepiece", "vocab_size": 330} | changes))
    return build_tokenizer(settings, lambda: texts or make_texts(100))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return build()


def round_trip(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert again.encode_batch(HARD_TEXTS) == tokenizer.encode_batch(HARD_TEXTS)
    assert (again.kind, again.vocab_size, again.end_of_document) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )
    return again


def assert_lossless(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_document for ids in encoded for i in ids)


def test_sentencepiece_loses_nothing(trained: Tokenizer, tmp_path: Path) -> None:
    assert trained.vocab_size == 330
    assert_lossless(round_trip(trained, tmp_path), HARD_TEXTS)


@settings(max_examples=100)
@given(text=st.text())
def test_sentencepiece_loses_nothing_property(text: str) -> None:
    if not hasattr(test_sentencepiece_loses_nothing_property, "tokenizer"):
        test_sentencepiece_loses_nothing_property.tokenizer = build()  # type: ignore[attr-defined]
    assert_lossless(test_sentencepiece_loses_nothing_property.tokenizer, [text])  # type: ignore[attr-defined]


def test_unigram_loses_nothing() -> None:
    assert_lossless(build(model_type="unigram", vocab_size=300), HARD_TEXTS)


def test_training_is_deterministic(trained: Tokenizer) -> None:
    assert build().model == trained.model  # type: ignore[attr-defined]


def test_tabs_do_not_keep_a_text_from_training() -> None:
    pieces = build([f"start\t{text}" for text in make_texts(100)], vocab_size=370).processor  # type: ignore[attr-defined]
    assert pieces.piece_to_id("▁harbour") != pieces.unk_id()


def test_vocabulary_larger_than_the_text_supports() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=9000 is more than the text supports; use at most \d+"):
        build(vocab_size=9000)


def test_vocabulary_smaller_than_the_characters() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=100 has no room .* use at least 2\d\d"):
        build(vocab_size=100)


def test_the_largest_vocabulary_named_works() -> None:
    with pytest.raises(ConfigError) as caught:
        build(vocab_size=9000)
    largest = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert build(vocab_size=largest).vocab_size == largest


def test_sample_is_bounded_and_independent_of_order() -> None:
    texts = make_texts(300)
    sample = sample_texts(texts, 1000, 5000)
    size = sum(len(text) for text in sample)
    assert 5000 <= size < 5000 + max(map(len, texts))
    assert sorted(sample) == sorted(sample_texts(texts[::-1], 1000, 5000))
    assert sample == [text for text in texts if text in set(sample)]
    assert sample_texts(texts, 10, 10**9) == texts[:10]


def test_existing_model(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    again = build(kind="sentencepiece_model", path=str(tmp_path / "tokenizer.model"))
    assert again.encode_batch(["sea ship"]) == trained.encode_batch(["sea ship"])
    (tmp_path / "copy").mkdir()
    round_trip(again, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"end_of_document=<end> is no piece of .*tokenizer.model"):
        build(kind="sentencepiece_model", path=str(tmp_path / "tokenizer.model"), end_of_document="<end>")


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.path is not set"):
        build(kind="huggingface")
    with pytest.raises(DataError, match=r"nothing.model does not exist"):
        build(kind="sentencepiece_model", path=str(tmp_path / "nothing.model"))
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"x.model is no SentencePiece model"):
        build(kind="sentencepiece_model", path=str(tmp_path / "x.model"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is no Hugging Face tokenizer"):
        build(kind="huggingface", path=str(tmp_path), end_of_document="x")


def make_huggingface(folder: Path) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(make_texts(50), trainer)
    # What real files contain and data must not: an added token, a limit on the length, padding.
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_huggingface(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    with pytest.raises(ConfigError, match=r"does not say which token ends a text; give tokenizer.end_of_document="):
        build(kind="huggingface", path=str(folder))
    with pytest.raises(ConfigError, match="end_of_document=<end> is no token"):
        build(kind="huggingface", path=str(folder), end_of_document="<end>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    tokenizer = build(kind="huggingface", path=str(folder))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (300, 0)
    (tmp_path / "saved").mkdir()
    assert_lossless(round_trip(tokenizer, tmp_path / "saved"), HARD_TEXTS)


def test_tokens_that_share_an_id(tmp_path: Path) -> None:
    """The library saves one of them, by chance, so that what it has saved may not be readable."""
    file = make_huggingface(tmp_path) / "tokenizer.json"
    description = json.loads(file.read_text())
    vocabulary = description["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first] = vocabulary[second]
    file.write_text(json.dumps(description))
    with pytest.raises(DataError, match=rf"tokenizer.json: 2 tokens have the id {vocabulary[second]}; name a file"):
        build(kind="huggingface", path=str(tmp_path), end_of_document="<|endoftext|>")
    vocabulary[first] = 2**31
    file.write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"a token has the id 2147483648, and ids are less than 16777216; name another"):
        build(kind="huggingface", path=str(tmp_path), end_of_document="<|endoftext|>")


def test_huggingface_end_is_never_text(tmp_path: Path) -> None:
    """Also of a file that lists it as an added token like any other."""
    backend = Backend(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_tokens(["<end>"])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = build(kind="huggingface", path=str(tmp_path), end_of_document="<end>")
    assert tokenizer.end_of_document == 2
    assert tokenizer.encode_batch(["a <end> a"]) == [[1, 0, 1]]


def test_huggingface_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        build(kind="huggingface", path=str(tmp_path), end_of_document="x")


def fake_ranks() -> dict[bytes, int]:
    """As many ranks as GPT-2 has: the bytes, then pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    return {token: rank for rank, token in enumerate(tokens[: gpt2_ranks.NUM_RANKS])}


def test_gpt2_with_stand_in_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoding:
        _mergeable_ranks = fake_ranks()

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Encoding)
    tokenizer = build(kind="gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    assert_lossless(round_trip(tokenizer, tmp_path), HARD_TEXTS)
    ranks = tmp_path / "gpt2.tiktoken"
    ranks.write_bytes(ranks.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"gpt2.tiktoken"):
        load_tokenizer(tmp_path)


def test_gpt2_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("Failed to resolve host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(DataError, match=r"Failed to resolve host.*TIKTOKEN_CACHE_DIR=FOLDER python -c .*get_encoding"):
        build(kind="gpt2")


def test_gpt2_with_a_network_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: threading.Event().wait())
    monkeypatch.setattr(gpt2_ranks, "LONGEST_WAIT", 0.1)
    with pytest.raises(DataError, match=r"no answer within 0.1 s"):
        build(kind="gpt2")


def test_load_reports_damage(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kraken_tokenizer.json cannot be read: No such file"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer.model cannot be read: No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "kraken_tokenizer.json").write_text('{"kind": "gpt2", "version": 2}')
    with pytest.raises(DataError, match=r"version 2, but this program knows .* update the program"):
        load_tokenizer(tmp_path)
    (tmp_path / "kraken_tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sentencepeice"}, "tokenizer.kind=sentencepeice is not known.*did you mean sentencepiece"),
        ({"model_type": "word"}, "tokenizer.model_type=word"),
        ({"vocab_size": 0}, "tokenizer.vocab_size=0 must be greater than 0"),
        ({"character_coverage": 0.5}, "character_coverage=0.5 must be from 0.98 to 1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
