from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_prep.manifest import verify_quick
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import TokenizerSettings
from kraken_train.common.errors import DataError
from kraken_train.data.blend import Blend
from kraken_train.data.dataset import BLOCK, Samples, TokenStream, open_split, sequential
from kraken_train.data.shuffle import ShuffledOrder


def make_stream(sizes: list[int]) -> tuple[TokenStream, np.ndarray]:
    """A stream of shards of these sizes, and the same tokens as one array."""
    tokens = np.arange(sum(sizes), dtype=np.uint16) + 7
    return TokenStream(np.split(tokens, np.cumsum(sizes)[:-1])), tokens.astype(np.int64)


@settings(max_examples=60)
@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_stream_crosses_shards(data: st.DataObject, sizes: list[int]) -> None:
    stream, tokens = make_stream(sizes)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    read = stream.read(start, stop)
    assert len(stream) == len(tokens)
    assert read.dtype == np.int64
    assert read.tolist() == tokens[start:stop].tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 8), (3, 2)])
def test_stream_refuses_what_it_has_not(start: int, stop: int) -> None:
    with pytest.raises((IndexError, ValueError)):
        make_stream([3, 4])[0].read(start, stop)


def test_samples_against_naive_concatenation() -> None:
    stream, tokens = make_stream([5, 1, 17, 30])
    samples = Samples([stream], context_length=4, seed=11)
    run = range(2 * (53 - 1) // 4 + 3)  # more than two epochs
    batch = samples.batch(run)
    assert batch.shape == (len(run), 5)
    assert batch.dtype == np.int64
    for row, k in zip(batch, run, strict=True):
        start = ShuffledOrder(13, 11)[k] * 4
        assert row.tolist() == tokens[start : start + 5].tolist()


def test_batches_do_not_depend_on_how_they_are_divided() -> None:
    stream, _ = make_stream([100, 101])
    whole = Samples([stream], 8, seed=5).batch(range(48))
    divided = Samples([stream], 8, seed=5)
    by_rank = [
        np.concatenate([divided.batch(range(s + 4 * r, s + 4 * r + 4)) for s in range(0, 48, 8)]) for r in (0, 1)
    ]
    merged = np.stack([np.split(part, 6) for part in by_rank], axis=1).reshape(48, 9)
    assert np.array_equal(merged, whole)


SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=30)
@given(st.data(), SHARES, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_blend_is_its_sets_one_after_the_other(
    data: st.DataObject, shares: list[int], context: int, seed: int
) -> None:
    """Whatever was read before, sample k is the next one of its set, in that set's own order."""
    sizes = [data.draw(st.lists(st.integers(context + 1, 40), min_size=1, max_size=3)) for _ in shares]
    tokens = [np.arange(sum(size)) + 1000 * number for number, size in enumerate(sizes)]
    streams = [TokenStream(np.split(part, np.cumsum(size)[:-1])) for part, size in zip(tokens, sizes, strict=True)]
    start = data.draw(st.sampled_from([0, 1, 77, BLOCK - 3, 2 * BLOCK - 1, 10**9]))
    batch = Samples(streams, context, seed, shares).batch(range(start, start + 20))
    sets, reads = Blend(shares).locate(np.arange(start, start + 20))
    for row, number, read in zip(batch.tolist(), sets.tolist(), reads.tolist(), strict=True):
        order = ShuffledOrder((len(tokens[number]) - 1) // context, seed, number)
        begin = order[read] * context
        assert row == tokens[number][begin : begin + context + 1].tolist()


def test_resumed_anywhere_it_is_the_same() -> None:
    streams = [make_stream([100, 101])[0], make_stream([3000])[0]]
    whole = Samples(streams, 8, 5, [3, 1]).batch(range(2 * BLOCK + 500))
    for start in (0, 1, 47, BLOCK - 2, BLOCK, 2 * BLOCK + 499):
        resumed = Samples(streams, 8, 5, [3, 1]).batch(range(start, min(start + 50, len(whole))))
        assert np.array_equal(resumed, whole[start : start + 50])


def reading(tokens: int = 20_000_000) -> Samples:
    return Samples([TokenStream(np.split(np.arange(tokens, dtype=np.uint16), 5))], 1024, seed=0)


def test_reading_costs_a_copy_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of samples the places are computed once, and together; a sample takes no more than a few calls."""
    samples, places = reading(), []
    starts = samples.starts
    monkeypatch.setattr(samples, "starts", lambda numbers: (places.append(len(numbers)), starts(numbers))[1])
    samples.batch(range(8))
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    for first in range(8, BLOCK, 8):
        samples.batch(range(first, first + 8))
    sys.setprofile(None)
    assert places == [BLOCK]
    assert calls < 20 * BLOCK


@pytest.mark.slow  # seconds, which are worth little where other work shares the processor
def test_reading_is_fast() -> None:
    """Against plain copies of the same windows, each the least of many times: other work only adds to them."""
    samples = reading()
    shard = samples.stream.shards[0]

    def copy(numbers: range) -> NDArray[np.int64]:
        return np.stack([shard[k * 7_000 :][:1025] for k in numbers]).astype(np.int64)

    def seconds(read: Callable[[range], NDArray[np.int64]]) -> float:
        began = time.perf_counter()
        for first in range(0, 512, 8):
            torch.from_numpy(read(range(first, first + 8)))
        return time.perf_counter() - began

    ours = copies = math.inf
    for _ in range(200):
        ours, copies = min(ours, seconds(samples.batch)), min(copies, seconds(copy))
        if ours < 4 * copies:
            break
    assert ours < 4 * copies


def test_data_smaller_than_a_sample() -> None:
    stream, _ = make_stream([3, 5])
    assert Samples([stream], 7, seed=0).batch([0]).tolist() == [list(range(7, 15))]
    with pytest.raises(DataError, match=r"have 8 tokens, but one sample takes 9 .*context_length below 8"):
        Samples([stream], 8, seed=0)


@pytest.mark.parametrize("length", [2, 4, 5, 6, 8, 9, 13, 50])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sequential_predicts_each_token_once(length: int, batch_size: int) -> None:
    stream, tokens = make_stream([1, length - 1])
    windows = list(sequential(stream, 4, batch_size))
    assert np.concatenate([window[:, 1:].ravel() for window in windows]).tolist() == tokens[1:].tolist()
    assert np.concatenate([window[:, :-1].ravel() for window in windows]).tolist() == tokens[:-1].tolist()
    assert all(len(window) <= batch_size and window.shape[1] <= 5 for window in windows)
    assert all(window.shape[1] == 5 for window in windows[:-1])


def test_sequential_needs_two_tokens() -> None:
    with pytest.raises(DataError, match="have 1 tokens"):
        next(sequential(make_stream([1])[0], 4, 1))


def test_open_split(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for i in range(40):
        (source / f"{i}.txt").write_text(f"document {i} about the sea and the number {i * i}\n")
    settings = PrepareConfig(
        source=str(source),
        output_dir=str(tmp_path / "data"),
        validation_fraction=0.0,
        shard_tokens=200,
        tokenizer=TokenizerSettings(kind="sentencepiece", vocab_size=290),
    )
    manifest = prepare(settings)
    stream = open_split(tmp_path / "data", "train")
    assert len(stream.shards) > 2
    assert len(stream) == manifest.splits["train"].tokens
    assert int((stream.read(0, len(stream)) == manifest.tokenizer.end_of_document).sum()) == 40
    with pytest.raises(DataError, match=r"has no split validation, only train; .*validation_fraction above 0"):
        open_split(tmp_path / "data", "validation", verify_quick(tmp_path / "data"))
    (tmp_path / "data" / "train_00001.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_00001.bin is empty"):
        open_split(tmp_path / "data", "train")
