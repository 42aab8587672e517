"""The folder of a run: what identifies it, and when a command may start, continue or must leave it alone.

run.json      identity: id, model, data fingerprint, seed; written first
config.yaml   the settings of the latest start
tokenizer/    the data's tokenizer, so that an export needs nothing else
metrics.jsonl one object per logged step
events.jsonl  what has happened to it, see `kraken_train.run.events`
submissions/  one folder per submission to Slurm, see `launch.submit`
starts/       one folder per start, see `kraken_train.run.start`
.lock         held, and touched every LIFE_SIGN_SECONDS, while a start is alive
checkpoints/  see `checkpoints.training.store`
exports.jsonl one object per export that was made of it, so that reports find what they were evaluated to
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from checkpoints.training.manifest import has_checkpoints
from checkpoints.training.store import find_good_checkpoint
from data_prep.manifest import MANIFEST_NAME, TOKENIZER_FOLDER
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import copy_folder, replace_synced, try_lock
from kraken_train.common.settings import to_dict, to_yaml
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.run.events import EventLog
from kraken_train.run.exports import is_export
from kraken_train.run.layout import (
    CONFIG_FILE,
    EVENTS_FILE,
    IDENTITY_FILE,
    LIFE_SIGN_SECONDS,
    LOCK_FILE,
    start_folders,
)
from kraken_train.run.recorded_settings import recorded_model

METRICS_FILE = "metrics.jsonl"
SUBMISSIONS = "submissions"
REMEDIES = {
    errno.ENOSPC: "free some space, or set run_dir to another disk",
    errno.EDQUOT: "free some space, or set run_dir to another disk",
    errno.EROFS: "set run_dir to a folder that can be written",
    errno.EACCES: "set run_dir to a folder that this user can read and write",
    errno.EPERM: "set run_dir to a folder that this user can read and write",
    errno.ENOTDIR: "set run_dir to a folder",
    errno.EEXIST: "a file, or a link to nothing, is where a folder must be",
}
LOCK_PATIENCE = 1.0  # seconds: who only looks at a run (`run_state.is_alive`) holds its lock for a moment


@dataclass(frozen=True)
class RunFolder:
    path: Path
    run_id: str  # also the id of the Weights & Biases run
    resuming: bool  # whether training continues from a checkpoint
    start_number: int = 1  # starts so far, this one included

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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


def open_run_folder(
    config: TrainConfig, model: ModelConfig, tokenizer_dir: Path, fingerprint: str, held: ExitStack
) -> RunFolder:
    """Create the run's folder, or open it to continue, as `config.resume` says.

    It stays locked against other processes until `held` is closed. Raises CheckpointError, with nothing changed,
    where it holds something else, where `resume=must` finds no checkpoint, and where `resume=never` would overwrite
    a run.
    """
    path = Path(config.run_dir)
    check_run_folder(config, model, fingerprint)
    with system_errors(f"run_dir={path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(path))
    # Another start may have been faster, and this one has waited for its end.
    identity, existing = check_run_folder(config, model, fingerprint)
    run_id = existing["id"] if existing else uuid.uuid4().hex[:8]
    with system_errors(f"run_dir={path} cannot be written"):
        if not (path / IDENTITY_FILE).exists():
            replace_synced(path / IDENTITY_FILE, json.dumps({"id": run_id, **identity}, indent=1))
        copy_once(tokenizer_dir, path / TOKENIZER_FOLDER)
        number = max((int(start.name) for start in start_folders(path)), default=0) + 1
        run = RunFolder(path, run_id, resuming=has_checkpoints(path / "checkpoints"), start_number=number)
        run.start.mkdir(parents=True)
    return run


@contextmanager
def system_errors(problem: str) -> Iterator[None]:
    """What the system refuses within a run's folder becomes a CheckpointError that says what would work."""
    try:
        yield
    except OSError as error:
        remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        raise CheckpointError(f"{problem}: {error.strerror or error}{remedy}") from error


