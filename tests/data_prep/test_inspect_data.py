from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here, user_error

from data_prep.indexed import Shard
from data_prep.inspect import bin_edges, settings, text_histogram
from data_prep.manifest import load_manifest
from data_prep.prepare import PrepareConfig, prepare

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def data(config: Callable[..., PrepareConfig]) -> Path:
    prepare(config(shard_tokens=4000))
    return Path(config().output_dir)


def test_tells_what_is_there(data: Path, corpus: Path, texts: list[str]) -> None:
    result = run_here("data_prep.inspect", str(data))
    assert result.returncode == 0, result.stderr
    manifest = load_manifest(data)
    lines = dict(
        re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines() if re.search(r"\S  +\S", line)
    )
    assert lines["data"] == str(data)
    assert lines["fingerprint"] == manifest.fingerprint
    assert lines["source"] == f"files, {corpus}"
    assert lines["tokenizer"] == f"sentencepiece, 330 tokens, {manifest.tokenizer.end_of_document} ends a document"
    assert "validation_fraction=0.1" in lines["settings"]
    assert "shard_tokens=4000" in lines["settings"]
    assert lines["tokens are"] == "uint16"
    ratio = sum(len(text.encode()) for text in texts) / manifest.tokens
    assert lines["in all"] == f"200 documents, {manifest.tokens:,} tokens, {ratio:.3f} bytes per token"
    for name, split in manifest.splits.items():
        assert lines[name].startswith(f"{split.documents:,} documents, {split.tokens:,} tokens, ")
        for shard in split.shards:
            assert lines[shard.name] == f"{shard.documents:,} documents, {shard.tokens:,} tokens"
    lengths = np.concatenate([Shard(data / s.name).document_lengths() for s in manifest.splits["train"].shards])
    assert (
        f"shortest {lengths.min()}, median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest {lengths.max()}"
    ) in result.stdout
    assert (data / "document_lengths.png").read_bytes().startswith(PNG)
    assert f"wrote {data / 'document_lengths.png'}" in result.stdout


def test_without_validation(config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    prepare(config(validation_fraction=0))
    result = run_here("data_prep.inspect", config().output_dir, "--output", str(tmp_path / "lengths.png"))
    assert result.returncode == 0, result.stderr
    assert "validation  " not in result.stdout.replace("validation_", "")
    assert (tmp_path / "lengths.png").read_bytes().startswith(PNG)
    assert not (Path(config().output_dir) / "document_lengths.png").exists()


def test_text_histogram() -> None:
    assert text_histogram(np.array([5, 2, 3, 16, 4, 7, 7, 6])) == [
        " 2 to 3   2  ################",
        " 4 to 7   5  ########################################",
        " 8 to 15  0",
        "16 to 31  1  ########",
    ]
    assert text_histogram(np.array([0, 1])) == ["1 to 1  2  " + "#" * 40]
    lines = text_histogram(np.array([2**40, 2**40 - 1]))
    assert [line.rstrip("#").split()[-1] for line in lines] == ["1", "1"]


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 9), (34, 34_051), (2**33, 2**34)])
def test_every_length_has_a_bin(shortest: int, longest: int) -> None:
    edges = bin_edges(shortest, longest)
    assert edges[0] < shortest
    assert longest < edges[-1]
    assert (np.diff(edges) >= 1).all()
    assert (edges % 1 == 0.5).all()


def test_settings_of_settings() -> None:
    assert settings({"a": 1, "b": {"c": "x", "d": {}}, "e": None}) == "a=1, b.c=x, b.d={}, e=None"
    assert settings({"a": [{"b": 1}, {"b": 2}], "c": [], "d": ["x"]}) == "a.1.b=1, a.2.b=2, c=[], d=['x']"


def test_unusable(data: Path, tmp_path: Path) -> None:
    assert "does not exist" in user_error(run_here("data_prep.inspect", str(tmp_path / "nowhere")))
    missing = tmp_path / "no" / "such.png"
    assert f"{missing} cannot be written" in user_error(
        run_here("data_prep.inspect", str(data), "--output", str(missing))
    )
    (data / "train_00001.idx").unlink()
    assert "train_00001.idx" in user_error(run_here("data_prep.inspect", str(data)))
