from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.prepared_set import write_set

from data_prep.manifest import TOKENIZER_FOLDER, Manifest
from kraken_train.common.errors import DataError
from kraken_train.data.dataset import TrainingData, open_split, sequential
from kraken_train.data.validation_set import validation_sets


@pytest.fixture
def web(tmp_path: Path) -> Path:
    return write_set(tmp_path / "web", {"train": 5000, "validation": 170})


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return write_set(tmp_path / "books", {"train": 300, "validation": 90}, first=200, dtype="<i4")


def test_shares_of_the_samples(web: Path, books: Path) -> None:
    data = TrainingData({web: 3, books: 1})
    batch = data.samples(8, seed=4).batch(range(400))
    of_books = (batch >= 200).all(axis=1)
    assert of_books.sum() == 100
    assert ((batch < 200).all(axis=1) | of_books).all()
    assert (of_books.reshape(100, 4).sum(axis=1) == 1).all()
    assert data.vocab_size == 500
    assert data.tokenizer_dir == web / TOKENIZER_FOLDER
    assert data.describe() == f"5,300 training tokens (0.75 from {web}, 0.25 from {books})"
    assert TrainingData({web: 1}).describe() == "5,000 training tokens"


def test_fingerprint_is_of_content_and_shares(web: Path, books: Path, tmp_path: Path) -> None:
    fingerprint = TrainingData({web: 3, books: 1}).fingerprint
    assert TrainingData({web: 1}).fingerprint == open_manifest(web).fingerprint
    others = [TrainingData(shares).fingerprint for shares in ({web: 2, books: 1}, {books: 1, web: 3}, {web: 1})]
    assert len({fingerprint, *others}) == 4
    moved = books.rename(tmp_path / "moved")
    assert TrainingData({web: 3, moved: 1}).fingerprint == fingerprint


def open_manifest(folder: Path) -> Manifest:
    return TrainingData({folder: 1}).manifests[folder]


def test_validation_windows(web: Path, books: Path, tmp_path: Path) -> None:
    """The first windows of each split, in the shares of the training, as far as there are some."""
    expected = {folder: list(sequential(open_split(folder, "validation"), 8, 1)) for folder in (web, books)}

    def check(shares: dict[Path, int], samples: int, counts: dict[Path, int]) -> None:
        for batch_size in (1, 3):
            sets = validation_sets(TrainingData(shares), {}, samples)
            batches = [batch for chosen in sets for batch in chosen.windows(8, batch_size)]
            rows = [row.tolist() for batch in batches for row in batch]
            assert rows == [window[0].tolist() for f, count in counts.items() for window in expected[f][:count]]
            assert all(len(batch) <= batch_size for batch in batches)

    check({web: 1}, 7, {web: 7})
    check({web: 1}, 1000, {web: 22})  # 21 whole windows and what remains
    check({web: 3, books: 1}, 12, {web: 9, books: 3})
    check({web: 1, books: 3}, 40, {web: 10, books: 12})
    unvalidated = write_set(tmp_path / "unvalidated", {"train": 100})
    check({web: 1, unvalidated: 8, books: 1}, 6, {web: 3, books: 3})
    assert validation_sets(TrainingData({unvalidated: 1}), {}, 7) == []


@pytest.mark.parametrize("way", [os.symlink, shutil.copytree])
def test_the_same_data_twice_is_noted_and_in_two_orders(
    web: Path, books: Path, tmp_path: Path, way: Callable[[Path, Path], object]
) -> None:
    """Both must not give the same samples at the same time."""
    again = tmp_path / "again"
    way(web, again)
    data = TrainingData({web: 1, books: 1, again: 1})
    (note,) = data.repetitions()
    assert note.startswith(f"data_dir: {again} holds the same training tokens as {web}, ")
    assert TrainingData({web: 1, books: 1}).repetitions() == []
    samples = data.samples(8, seed=3)
    starts = samples.starts(np.arange(3 * 624))  # an epoch of `web`
    sets, _ = samples.blend.locate(np.arange(3 * 624))
    first, second = starts[sets == 0], starts[sets == 2] - samples.begins[2]
    assert sorted(first) == sorted(second) == list(range(0, 8 * 624, 8))
    assert (first == second).sum() < 10  # one on average by chance


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"size": 400}, r"vocab_size 500 and 400"),
        ({"tokenizer": "other pieces"}, r"file tokenizer.model"),
    ],
)
def test_another_tokenizer_is_refused(web: Path, tmp_path: Path, other: dict, difference: str) -> None:
    code = write_set(tmp_path / "code", {"train": 100}, **other)
    message = rf"data_dir={web} and {code} were prepared with different tokenizers \({difference}\); prepare both with"
    with pytest.raises(DataError, match=message):
        TrainingData({web: 1, code: 1})


def test_a_set_that_is_too_short_is_named(web: Path, tmp_path: Path) -> None:
    small = write_set(tmp_path / "small", {"train": 5})
    with pytest.raises(DataError, match=rf"the data in {small} have 5 tokens, but one sample takes 9"):
        TrainingData({web: 1, small: 1}).samples(8, seed=0)


def test_documents_without_an_end(web: Path, tmp_path: Path) -> None:
    ending = write_set(tmp_path / "ending", {"train": 202})  # the last token is 1
    TrainingData({ending: 1}).require_ends_of_documents()
    message = f"data_dir={web} has no end-of-document token (1) at the end of its documents"
    with pytest.raises(DataError, match=re.escape(message)):
        TrainingData({ending: 1, web: 1}).require_ends_of_documents()
