"""The memory table against the formulas written out, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here, user_error

from kraken_train.bench.grid import SIZES, layer_excess
from kraken_train.bench.kv_memory import KVMemoryConfig, compute, model_with
from kraken_train.bench.memory_row import MemoryRow
from kraken_train.common.errors import ConfigError
from kraken_train.model.config import GPTConfig, KrakenConfig

SETTINGS = KVMemoryConfig(
    architectures=("kraken", "standard"),
    sizes=("1.3b",),
    attention=("mha", "gqa", "mqa"),
    degrees=(4, 8),
    contexts=(128, 2048),
    batch_sizes=(1, 16),
    heads_per_kv_head=4,
    vocab_size=50304,
    dtype="bfloat16",
    device="cpu",
    output_dir="",
)
LAYERS, WIDTH, HEAD_DIM = 24, 2048, 128  # of the standard 1.3b


@pytest.fixture(scope="module")
def rows() -> list[MemoryRow]:
    return compute(SETTINGS)


def find(rows: list[MemoryRow], **wanted: Any) -> MemoryRow:
    (row,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


def test_every_configuration_has_a_row(rows: list[MemoryRow]) -> None:
    assert len(rows) == len({dataclasses.astuple(row)[:8] for row in rows}) == 2 * 3 * 2 * 2 * 2


@pytest.mark.parametrize(("degree", "context", "batch_size"), [(4, 2048, 16), (8, 128, 1)])
def test_caches_by_hand(rows: list[MemoryRow], degree: int, context: int, batch_size: int) -> None:
    def cache(architecture: str, attention: str) -> int:
        where = {"degree": degree, "context": context, "batch_size": batch_size}
        return find(rows, architecture=architecture, attention=attention, **where).cache

    per_value = 2 * 2 * LAYERS * context * batch_size  # keys and values, two bytes each
    assert cache("standard", "mha") == per_value * WIDTH // degree
    assert cache("standard", "gqa") == per_value * HEAD_DIM * max(4 // degree, 1)  # 16 heads, 4 of keys
    assert cache("standard", "mqa") == per_value * HEAD_DIM  # each device has the same one
    sub_layer = {4: (13, 96), 8: (7, 128)}[degree]  # heads and their dimension
    assert cache("kraken", "mha") == per_value * sub_layer[0] * sub_layer[1]
    # 26 heads of 48, of which 2 share; 8 heads of 112, of which 4 do
    assert cache("kraken", "gqa") == per_value * {4: 13 * 48, 8: 2 * 112}[degree]
    assert cache("kraken", "mqa") == per_value * sub_layer[1]


@pytest.mark.parametrize(
    ("size", "degree", "asked", "heads", "sharing"),
    [("6.7b", 4, 4, 52, 4), ("6.7b", 8, 4, 28, 4), ("1.3b", 4, 4, 26, 2), ("175b", 2, 8, 112, 8)],
)
def test_a_kraken_whose_heads_can_be_shared(size: str, degree: int, asked: int, heads: int, sharing: int) -> None:
    """Dimensions for grouped-query attention, within the same limits; never more sharing than the standard's."""
    settings = dataclasses.replace(SETTINGS, heads_per_kv_head=asked)
    kraken = model_with(settings, size, degree, "kraken", "gqa")
    assert isinstance(kraken, KrakenConfig)
    assert (kraken.heads_per_sub_layer, kraken.heads_per_sub_layer // kraken.kv_heads) == (heads, sharing)
    assert abs(layer_excess("kraken", kraken.hidden_size, SIZES[size], degree)) < 0.03
    assert kraken.head_size % 16 == 0
    standard = model_with(settings, size, degree, "standard", "gqa")
    assert isinstance(standard, GPTConfig)
    assert standard.num_heads // standard.kv_heads == asked


def test_weights_by_hand(rows: list[MemoryRow]) -> None:
    where = {"degree": 8, "context": 128, "batch_size": 1, "attention": "mha"}
    shared = (50304 + 2048 + 1) * WIDTH  # embeddings and final norm
    layer = 12 * WIDTH**2 // 8 + 2 * WIDTH
    assert find(rows, architecture="standard", **where).weights == 2 * (LAYERS * layer + shared)
    d = 7 * 128
    assert find(rows, architecture="kraken", **where).weights == 2 * (
        LAYERS * (8 * d * d + 2 * d) + d * d + (50304 + 2048 + 1) * d
    )


def test_the_command(tmp_path: Path) -> None:
    result = run_here(
        "kraken_train.bench.kv_memory", f"output_dir={tmp_path}", "sizes=[tiny]", "degrees=[2]", "contexts=[64]",
        "batch_sizes=[1,2]", "device=cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Memory per device" in result.stdout
    assert "computed for bfloat16" in result.stdout
    record = json.loads((tmp_path / "kv_memory.json").read_text())
    assert len(record["rows"]) == 2 * 3 * 2
    assert all(row["measured_cache"] is None for row in record["rows"])
    sharing = {
        (row["architecture"], row["attention"]): (row["kv_heads"], row["heads_per_kv_head"]) for row in record["rows"]
    }
    assert [sharing["standard", form] for form in ("mha", "gqa", "mqa")] == [(8, 1), (2, 4), (1, 8)]
    assert "heads per" in result.stdout
    assert "kv head" in result.stdout
    assert (tmp_path / "kv_memory_tiny.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ("7b",)}, "sizes=7b is not known; use tiny or 1.3b"),
        ({"attention": ()}, "attention=[] must name at least one, and none twice"),
        ({"architectures": ("kraken", "kraken")}, "architectures=['kraken', 'kraken'] must name at least one"),
        ({"sizes": ("tiny", "tiny")}, "sizes=['tiny', 'tiny'] must name at least one, and none twice"),
        ({"attention": ("mha", "mha")}, "attention=['mha', 'mha'] must name"),
        ({"degrees": (2, 4, 2)}, "degrees=[2, 4, 2] must name"),
        ({"contexts": (64, 64)}, "contexts=[64, 64] must name"),
        ({"batch_sizes": (1, 1)}, "batch_sizes=[1, 1] must name"),
        ({"degrees": (0,)}, "degrees=0 must be greater than 0"),
        ({"heads_per_kv_head": 0}, "heads_per_kv_head=0"),
    ],
)
def test_wrong_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(SETTINGS, **change).validate()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = user_error(run_here("kraken_train.bench.kv_memory", f"output_dir={tmp_path / 'file' / 'x'}"))
    assert "output_dir=" in message
    assert "cannot be written to" in message
