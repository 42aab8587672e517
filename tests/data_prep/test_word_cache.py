"""Looking words up gives exactly what the tokenizer gives for the whole text."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest
import tiktoken
from data_helpers import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_prep import word_cache
from data_prep.tokenizer_settings import TokenizerSettings
from data_prep.tokenizers import GPT2Tokenizer, HuggingFaceTokenizer, Tokenizer, build_tokenizer
from data_prep.word_cache import SENTENCEPIECE_WORDS, CachedTokenizer, exact_pattern

# White space and controls of all kinds, letters, marks and digits of several scripts, what contractions are made of.
CHARACTERS = (
    "ab Zs'tdl  \n\n\t\r\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\x00.,!?-_|<>09²½٣é\u0301日本ΩЖ🦑\u2581\u2019"
)
TEXT = st.text(st.sampled_from(CHARACTERS), max_size=60) | st.text(max_size=30)


def hard_texts() -> list[str]:
    rng = random.Random(1)
    return make_texts(30) + ["".join(rng.choices(CHARACTERS, k=rng.randint(1, 80))) for _ in range(300)]


@cache
def sentencepiece() -> Tokenizer:
    settings = TokenizerSettings("sentencepiece", vocab_size=500, character_coverage=1.0)
    return build_tokenizer(settings, hard_texts)


def hf_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(hard_texts(), trainer)
    return backend


@cache
def huggingface() -> Tokenizer:
    return HuggingFaceTokenizer(hf_backend().to_str(), "<|endoftext|>", "test")


@cache
def gpt2() -> Tokenizer:
    """tiktoken's pattern with merges learned from the texts."""
    pattern = re.compile(r"\s*\S{1,3}|\s+")  # some merges, within and across what the pattern allows
    ranks = {bytes([i]): i for i in range(256)}
    for text in hard_texts():
        for word in pattern.findall(text):
            raw = word.encode()
            for end in range(2, len(raw) + 1):
                ranks.setdefault(raw[:end], len(ranks))
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)
    tokenizer.ranks = ranks
    tokenizer.encoding = tiktoken.Encoding("test", pat_str=GPT2Tokenizer.PATTERN, mergeable_ranks=ranks,
                                           special_tokens={})  # fmt: skip
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, huggingface, gpt2])
def test_words_are_exact(make: object) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    assert tokenizer.words is not None
    encoder = CachedTokenizer(tokenizer)

    @settings(max_examples=150)
    @given(texts=st.lists(TEXT, max_size=4))
    def check(texts: list[str]) -> None:
        assert [ids.tolist() for ids in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)
        assert all("".join(tokenizer.words.findall(text)) == text for text in texts)  # type: ignore[union-attr]

    check()
    texts = hard_texts()
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 20)
    encoder, texts = CachedTokenizer(sentencepiece()), [text + " x" + "y" * 100 for text in make_texts(20)]
    for text in texts:
        assert encoder.encode_batch([text])[0].tolist() == sentencepiece().encode_batch([text])[0]
        assert not any(len(word) > word_cache.LONGEST_WORD for word in encoder._known)
    assert len(encoder._known) < 60


def test_a_piece_across_a_border_rules_a_pattern_out() -> None:
    assert exact_pattern(SENTENCEPIECE_WORDS, [" sea", ".\n", "   "]) is SENTENCEPIECE_WORDS[0]
    assert exact_pattern(SENTENCEPIECE_WORDS, [" sea", "a.", "   "]) is SENTENCEPIECE_WORDS[1]
    assert exact_pattern(SENTENCEPIECE_WORDS, [" sea", "a b"]) is None


def test_only_what_is_known_to_be_exact_is_looked_up() -> None:
    unigram = TokenizerSettings("sentencepiece", vocab_size=300, model_type="unigram")
    assert build_tokenizer(unigram, lambda: make_texts(100)).words is None
    backend = hf_backend()
    backend.normalizer = normalizers.NFC()
    assert HuggingFaceTokenizer(backend.to_str(), "<|endoftext|>", "test").words is None
    backend = hf_backend()
    backend.add_tokens(["sea ship"])
    assert HuggingFaceTokenizer(backend.to_str(), "<|endoftext|>", "test").words is None
