"""The samples of a run in phases, against reading them one by one from the folders of each phase."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from data.prepared_set import write_set
from numpy.typing import NDArray

from kraken_train.common.errors import DataError
from kraken_train.data.blend import Blend
from kraken_train.data.dataset import TrainingData, open_split
from kraken_train.data.phases import RunData
from kraken_train.data.shuffle import ShuffledOrder
from kraken_train.data.validation_set import validation_sets

CONTEXT, SEED = 8, 3
Phases = dict[int, dict[Path, int]]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """web, books and code, whose tokens tell them apart."""
    sizes = {"web": 1601, "books": 809, "code": 409}
    return [
        write_set(tmp_path / name, {"train": size, "validation": 90}, first=200 * number, size=700)
        for number, (name, size) in enumerate(sizes.items())
    ]


def read_one_by_one(phases: Phases, last: int) -> list[NDArray[np.int64]]:
    """Samples 0 to `last` of a run whose phases end exactly at their tokens, which are whole samples."""
    streams, numbers, read = {}, {}, Counter[Path]()
    rows = []
    ends = [*(begin // CONTEXT for begin in list(phases)[1:]), last]
    for shares, end in zip(phases.values(), ends, strict=True):
        for folder in shares:
            numbers.setdefault(folder, len(numbers))
            streams[folder] = open_split(folder, "train").read(0, len(open_split(folder, "train")))
        sets, _ = Blend(list(shares.values())).locate(np.arange(end - len(rows)))
        for folder in [list(shares)[number] for number in sets]:
            order = ShuffledOrder((len(streams[folder]) - 1) // CONTEXT, SEED, numbers[folder])
            start = order[read[folder]] * CONTEXT
            rows.append(streams[folder][start : start + CONTEXT + 1])
            read[folder] += 1
    return rows


def rows_of(phases: Mapping[int, dict[Path, int]], last: int) -> list[NDArray[np.int64]]:
    """The same by RunData."""
    found: list[NDArray[np.int64]] = []
    parts = RunData(phases).samples(CONTEXT, SEED)
    ends = [*(part.first for part in parts[1:]), last]
    for part, end in zip(parts, ends, strict=True):
        assert part.first == len(found)
        found += list(part.samples.batch(part.numbers(range(part.first, end))))
    return found


def test_each_folder_is_read_on(folders: list[Path]) -> None:
    """Also over the end of an epoch, in another order of the folders, and where a folder pauses for a phase."""
    web, books, code = folders
    phases: Phases = {0: {web: 1}, 800: {books: 2, web: 3}, 1600: {code: 1, books: 4}, 2400: {web: 1, code: 1}}
    expected = read_one_by_one(phases, 1000)
    assert np.array_equal(rows_of(phases, 1000), expected)
    of_web = [row.tobytes() for row in expected if row.max() < 200]
    assert len(of_web) > 200
    starts = [row[0] for row in expected[:200] if row.max() < 200]  # fewer than the 200 samples of web
    assert Counter(starts).most_common(1)[0][1] <= 8  # its tokens repeat every 200 = 25 samples, which are 8 in all


def test_one_phase_is_a_run_without_phases(folders: list[Path]) -> None:
    shares = dict(zip(folders, (3, 2, 1), strict=True))
    (part,) = RunData({0: shares}).samples(CONTEXT, SEED)
    plain = TrainingData(shares)
    numbers = range(0, 700)
    assert part.numbers(numbers) == numbers
    assert np.array_equal(part.samples.batch(numbers), plain.samples(CONTEXT, SEED).batch(numbers))
    assert RunData({0: shares}).fingerprints == [plain.fingerprint]


def test_equal_data_in_two_phases_is_one_stretch(folders: list[Path], tmp_path: Path) -> None:
    """Where the folders lie does not matter, nor where whole rounds of a blend are cut."""
    web, books, _ = folders
    shares = {web: 3, books: 1}
    moved = {Path(shutil.copytree(folder, tmp_path / "moved" / folder.name)): share for folder, share in shares.items()}
    whole = rows_of({0: shares}, 400)
    assert np.array_equal(rows_of({0: shares, 960: moved}, 400), whole)
    assert np.array_equal(rows_of({0: moved, 960: moved, 1920: moved}, 400), whole)
    data = RunData({0: shares, 960: moved})
    assert data.fingerprints[0] == data.fingerprints[1]


def test_later_phases_change_nothing_before(folders: list[Path]) -> None:
    web, books, code = folders
    begun: Phases = {0: {web: 1}, 800: {books: 2, web: 3}}
    for later in ({code: 1}, {code: 2, web: 1}):
        assert np.array_equal(rows_of(begun | {1600: later}, 300)[:200], rows_of(begun, 200))


def test_a_phase_that_begins_within_a_sample(folders: list[Path]) -> None:
    """Its first sample is the one after; a step may have gone further, and then the phase goes on from there."""
    web, books, _ = folders
    first, second = RunData({0: {web: 1}, 801: {books: 1}}).samples(CONTEXT, SEED)
    assert (first.first, second.first) == (0, 101)
    assert second.numbers(range(104, 108)) == range(3, 7)


def test_refused(folders: list[Path], tmp_path: Path) -> None:
    web = folders[0]
    other = write_set(tmp_path / "other", {"train": 300}, size=700, tokenizer="other pieces")
    with pytest.raises(DataError, match=r"data_dir=.*web and phases\[1\]\.data_dir=.*other were prepared with differ"):
        RunData({0: {web: 1}, 800: {other: 1}})
    small = write_set(tmp_path / "small", {"train": 5}, size=700)
    with pytest.raises(DataError, match=r"small have 5 tokens, but one sample takes 9"):
        RunData({0: {web: 1}, 800: {small: 1}}).samples(CONTEXT, SEED)


def test_validation_means_the_same_in_all_phases(folders: list[Path], tmp_path: Path) -> None:
    web, books, code = folders
    unvalidated = write_set(tmp_path / "unvalidated", {"train": 300}, size=700)
    data = RunData({0: {web: 3, books: 1}, 800: {code: 1, web: 1, unvalidated: 1}})
    first = validation_sets(data.first, {}, 8)
    sets = validation_sets(data.first, {}, 8, data.later_manifests)
    assert sets[: len(first)] == first
    assert [(one.name, one.samples, one.is_source) for one in sets[len(first) :]] == [("code", 8, False)]


def test_folders_are_opened_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    for name in ("dataset.verify_quick", "phases.open_split"):
        module, function = name.split(".")
        original = getattr(__import__(f"kraken_train.data.{module}", fromlist=[function]), function)
        monkeypatch.setattr(
            f"kraken_train.data.{name}",
            lambda folder, *more, call=original: (opened.append(folder), call(folder, *more))[1],
        )
    web, books, code = folders
    RunData({0: {web: 1}, 800: {web: 1, books: 1}, 1600: {books: 1, web: 1, code: 1}}).samples(CONTEXT, SEED)
    assert sorted(opened) == sorted(itertools.chain(folders, folders))
