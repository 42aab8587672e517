"""The folder of a run: its parts, its lock, and what identifies the run.

run.json      identity: id, model, data fingerprint, seed; written first
config.yaml   the settings of the latest start
tokenizer/    the data's tokenizer, so that an export needs nothing else
metrics.jsonl one object per logged step
events.jsonl  what has happened to it, see `kraken_train.run.events`
submissions/  one folder per submission to Slurm, see `launch.submit`
starts/       one folder per start, see `kraken_train.run.start`
.lock         held, and touched every LOCK_TOUCH_SECONDS, while a start is alive
checkpoints/  see `checkpoints.training.store`
exports.jsonl one object per export that was made of it, so that reports find what they were evaluated to
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import read_file, real_path, replace_synced, try_lock
from kraken_train.common.parsing import find_wrong_type, parse_mapping
from kraken_train.common.settings import to_yaml
from kraken_train.config import TrainConfig
from kraken_train.run.events import EventLog
from kraken_train.run.layout import (
    CONFIG_FILE,
    EVENTS_FILE,
    IDENTITY_FILE,
    LOCK_FILE,
    LOCK_TOUCH_SECONDS,
)

METRICS_FILE = "metrics.jsonl"
SUBMISSIONS = "submissions"
IDENTITY: dict[str, type | UnionType] = {"id": str, "model": dict, "data_fingerprint": str, "seed": int}
REMEDIES = {
    errno.ENOSPC: "free some space, or set run_dir to another disk",
    errno.EDQUOT: "free some space, or set run_dir to another disk",
    errno.EROFS: "set run_dir to a folder that can be written",
    errno.EACCES: "set run_dir to a folder that this user can read and write",
    errno.EPERM: "set run_dir to a folder that this user can read and write",
    errno.ENOTDIR: "set run_dir to a folder",
    errno.EEXIST: "a file, or a link to nothing, is where a folder must be",
}
LOCK_PATIENCE = 1.0  # seconds: `kraken_train.run.state.is_alive` holds the lock for a moment


@dataclass(frozen=True)
class RunFolder:
    path: Path
    run_id: str  # also the id of the Weights & Biases run
    resuming: bool  # whether training continues from a checkpoint
    start_number: int = 1  # starts so far, this one included

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def stage(self, config: TrainConfig) -> Path | None:
        """The folder on a node's own disk to which its checkpoints are written first; None: there is none."""
        stage_dir = config.checkpoint.stage_dir
        return None if stage_dir is None else real_path(stage_dir) / self.run_id

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def start(self) -> Path:
        """The folder of this start."""
        return self.path / "starts" / f"{self.start_number:04d}"

    @cached_property
    def events(self) -> EventLog:
        return EventLog(self.path / EVENTS_FILE)

    def write_config(self, config: TrainConfig) -> None:
        self.start.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.start):
            replace_synced(folder / CONFIG_FILE, to_yaml(config))


@contextmanager
def system_errors(problem: str) -> Iterator[None]:
    """What the system refuses within a run's folder becomes a CheckpointError that says what would work."""
    try:
        yield
    except OSError as error:
        remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        raise CheckpointError(f"{problem}: {error.strerror or error}{remedy}") from error


def read_identity(path: Path) -> dict[str, Any] | None:
    file = path / IDENTITY_FILE
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"run_dir={path} is a file; name a folder")
    if not file.is_file():
        return None
    try:
        identity = parse_mapping(read_file(file))
        if find_wrong_type(identity, IDENTITY) is not None:
            raise TypeError(find_wrong_type(identity, IDENTITY))
        return {name: identity[name] for name in IDENTITY}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged; use another run_dir, or restore the file") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing to the folder. Raises CheckpointError if one does."""
    with (path / LOCK_FILE).open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while not (ours := try_lock(file.fileno())) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not ours:
            holder = (path / LOCK_FILE).read_text(encoding="utf-8") or "unknown"
            raise CheckpointError(f"run_dir={path} is being written by another process ({holder}); stop it first")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        left = threading.Event()
        alive = threading.Thread(target=touch_until, args=(file.fileno(), left), name="run-lock", daemon=True)
        alive.start()
        try:
            yield
        finally:
            left.set()
            alive.join()


def touch_until(descriptor: int, left: threading.Event) -> None:
    """Other machines may not see the lock, but see when its file was touched."""
    while not left.wait(LOCK_TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)
