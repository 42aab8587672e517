"""A plan for `launch.node`, a program that its ranks run in place of training, and what that program wrote."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from helpers import REPOSITORY, wait_until

from kraken_train.parallel.ranks import free_port
from launch.plan import Plan

# Writes its process id, arguments and environment to the file OUT/RANK, then waits for signals. It kills itself once
# the file OUT/RANK.die exists. ON_SIGTERM is an expression.
PROGRAM = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: ON_SIGTERM)
folder, rank = pathlib.Path(os.environ["OUT"]), os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "X")
record = {"pid": os.getpid(), "arguments": sys.argv[1:], "environment": {name: os.environ[name] for name in names}}
(folder / f".{rank}").write_text(json.dumps(record))
(folder / f".{rank}").rename(folder / rank)
while True:
    time.sleep(0.1)
    if (folder / f"{rank}.die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
"""
MODULE = "waiting_rank"
EXITS_ON_SIGTERM = "sys.exit(143)"


def write_program(folder: Path, on_sigterm: str = EXITS_ON_SIGTERM) -> None:
    (folder / f"{MODULE}.py").write_text(PROGRAM.replace("ON_SIGTERM", on_sigterm))


def make_plan(tmp_path: Path, *arguments: str, **changes: object) -> Plan:
    """A plan for two ranks of this machine that run MODULE of `tmp_path`; `changes` replace its fields."""
    settings: dict[str, object] = {
        "node_rank": 0,
        "hosts": {"localhost": ["0", "1"]},
        "master_addr": "127.0.0.1",
        "master_port": free_port(),
        "launcher_options": ["--log_level=critical"],
        "module": MODULE,
        "arguments": list(arguments),
        "environment": {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}", "X": "a 'b' $c"},
        "run_dir": None,
        "earlier_starts": 0,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]


@dataclass
class RunningLauncher:
    """A process that starts two ranks of PROGRAM; `folder` is their OUT and holds its standard error."""

    folder: Path
    process: subprocess.Popen[bytes]

    def send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message)
        self.process.stdin.flush()

    def ranks(self) -> list[dict[str, Any]]:
        """What the two ranks wrote, once both have."""
        files = [self.folder / rank for rank in "01"]
        wait_until(lambda: self.process.poll() is not None or all(file.exists() for file in files), self.errors)
        assert self.process.poll() is None, self.errors()
        return [json.loads(file.read_text()) for file in files]

    def has_pidfd(self, pid: int) -> bool:
        """Whether the process has a pidfd of that process."""
        texts = []
        for file in Path(f"/proc/{self.process.pid}/fdinfo").iterdir():
            with suppress(OSError):  # closed in the meantime
                texts.append(file.read_text())
        return any(f"\nPid:\t{pid}\n" in text for text in texts)

    def errors(self) -> str:
        return (self.folder / "errors").read_text()


def require_ended(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        pid = rank["pid"]
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
