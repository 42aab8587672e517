"""Opening the folder of a run: when a command may start in it, continue in it, or must leave it alone."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.training.manifest import Checkpoint, find_complete_checkpoint, has_checkpoints
from checkpoints.training.staging import read_record, take_up_staged
from checkpoints.training.store import find_good_checkpoint
from data_prep.manifest import MANIFEST_NAME, TOKENIZER_FOLDER
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import copy_folder, replace_synced
from kraken_train.common.settings import to_dict
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.parallel.ranks import Runtime
from kraken_train.run.exports import is_export
from kraken_train.run.folder import SUBMISSIONS, RunFolder, locked, read_identity, system_errors
from kraken_train.run.layout import EVENTS_FILE, IDENTITY_FILE, start_folders
from kraken_train.run.recorded_settings import recorded_model, recorded_settings
from kraken_train.training.started_phases import require_same_phases
from kraken_train.training.teacher import TeacherExport, require_same_teacher


def open_run_folder(
    config: TrainConfig,
    model: ModelConfig,
    tokenizer_dir: Path,
    fingerprints: Sequence[str],
    held: ExitStack,
    teacher: TeacherExport | None = None,
) -> RunFolder:
    """Create the run's folder, or open it to continue, as `config.resume` says.

    `fingerprints` are those of the data of each phase. It stays locked against other processes until `held` is closed.
    Raises CheckpointError, with nothing changed, where it holds something else, where `resume=must` finds no
    checkpoint, and where `resume=never` would overwrite a run.
    """
    path = Path(config.run_dir)
    check_run_folder(config, model, fingerprints, teacher)
    with system_errors(f"run_dir={path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(path))
    # Another start may have been faster, and this one has waited for its end.
    identity, existing = check_run_folder(config, model, fingerprints, teacher)
    run_id = existing["id"] if existing else uuid.uuid4().hex[:8]
    with system_errors(f"run_dir={path} cannot be written"):
        if not (path / IDENTITY_FILE).exists():
            replace_synced(path / IDENTITY_FILE, json.dumps({"id": run_id, **identity}, indent=1))
        copy_once(tokenizer_dir, path / TOKENIZER_FOLDER)
        number = max((int(start.name) for start in start_folders(path)), default=0) + 1
        run = RunFolder(path, run_id, resuming=has_checkpoints(path / "checkpoints"), start_number=number)
        run.start.mkdir(parents=True)
    return run


def take_up_staged_checkpoint(run: RunFolder, runtime: Runtime, check: Callable[[], object]) -> RunFolder:
    """Copy to the run's folder what an earlier start has staged on its nodes only, and `check` the folder again.

    A collective. Returns the run, which then has a checkpoint. Raises CheckpointError.
    """
    line = take_up_staged(run.checkpoints, runtime)
    if line is None:
        return run
    if runtime.is_first:
        print(line, flush=True)
    runtime.on_first(check)
    return replace(run, resuming=runtime.on_first(lambda: has_checkpoints(run.checkpoints)))


def check_run_folder(
    config: TrainConfig, model: ModelConfig, fingerprints: Sequence[str], teacher: TeacherExport | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What identifies the run, and what identifies the one that is in its folder already (None: there is none).

    Raises CheckpointError as `open_run_folder` does. Changes nothing.
    """
    path = Path(config.run_dir)
    checkpoints = path / "checkpoints"
    identity = {"model": to_dict(model), "data_fingerprint": fingerprints[0], "seed": config.seed}
    with system_errors(f"run_dir={path} cannot be read"):
        existing = read_identity(path) or identity_of_checkpoints(checkpoints)
        if existing is None and path.exists() and any(not may_precede_a_run(entry) for entry in path.iterdir()):
            raise CheckpointError(
                f"run_dir={path} is not empty and holds {describe_content(path)}; use a new or empty folder"
            )
    # What is staged is taken up later, by the ranks of its nodes; where it is lost, it is not named any more then.
    if config.resume == "must" and not has_checkpoints(checkpoints) and read_record(checkpoints) is None:
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
        checkpoint, _ = find_complete_checkpoint(checkpoints)
        if checkpoint is not None:
            require_same_optimizer(config, checkpoint)
            require_same_phases(config, fingerprints, checkpoint)
            require_same_teacher(checkpoint.metadata.get("teacher"), teacher, checkpoint.path)
    return identity, existing


def may_precede_a_run(entry: Path) -> bool:
    """Whether a folder may hold this before a run begins in it."""
    return entry.name.startswith(".") or entry.name in (SUBMISSIONS, EVENTS_FILE)


def describe_content(path: Path) -> str:
    """The content of a folder that holds no run, for a message."""
    run = next((parent for parent in path.resolve().parents if (parent / IDENTITY_FILE).is_file()), None)
    if run is not None:
        return f"a part of the run in {run}"
    if (path / MANIFEST_NAME).is_file():
        return "prepared data"
    return "an export" if is_export(path) else f"no run ({IDENTITY_FILE} is missing)"


def identity_of_checkpoints(folder: Path) -> dict[str, Any] | None:
    """The same from the newest good checkpoint, for a run whose identity file was lost."""
    if not has_checkpoints(folder):
        return None
    checkpoint, _ = find_good_checkpoint(folder)
    return {
        "id": checkpoint.recorded("run_id"),
        "model": checkpoint.recorded("model"),
        "data_fingerprint": checkpoint.recorded("data_fingerprint"),
        "seed": checkpoint.recorded("config").get("seed"),
    }


def require_same_run(path: Path, existing: dict[str, Any], identity: dict[str, Any]) -> None:
    """The model, the data of the first phase and the seed of a run are fixed.

    Raises CheckpointError naming what differs.
    """
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


def require_same_optimizer(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """An optimizer cannot continue with the state of another one. Raises CheckpointError."""
    there, here = recorded_settings(checkpoint.recorded("config"))["optim"]["name"], config.optim.name
    if there != here:
        raise CheckpointError(
            f"{checkpoint.path} holds the state of optim={there}, with which optim={here} cannot continue; use "
            f"optim={there}, or export the run and start in another run_dir with init_from=EXPORT"
        )


def copy_once(source: Path, target: Path) -> None:
    """Copy a folder, unless the whole of it is there already."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_folder(source, temporary)
    temporary.rename(target)
