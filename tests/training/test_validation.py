"""The losses of a run's validation, set by set."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from data.prepared_set import write_set
from helpers import rough_model

from kraken_train.data.dataset import TrainingData, open_split
from kraken_train.data.validation_set import validation_sets
from kraken_train.model.config import KrakenConfig
from kraken_train.training.metrics_logger import describe
from kraken_train.training.validation import validate


class Copies:
    """Model copies that validate one after the other: each adds to the sums of those before it."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def sum(self, values: list[float]) -> list[float]:
        self.totals = [a + b for a, b in zip(self.totals or [0.0] * len(values), values, strict=True)]
        return self.totals


@pytest.mark.parametrize("copies", [1, 3])
def test_each_set_and_all_sources(tmp_path: Path, copies: int) -> None:
    web = write_set(tmp_path / "web", {"train": 100, "validation": 170}, text_bytes=510)
    books = write_set(tmp_path / "books", {"train": 100, "validation": 90}, first=200, text_bytes=180)
    code = write_set(tmp_path / "code", {"train": 100, "validation": 60}, first=300, text_bytes=60)
    model = rough_model(KrakenConfig(2, 2, 16, 2, 500, 8))
    sets = validation_sets(TrainingData({web: 3, books: 1}), {"programs": code}, 8)
    runtime, seen = Copies(), []
    for rank in range(copies):
        mesh = cast(Any, SimpleNamespace(data_size=copies, data_rank=rank))
        record = validate(model, sets, 3, mesh, cast(Any, runtime), lambda: seen.append(1))
    assert len(seen) == 3 * copies

    def expected(folder: Path, windows: int) -> float:
        tokens = torch.from_numpy(open_split(folder, "validation").read(0, 8 * windows + 1))
        rows = tokens.unfold(0, 9, 8)
        return float(model.token_losses(rows[:, :-1], rows[:, 1:]).mean())

    losses = {"/web": expected(web, 6), "/books": expected(books, 2), "/programs": expected(code, 7)}
    losses[""] = 0.75 * losses["/web"] + 0.25 * losses["/books"]
    bytes_per_token = {"/web": 3.0, "/books": 2.0, "/programs": 1.0, "": 2.75}
    for suffix, loss in losses.items():
        if suffix != "/programs":  # it ends with a shorter window
            assert record[f"validation_loss{suffix}"] == pytest.approx(loss, rel=1e-12)
        measured = record[f"validation_loss{suffix}"]
        assert record[f"validation_perplexity{suffix}"] == pytest.approx(math.exp(measured), rel=1e-12)
        bits = measured / math.log(2) / bytes_per_token[suffix]
        assert record[f"validation_bits_per_byte{suffix}"] == pytest.approx(bits, rel=1e-12)
    line = describe({"step": 3, "loss": 1.0, **record})
    assert f"validation loss of web {losses['/web']:.4f}, books {losses['/books']:.4f}, programs " in line


def test_one_source_has_no_name(tmp_path: Path) -> None:
    web = write_set(tmp_path / "web", {"train": 100, "validation": 170})
    model = rough_model(KrakenConfig(2, 2, 16, 2, 500, 8))
    mesh = cast(Any, SimpleNamespace(data_size=1, data_rank=0))
    sets = validation_sets(TrainingData({web: 1}), {}, 4)
    record = validate(model, sets, 3, mesh, cast(Any, Copies()), lambda: None)
    assert list(record) == ["validation_loss", "validation_perplexity"]  # how many bytes is not known
    sets = validation_sets(TrainingData({web: 1}), {"again": web}, 4)
    record = validate(model, sets, 3, mesh, cast(Any, Copies()), lambda: None)
    assert [name for name in record if "loss" in name] == ["validation_loss", "validation_loss/again"]
