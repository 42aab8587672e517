"""Signals to `launch.deepspeed` while its ranks run on this machine, and on two hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import REPOSITORY
from node_program import MODULE, RunningLauncher, make_plan, require_ended, write_program

from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE


def start_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> RunningLauncher:
    write_program(folder)
    for name, value in {**make_plan(folder).environment, "OUT": str(folder)}.items():
        monkeypatch.setenv(name, value)
    with (folder / "errors").open("w") as errors:
        command = [sys.executable, "-m", "launch.deepspeed", *options, MODULE]
        return RunningLauncher(folder, subprocess.Popen(command, stderr=errors, cwd=REPOSITORY))


def test_several_signals_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends several signals to all processes of a job at a preemption: the ranks still save and end once."""
    launcher = start_launcher(tmp_path, monkeypatch, "--num_gpus=2")
    process = launcher.process
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


def test_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a script in place of ssh that runs the command on this machine."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1"]
    launcher = start_launcher(tmp_path, monkeypatch, *options)
    try:
        ranks = launcher.ranks()
        assert [rank["environment"]["LOCAL_RANK"] for rank in ranks] == ["0", "0"]
        assert [rank["environment"]["WORLD_SIZE"] for rank in ranks] == ["2", "2"]
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.process.wait(60) == INTERRUPTED_EXIT_CODE, launcher.errors()
    finally:
        launcher.process.kill()
    assert "stopping: the ranks save a checkpoint and end" in launcher.errors()
    require_ended(ranks)
