"""The sets that a run is validated on."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.prepared_set import write_set

from kraken_train.common.errors import ConfigError, DataError
from kraken_train.data.dataset import TrainingData
from kraken_train.data.validation_set import names_of, validation_sets


def test_sources_share_the_samples_and_further_sets_have_as_many(tmp_path: Path) -> None:
    web, books, code = (
        write_set(tmp_path / name, {"train": 100, "validation": 90}, text_bytes=360)
        for name in ("web", "books", "code")
    )
    sets = validation_sets(TrainingData({web: 3, books: 1}), {"programs": code}, 8)
    assert [(chosen.name, chosen.samples, chosen.is_source) for chosen in sets] == [
        ("web", 6, True), ("books", 2, True), ("programs", 8, False)
    ]  # fmt: skip
    assert [chosen.bytes_per_token for chosen in sets] == [4.0, 4.0, 4.0]


def test_names_of_folders() -> None:
    assert names_of([Path("a/web"), Path("b/books")]) == ["web", "books"]
    assert names_of([Path("a/web"), Path("b/web"), Path("c/books")]) == ["a/web", "b/web", "books"]


def test_sets_that_cannot_be_used(tmp_path: Path) -> None:
    web = write_set(tmp_path / "web", {"train": 100, "validation": 90})
    bare = write_set(tmp_path / "bare", {"train": 100})
    other = write_set(tmp_path / "other", {"train": 100, "validation": 90}, tokenizer="other pieces")
    data = TrainingData({web: 1})
    for further, error, message in (
        ({"web": web}, ConfigError, "validation.sets.web has the name of a folder that the run trains on"),
        ({"b": bare}, DataError, f"validation.sets.b={bare} has no validation split"),
        ({"c": other}, DataError, f"data_dir={web} and validation.sets.c={other} were prepared with different tokeniz"),
        ({"d": tmp_path / "none"}, DataError, "none"),
    ):
        with pytest.raises(error, match=message):
            validation_sets(data, further, 4)
