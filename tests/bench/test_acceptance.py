"""The whole script on a CPU, and one stage of it as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_here, run_process, user_error

from kraken_train.bench.acceptance import ALL
from kraken_train.bench.stages.table import MET, UNJUDGED

WRONG = ("missed", "not measured", "failed", "timed out", "not run")


def settings(folder: Path) -> list[str]:
    return ["preset=cpu", f"output_dir={folder / 'out'}", f"work_dir={folder / 'work'}"]


def test_one_stage_and_again(tmp_path: Path) -> None:
    command = ["kraken_train.bench.acceptance", *settings(tmp_path), "stages=[machine]"]
    ran = run_process(*command)
    assert ran.returncode == 0, ran.stderr
    assert "machine: done" in ran.stdout, ran.stdout
    assert "cuda_calls.py" in ran.stdout
    record = json.loads((tmp_path / "out" / "machine.json").read_text())
    assert record["figures"]["memory, TB/s"] > 0
    skipped = run_process(*command)
    assert "machine: done" not in skipped.stdout
    assert json.loads((tmp_path / "out" / "machine.json").read_text()) == record


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    message = user_error(run_process("kraken_train.bench.acceptance", *settings(tmp_path)[1:], "preset=one_gpu"))
    assert "preset=one_gpu needs 1 GPUs, and PyTorch sees 0" in message


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("stages=[]", "stages=[] names no stage; use null"),
        ("work_dir=/dev/null/x", "work_dir=/dev/null/x cannot be written to: Not a directory; use another folder"),
    ],
)
def test_mistakes(mistake: str, message: str, tmp_path: Path) -> None:
    assert message in user_error(run_here("kraken_train.bench.acceptance", *settings(tmp_path), mistake))


@pytest.mark.slow
def test_all_stages(tmp_path: Path) -> None:
    """Takes minutes. Every stage of both sets succeeds, and what a CPU can judge is as it should be."""
    ran = run_process("kraken_train.bench.acceptance", *settings(tmp_path))
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {row["stage"] for row in rows} == set(ALL)
    assert not [row for row in rows if row["verdict"] in WRONG], ran.stdout
    assert {MET, UNJUDGED} <= {row["verdict"] for row in rows}
