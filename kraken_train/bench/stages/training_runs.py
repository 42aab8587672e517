"""Training runs as processes, which the stages start, watch and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken_train.bench.stages.preset import RunRequest
from kraken_train.run.events import read_events
from kraken_train.run.folder import METRICS_FILE
from kraken_train.run.layout import EVENTS_FILE

WITHOUT_END = 1_000_000  # steps, of a run that is ended from outside
PATIENCE = 300.0  # seconds; the stage's own limit is shorter where it matters
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Run:
    """A run folder and the command that trains in it."""

    folder: Path
    request: RunRequest

    def command(self, max_steps: int, *more: str) -> list[str]:
        """On one rank, or as many as the request says."""
        ranks = self.request.ranks
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        settings = [
            *self.request.sizes.settings, f"data_dir={self.request.data_dir}", f"run_dir={self.folder}",
            f"max_steps={max_steps}", f"checkpoint.every={self.request.sizes.save_every}", "schedule=constant",
            "checkpoint.asynchronous=true", "tracking.mode=off", *more,
        ]  # fmt: skip
        return [sys.executable, "-m", *launcher, "kraken_train.train", *settings]

    def finish(self, max_steps: int, *more: str) -> None:
        """Train to the end. Raises RuntimeError where that fails."""
        code = subprocess.run(self.command(max_steps, *more), check=False).returncode
        if code != 0:
            raise RuntimeError(f"training in {self.folder} ended with exit code {code}; its output is above")

    @contextmanager
    def under_way(self) -> Iterator[subprocess.Popen[bytes]]:
        """A training without end, once its first checkpoint is complete; its processes are ended at the end."""
        process = subprocess.Popen(self.command(WITHOUT_END))
        try:
            self.wait_for("a checkpoint", process, self.last_saved)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE)

    def wait_for(self, what: str, process: subprocess.Popen[bytes], found: Callable[[], object]) -> None:
        """Raises RuntimeError where the process ends, or PATIENCE does, before `found` is true."""
        deadline = time.monotonic() + PATIENCE
        while not found():
            if process.poll() is not None:
                raise RuntimeError(f"training in {self.folder} ended before {what} was there; its output is above")
            if time.monotonic() > deadline:
                raise RuntimeError(f"training in {self.folder}: no sign of {what} after {PATIENCE:.0f} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / EVENTS_FILE) if event["event"] == kind]

    def last_saved(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((event["step"] for event in self.events("saved")), default=0)

    def losses(self) -> dict[int, float]:
        """By step, the latest where a step was taken twice."""
        lines = (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def new_run(request: RunRequest, name: str) -> Run:
    """In a folder that no earlier attempt has used."""
    parent = Path(request.run_dir)
    return Run(parent / f"{name}-{time.time_ns()}-{os.getpid()}", request)
