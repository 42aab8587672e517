from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.manifest import Manifest, load_manifest, probe_sha256, verify_quick
from data_prep.prepare import PrepareConfig, prepare
from kraken_train.common.errors import DataError
from kraken_train.data.dataset import open_split


@pytest.fixture
def data(config: Callable[..., PrepareConfig]) -> Path:
    prepare(config())
    return Path(config().output_dir)


def test_load_gives_back_what_was_saved(data: Path, tmp_path: Path) -> None:
    manifest = load_manifest(data)
    (tmp_path / "copy").mkdir()
    manifest.save(tmp_path / "copy")
    assert load_manifest(tmp_path / "copy") == manifest
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()


def test_fingerprint_is_of_the_content(data: Path, config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    fingerprint = verify_quick(data).fingerprint
    moved = tmp_path / "moved.jsonl"
    shutil.move(config().source, moved)
    assert prepare(config(source=str(moved), output_dir=str(tmp_path / "again"))).fingerprint == fingerprint
    other = prepare(config(source=str(moved), output_dir=str(tmp_path / "other"), validation_fraction=0.2))
    assert other.fingerprint != fingerprint


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing does not exist; prepare data with"):
        load_manifest(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no manifest.json"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is not kraken-data"),
        ({"version": 2}, "version 2 of the format, and this program knows up to 1; update the program"),
        ({"version": "one"}, "version 'one'"),
        ({"splits": {}}, "is damaged .its splits are"),
        ({"splits": {"train": {"shards": [{"name": "x"}], "text_bytes": 1}}}, "is damaged"),
        ({"tokenizer": {"kind": "gpt2"}}, "is damaged .*vocab_size"),
        ({"skipped": None, "splits": None}, "is damaged"),
        ({"round_trips": {"exampld": None}}, "is damaged .its entry round_trips.exampld is not known"),
        ({"dtype": "int32"}, "was changed: its fingerprint"),
    ],
)
def test_damaged_manifest(data: Path, change: dict[str, object], message: str) -> None:
    path = data / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(data)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_manifest_that_is_not_json(data: Path, content: str) -> None:
    (data / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(data)


def flip_first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["train_00000.bin", "train_00000.idx", "validation_00000.bin", "tokenizer/tokenizer.model"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "does not exist"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated|other content"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "other data|other content"),
        (flip_first_byte, "other content .* belongs to other data or is damaged"),
    ],
)
def test_damaged_file(data: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(data / name)
    with pytest.raises(DataError, match=message) as caught:
        verify_quick(data)
    assert str(data / name) in str(caught.value)


def test_foreign_shard(data: Path, config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    """The whole shard of another data set, whose two files fit each other."""
    prepare(config(output_dir=str(tmp_path / "other"), validation_fraction=0.2))
    for name in ("train_00000.bin", "train_00000.idx"):
        shutil.copy(tmp_path / "other" / name, data / name)
    with pytest.raises(DataError, match=r"train_00000.bin has \d+ bytes, but .*manifest.json lists it with \d+"):
        open_split(data, "train")


def test_foreign_shard_of_the_same_size(data: Path) -> None:
    """Tokens alone differ: sizes and lengths cannot tell."""
    manifest: Manifest = load_manifest(data)
    foreign = (data / "train_00000.bin").read_bytes()
    (data / "train_00000.bin").write_bytes(foreign[2:] + foreign[:2])
    assert (data / "train_00000.bin").stat().st_size == manifest.splits["train"].shards[0].bin_bytes
    with pytest.raises(DataError, match=r"train_00000.bin has other content than manifest.json lists"):
        verify_quick(data)


def test_probe_reads_all_parts_of_a_large_file(tmp_path: Path) -> None:
    size = 2_000_000
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(size))
    probe = probe_sha256(path)
    for place in (0, size // 2, size - 1):
        content = bytearray(size)
        # Blocks are spread over the file, so a change as long as their distance cannot hide between two of them.
        start = min(place, size - size // 60)
        content[start : start + size // 60] = b"\1" * (size // 60)
        path.write_bytes(content)
        assert probe_sha256(path) != probe
