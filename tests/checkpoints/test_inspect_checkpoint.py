"""`checkpoints.inspect` on undamaged and damaged checkpoints, and on other folders."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_here, user_error

from checkpoints.training.retention import Retention
from checkpoints.training.store import SINGLE_PROCESS, mark_newer_as_damaged, verify_checkpoint
from checkpoints.training.writer import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the filter of the store

METADATA: dict[str, Any] = {
    "model": {"architecture": "kraken", "num_sub_layers": 4, "hidden_size": 32},
    "config": {"seed": 0, "precision": "bf16", "engine": {"zero_stage": 1}},
    "data_fingerprint": "0123abcd",
    "run_id": "feedbeef",
    "updates": 9_999,
    "consumed_samples": 160_000,
    "tokens": 40_960_000,
    "world_size": 4,
    "sub_layer_parallel_size": 2,
    "data_parallel_size": 2,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 10_000):
        save(tmp_path, step, METADATA)
    return tmp_path


def save(run_dir: Path, step: int, metadata: dict[str, Any]) -> None:
    weights = {"model.a": torch.zeros(50, 30), "model.b": torch.zeros(7)}
    moments = {f"optimizer.{name}.a": torch.zeros(50, 30) for name in ("exp_avg", "exp_avg_sq")}
    save_checkpoint(run_dir / "checkpoints", step, weights | moments, metadata, Retention(9), SINGLE_PROCESS)


def inspect(folder: Path) -> dict[str, str]:
    """Run the command, which must succeed; its lines by label."""
    result = run_here("checkpoints.inspect", str(folder))
    assert result.returncode == 0, result.stderr
    return dict(re.split(r"  +|: ", line, maxsplit=1) for line in result.stdout.splitlines() if line)


def test_one_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "step-00010000"
    lines = inspect(path)
    total = sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    assert lines == {
        "checkpoint": str(path),
        "step": "10,000",
        "updates": "9,999",
        "samples": "160,000 consumed",
        "tokens": "40,960,000 consumed",
        "run": "feedbeef",
        "data": "fingerprint 0123abcd",
        "model": "kraken",
        "": "num_sub_layers=4, hidden_size=32",
        "precision": "bf16",
        "ZeRO stage": "1",
        "written by": "4 ranks: 2 sub-layer parallel x 2 data parallel",
        "files": f"2, {total / 1024:.1f} KiB",
        "tensors": "4",
        "weights": "1,507 values",
        "moments": "3,000 values",
        "verified": "all 2 files have the size and the SHA-256 that the manifest lists",
    }


def test_older_metadata(tmp_path: Path) -> None:
    new = ("sub_layer_parallel_size", "data_parallel_size")
    save(tmp_path, 1, {key: value for key, value in METADATA.items() if key not in new} | {"world_size": 1})
    assert inspect(tmp_path)["written by"] == "1 rank"
    save(tmp_path, 2, {})
    assert inspect(tmp_path / "checkpoints" / "step-00000002").keys() == {
        *("checkpoint", "step", "files", "tensors", "weights", "moments", "verified")
    }


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_all_checkpoints_of_a_run(run: Path, inside: str) -> None:
    save(run, 20_000, METADATA)
    mark_newer_as_damaged(verify_checkpoint(run / "checkpoints" / "step-00010000"))
    (run / "checkpoints" / "latest").write_text("step-00010000\n")
    lines = inspect(run / inside)
    assert lines["checkpoints"] == f"2 in {run / 'checkpoints'}"
    assert re.fullmatch(r"[\d.]+ KiB, 40,960,000 tokens", lines["step-00000100"])
    assert re.fullmatch(r"[\d.]+ KiB, 40,960,000 tokens, latest", lines["step-00010000"])
    assert lines["step-00020000.damaged"] == "renamed by a run that found it damaged"
    assert lines["step"] == "10,000"
    assert "verified" in lines
    assert inspect(run / "checkpoints" / "step-00020000.damaged")["step"] == "20,000"

    (run / "checkpoints" / "latest").write_text("step-00020000\n")
    assert inspect(run)["latest"] == "points to step-00020000, which does not exist; training does not need it"
    (run / "checkpoints" / "latest").unlink()
    assert inspect(run)["latest"] == "is missing; training does not need it"


def test_a_flipped_byte_in_any_file(run: Path) -> None:
    newest = run / "checkpoints" / "step-00010000"
    for path in sorted(newest.iterdir()):
        intact = path.read_bytes()
        path.write_bytes(intact[:-2] + bytes([intact[-2] ^ 1]) + intact[-1:])
        for folder in (newest, run):
            result = run_here("checkpoints.inspect", str(folder))
            assert user_error(result).startswith(f"{path} is damaged")
            assert "verified" not in result.stdout
        path.write_bytes(intact)
    assert "verified" in inspect(newest)


def test_a_damaged_older_checkpoint_is_listed(run: Path) -> None:
    manifest = run / "checkpoints" / "step-00000100" / "manifest.json"
    manifest.write_text("{}")
    assert inspect(run)["step-00000100"] == f"{manifest} is damaged"


def test_not_a_checkpoint(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")  # a data folder has one too
    assert user_error(run_here("checkpoints.inspect", str(other))).startswith(f"{other} holds no checkpoint; give")
    assert "nowhere is not a folder" in user_error(run_here("checkpoints.inspect", str(tmp_path / "nowhere")))
    missing = run / "checkpoints" / "step-00000007"
    assert user_error(run_here("checkpoints.inspect", str(missing))) == f"{missing / 'manifest.json'} is missing"

    for step in (100, 10_000):
        path = run / "checkpoints" / f"step-{step:08d}"
        path.rename(path.with_name(f"{path.name}.damaged"))
    assert "has only damaged checkpoints" in user_error(run_here("checkpoints.inspect", str(run)))
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in user_error(run_here("checkpoints.inspect", str(run)))
