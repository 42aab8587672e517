"""Signals to `launch.deepspeed` while its ranks run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import REPOSITORY
from node_program import MODULE, RunningLauncher, make_plan, require_ended, write_program

from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE


def test_several_signals_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends several signals to all processes of a job at a preemption: the ranks still save and end once."""
    write_program(tmp_path)
    for name, value in {**make_plan(tmp_path).environment, "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.deepspeed", "--num_gpus=2", MODULE], stderr=errors, cwd=REPOSITORY
        )
    launcher = RunningLauncher(tmp_path, process)
    try:
        ranks = launcher.ranks()
        others = [child for child in psutil.Process(process.pid).children(recursive=True)
                  if child.pid not in [rank["pid"] for rank in ranks]]  # fmt: skip
        for number in (signal.SIGUSR1, signal.SIGCONT):
            for each in (psutil.Process(process.pid), *others):
                each.send_signal(number)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == INTERRUPTED_EXIT_CODE, launcher.errors()
    finally:
        process.kill()
    assert "error" not in launcher.errors()
    require_ended(ranks)
