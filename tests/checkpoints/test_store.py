"""Checkpoints on disk: complete or absent, verified, and never a worse state than before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from checkpoints import store
from checkpoints.store import find_good_checkpoint, load_tensors, save_checkpoint
from kraken_train.errors import CheckpointError
from kraken_train.runtime import Runtime

ALONE = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(3, 4, 5, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "optimizer.exp_avg.a": torch.randn(3, 4, 5, generator=generator),
    }


def save(folder: Path, step: int, keep: int = 3) -> None:
    save_checkpoint(folder, step, tensors(step), {"updates": step}, keep, ALONE)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != store.POINTER)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint, problems = find_good_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.metadata, problems) == (5, {"updates": 5}, [])
    loaded = load_tensors(checkpoint)
    assert loaded.keys() == tensors(5).keys()
    for name, tensor in tensors(5).items():
        assert torch.equal(loaded[name], tensor)
    assert load_tensors(checkpoint, ["model.b"]).keys() == {"model.b"}
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c; it is the checkpoint of another model"):
        load_tensors(checkpoint, ["model.c"])


def test_retention_and_pointer(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        find_good_checkpoint(tmp_path / "nowhere")


def test_any_flipped_byte_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = files(tmp_path / "step-00000002")
    assert {path.name for path in newest} >= {".metadata", "manifest.json"}
    for path in newest:
        intact = path.read_bytes()
        for position in (0, len(intact) // 2, len(intact) - 1):
            damaged = bytearray(intact)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            checkpoint, problems = find_good_checkpoint(tmp_path)
            assert checkpoint.step == 1, (path, position)
            assert len(problems) == 1 and str(path) in problems[0]
        path.write_bytes(intact)
    assert find_good_checkpoint(tmp_path)[0].step == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 10), "has 10 bytes instead of"),
    ],
)
def test_missing_and_truncated_files(tmp_path: Path, damage: object, message: str) -> None:
    save(tmp_path, 1)
    data = next(path for path in files(tmp_path) if path.suffix == ".distcp")
    damage(data)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        find_good_checkpoint(tmp_path)


def test_newer_format(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-00000001" / store.MANIFEST
    content = json.loads(manifest.read_text())["content"] | {"format_version": 99}
    manifest.write_text(json.dumps({"content": content, "sha256": store.content_sha256(content)}))
    with pytest.raises(CheckpointError, match="format version 99, this program reads up to 1"):
        find_good_checkpoint(tmp_path)


def test_failed_write_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in files(tmp_path)}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("write_synced", "file_sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(store, broken, full)
            with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*step-00000001"):
                save(tmp_path, 2)
        assert {path: path.read_bytes() for path in files(tmp_path)} == before
    assert find_good_checkpoint(tmp_path)[0].step == 1


def test_pointer_is_not_needed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    assert find_good_checkpoint(tmp_path)[0].step == 1