def check_run_folder(
    config: TrainConfig, model: ModelConfig, fingerprint: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What identifies the run, and what identifies the one that is in its folder already (None: there is none).

    Raises CheckpointError as `open_run_folder` does. Changes nothing.
    """
    path = Path(config.run_dir)
    checkpoints = path / "checkpoints"
    identity = {"model": to_dict(model), "data_fingerprint": fingerprint, "seed": config.seed}
    with system_errors(f"run_dir={path} cannot be read"):
        existing = read_identity(path) or identity_of_checkpoints(checkpoints)
        if existing is None and path.exists() and any(not is_of_no_run(entry) for entry in path.iterdir()):
            raise CheckpointError(
                f"run_dir={path} is not empty and holds {what_it_holds(path)}; use a new or empty folder"
            )
    if config.resume == "must" and not has_checkpoints(checkpoints):
        raise CheckpointError(
            f"resume=must, but there is no checkpoint in {checkpoints}; name the run's folder in run_dir, or start "
            "from the beginning with resume=auto"
        )
    if existing is not None:
        if config.resume == "never":
            raise CheckpointError(
                f"run_dir={path} holds another run, which resume=never would overwrite; use a new folder, or "
                "resume=auto to continue it"
            )
        require_same_run(path, existing, identity)
    return identity, existing


def is_of_no_run(entry: Path) -> bool:
    """Whether a folder may hold this before a run begins in it."""
    return entry.name.startswith(".") or entry.name in (SUBMISSIONS, EVENTS_FILE)


def what_it_holds(path: Path) -> str:
    """In place of a run."""
    run = next((parent for parent in path.resolve().parents if (parent / IDENTITY_FILE).is_file()), None)
    if run is not None:
        return f"a part of the run in {run}"
    if (path / MANIFEST_NAME).is_file():
        return "prepared data"
    return "an export" if is_export(path) else f"no run ({IDENTITY_FILE} is missing)"


def read_identity(path: Path) -> dict[str, Any] | None:
    file = path / IDENTITY_FILE
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"run_dir={path} is a file; name a folder")
    if not file.is_file():
        return None
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
        return {"id": identity["id"], **{key: identity[key] for key in ("model", "data_fingerprint", "seed")}}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged; use another run_dir, or restore the file") from error


def identity_of_checkpoints(folder: Path) -> dict[str, Any] | None:
    """The same from the newest good checkpoint, for a run whose identity file was lost."""
    if not has_checkpoints(folder):
        return None
    metadata = find_good_checkpoint(folder)[0].metadata
    return {
        "id": metadata["run_id"],
        "model": metadata["model"],
        "data_fingerprint": metadata["data_fingerprint"],
        "seed": metadata["config"]["seed"],
    }


def recorded_precision(path: Path) -> str | None:
    """The precision of the run in this folder, from its latest start or else its newest good checkpoint; None: no run.

    Raises CheckpointError.
    """
    file, checkpoints = path / CONFIG_FILE, path / "checkpoints"
    if (path / IDENTITY_FILE).is_file() and file.is_file():
        try:
            return str(yaml.safe_load(file.read_text(encoding="utf-8"))["precision"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise CheckpointError(f"{file} is damaged; restore the file, or give precision=bf16 or fp32") from error
    if not has_checkpoints(checkpoints):
        return None
    return str(find_good_checkpoint(checkpoints)[0].metadata["config"]["precision"])


def require_same_run(path: Path, existing: dict[str, Any], identity: dict[str, Any]) -> None:
    """The model, the data and the seed of a run are fixed. Raises CheckpointError naming what differs."""
    there, here = recorded_model(existing["model"]), identity["model"]
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"run_dir={path} holds a run of another model: model.{name} is {there.get(name)} there and "
                f"{here.get(name)} here; use another run_dir, or the model of that run"
            )
    if existing["data_fingerprint"] != identity["data_fingerprint"]:
        raise CheckpointError(
            f"run_dir={path} holds a run on other data (fingerprint {existing['data_fingerprint']} there, "
            f"{identity['data_fingerprint']} here); use the same data_dir, with the same weights if it has several, or "
            "another run_dir"
        )
    if existing["seed"] != identity["seed"]:
        raise CheckpointError(
            f"run_dir={path} holds a run with seed={existing['seed']}, not {identity['seed']}; use the same seed, or "
            "another run_dir"
        )


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
        alive = threading.Thread(target=give_life_signs, args=(file.fileno(), left), name="life-signs", daemon=True)
        alive.start()
        try:
            yield
        finally:
            left.set()
            alive.join()


def give_life_signs(descriptor: int, left: threading.Event) -> None:
    """Other machines may not see the lock, but see when its file was touched."""
    while not left.wait(LIFE_SIGN_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)


def copy_once(source: Path, target: Path) -> None:
    """Copy a folder, unless the whole of it is there already."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_folder(source, temporary)
    temporary.rename(target)
