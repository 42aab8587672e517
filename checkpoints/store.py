"""Training checkpoints on disk: complete or absent, verified before use, and independent of the ranks that wrote them.

A run's `checkpoints/` folder holds one `step-NNNNNNNN/` per checkpoint and a pointer `latest`. A checkpoint is a
`torch.distributed.checkpoint` directory plus `manifest.json`, which lists every file with size and SHA-256. It is
written under a temporary name, synced, renamed, and only then pointed to, so that being killed at any moment leaves
the previous checkpoint as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from kraken_train.config import ModelConfig, parse_model
from kraken_train.errors import CheckpointError
from kraken_train.files import file_sha256, replace_synced, sync_folder, write_synced
from kraken_train.runtime import Runtime

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"
POINTER = "latest"
WEIGHT_PREFIX = "model."


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder; `metadata` is what the run stored beside the tensors."""

    path: Path
    step: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class TrainedWeights:
    """The fp32 weights of a checkpoint under their global names."""

    model_config: ModelConfig
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    passed_over: list[str]  # why newer checkpoints of the run were not taken


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any], keep: int, runtime: Runtime
) -> None:
    """Write `tensors` and `metadata` as the checkpoint of `step`, then drop all but the newest `keep`. A collective.

    Raises CheckpointError on all ranks where one of them cannot write; the previous checkpoints are untouched then.
    """
    temporary = folder / f".step-{step:08d}.tmp"
    runtime.on_first(lambda: make_empty(temporary))
    failure = write_tensors(tensors, temporary, runtime)
    if not runtime.all_true(failure is None):
        runtime.on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise CheckpointError(describe_failed_save(folder, step, failure or "another rank could not write its part"))
    runtime.on_first(lambda: publish(folder, temporary, step, metadata))
    runtime.on_first(lambda: drop_old(folder, keep))


def write_tensors(tensors: dict[str, Tensor], folder: Path, runtime: Runtime) -> str | None:
    """This rank's part of the checkpoint; what went wrong, if anything did."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process saves without a process group
            dcp.save(tensors, checkpoint_id=folder, no_dist=runtime.world_size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        return root_message(error)
    return None


def publish(folder: Path, temporary: Path, step: int, metadata: dict[str, Any]) -> None:
    final = folder / f"step-{step:08d}"
    try:
        require_all_parts(temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        content = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
        write_synced(
            temporary / MANIFEST, json.dumps({"content": content, "sha256": content_sha256(content)}, indent=1)
        )
        sync_folder(temporary)
        if final.exists():  # the same step, written again after falling back behind it
            discard(final)
        temporary.rename(final)
        replace_synced(folder / POINTER, final.name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(describe_failed_save(folder, step, root_message(error))) from error


def require_all_parts(temporary: Path) -> None:
    """Raises CheckpointError unless the files of all ranks are here, as they are on a shared file system."""
    for part in sorted({info.relative_path for info in read_index(temporary).storage_data.values()}):
        if not (temporary / part).is_file():
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{part} of the checkpoint was written by another node and cannot be seen in {temporary}; run_dir must "
                "be on a file system that all nodes share"
            )


def drop_old(folder: Path, keep: int) -> None:
    for path in step_folders(folder)[:-keep]:
        discard(path)
    for leftover in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a deletion cut short leaves no half of one under a good name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def make_empty(folder: Path) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error.strerror}") from error


def describe_failed_save(folder: Path, step: int, reason: str) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    kept = step_folders(folder)
    previous = f"the newest good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    return (
        f"the checkpoint of step {step} could not be written to {folder}: {reason} ({free:.0f} MiB free on its disk); "
        f"{previous}. Free some space, or set run_dir to another disk, and start the same command again"
    )


# ---------------------------------------------------------------------------------------------------------------
# Finding and verifying
# ---------------------------------------------------------------------------------------------------------------


def has_checkpoints(folder: Path) -> bool:
    return bool(step_folders(folder))


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name))


def find_good_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    Raises CheckpointError where there is none, or none that is whole.
    """
    problems: list[str] = []
    for path in reversed(step_folders(folder)):
        try:
            return verify_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(problems)}")
    raise CheckpointError(f"there is no checkpoint in {folder}")


def set_aside_after(checkpoint: Checkpoint) -> None:
    """Rename checkpoints newer than this one, which are damaged, so that they no longer count as any."""
    for path in step_folders(checkpoint.path.parent):
        if path.name > checkpoint.path.name:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of `path` and check every file's size and SHA-256 against it. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        content = manifest["content"]
        intact = manifest["sha256"] == content_sha256(content)
        version, files = content["format_version"], content["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged") from error
    if not intact:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its content does not match its checksum")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if file_sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's")
    return Checkpoint(path, content["step"], content["metadata"])


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def load_tensors(checkpoint: Checkpoint, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, on the CPU; all of them, or those named. No ranks are needed.

    Raises CheckpointError where one is missing.
    """
    stored = stored_tensors(checkpoint)
    wanted = list(stored) if names is None else names
    for name in wanted:
        if name not in stored:
            raise CheckpointError(f"{checkpoint.path} holds no tensor {name}; it is the checkpoint of another model")
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in wanted}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process loads without a process group
            dcp.load(tensors, checkpoint_id=checkpoint.path, no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {root_message(error)}") from error
    return tensors


def read_weights(run_dir: Path, step: int | None = None) -> TrainedWeights:
    """The weights of a run's newest good checkpoint, or of the one at `step`. Raises CheckpointError."""
    folder = run_dir / "checkpoints"
    if step is None:
        checkpoint, passed_over = find_good_checkpoint(folder)
    else:
        available = [str(int(path.name.removeprefix("step-"))) for path in step_folders(folder)]
        if str(step) not in available:
            raise CheckpointError(f"step={step} is not in {folder}; there are {', '.join(available) or 'none'}")
        checkpoint, passed_over = verify_checkpoint(folder / f"step-{step:08d}"), []
    names = [name for name in stored_tensors(checkpoint) if name.startswith(WEIGHT_PREFIX)]
    weights = {name.removeprefix(WEIGHT_PREFIX): tensor for name, tensor in load_tensors(checkpoint, names).items()}
    metadata = {"step": checkpoint.step, **checkpoint.metadata}
    return TrainedWeights(parse_model(metadata["model"]), weights, metadata, passed_over)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, TensorStorageMetadata]:
    """Shape and type of each tensor in the checkpoint."""
    stored = read_index(checkpoint.path).state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def root_message(error: BaseException) -> str:
    """The innermost reason, such as "No space left on device", out of what the checkpoint library wraps it in."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno is not None:
            return os.strerror(chain.errno)
        chain = chain.__cause__ or chain.__context__
    text = str(error).strip().splitlines()
    # PyTorch's zip writer reports a short write, which is what a full disk gives, by position only.
    return os.strerror(errno.ENOSPC) if "unexpected pos" in str(error) else (text[0] if text else type(error).__name__)


def read_index(path: Path) -> Metadata:
    """What the checkpoint library has written where. Raises CheckpointError."""
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the index of {path} cannot be read: {root_message(error)}") from error
