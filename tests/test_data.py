from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.manifest import verify_quick
from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizers import TokenizerSettings
from kraken_train.data import SampleOrder, Samples, TokenStream, open_split, sequential
from kraken_train.errors import ConfigError, DataError


def make_stream(sizes: list[int]) -> tuple[TokenStream, np.ndarray]:
    """A stream of shards of these sizes, and the same tokens as one array."""
    tokens = np.arange(sum(sizes), dtype=np.uint16) + 7
    return TokenStream(np.split(tokens, np.cumsum(sizes)[:-1])), tokens.astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_stream_crosses_shards(data: st.DataObject, sizes: list[int]) -> None:
    stream, tokens = make_stream(sizes)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    read = stream.read(start, stop)
    assert len(stream) == len(tokens) and read.dtype == np.int64
    assert read.tolist() == tokens[start:stop].tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 8), (3, 2)])
def test_stream_refuses_what_it_has_not(start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        make_stream([3, 4])[0].read(start, stop)


FROZEN_ORDER = [3, 8, 6, 4, 9, 1, 5, 2, 0, 7, 3, 9, 7, 6, 4, 1, 8, 2, 5, 0]
FROZEN_IN_LARGE = 714122


def test_order_is_frozen() -> None:
    """These values must never change: a run resumes in the order in which it was started."""
    order = SampleOrder(10, seed=1234)
    assert [order[k] for k in range(20)] == FROZEN_ORDER
    assert SampleOrder(1_000_000, seed=0)[123_456] == FROZEN_IN_LARGE


def test_each_epoch_is_another_permutation() -> None:
    order = SampleOrder(50, seed=3)
    epochs = [[order[k] for k in range(50 * epoch, 50 * (epoch + 1))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order[k] for k in range(50)] == epochs[0]  # going back gives the same again
    assert [SampleOrder(50, seed=4)[k] for k in range(50)] != epochs[0]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed} must be from 0 to 4294967295"):
        SampleOrder(10, seed)


def test_samples_against_naive_concatenation() -> None:
    stream, tokens = make_stream([5, 1, 17, 30])
    samples = Samples(stream, context_length=4, seed=11)
    assert len(samples) == (53 - 1) // 4
    run = range(2 * len(samples) + 3)  # more than two epochs
    batch = samples.batch(run)
    assert batch.shape == (len(run), 5) and batch.dtype == np.int64
    for row, k in zip(batch, run, strict=True):
        start = SampleOrder(13, 11)[k] * 4
        assert row.tolist() == tokens[start : start + 5].tolist()


def test_batches_do_not_depend_on_how_they_are_divided() -> None:
    stream, _ = make_stream([100, 101])
    whole = Samples(stream, 8, seed=5).batch(range(48))
    divided = Samples(stream, 8, seed=5)
    by_rank = [
        np.concatenate([divided.batch(range(s + 4 * r, s + 4 * r + 4)) for s in range(0, 48, 8)]) for r in (0, 1)
    ]
    merged = np.stack([np.split(part, 6) for part in by_rank], axis=1).reshape(48, 9)
    assert np.array_equal(merged, whole)


def test_data_smaller_than_a_sample() -> None:
    stream, _ = make_stream([3, 5])
    assert len(Samples(stream, 7, seed=0)) == 1
    with pytest.raises(DataError, match=r"have 8 tokens, but one sample takes 9 .*context_length below 8"):
        Samples(stream, 8, seed=0)


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
    assert len(stream.shards) > 2 and len(stream) == manifest.splits["train"].tokens
    assert int((stream.read(0, len(stream)) == manifest.tokenizer.end_of_document).sum()) == 40
    with pytest.raises(DataError, match=r"has no split validation, only train; .*validation_fraction above 0"):
        open_split(tmp_path / "data", "validation", verify_quick(tmp_path / "data"))
    (tmp_path / "data" / "train_00001.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_00001.bin is empty"):
        open_split(tmp_path / "data", "train")
