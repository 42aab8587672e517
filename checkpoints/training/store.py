"""Training checkpoints on disk: complete or absent, verified before use, and independent of the ranks that wrote them.

A checkpoint is a `torch.distributed.checkpoint` directory plus a manifest (`checkpoints.training.manifest`). It is
written under a temporary name, synced, renamed, and only then pointed to, so that being killed at any moment leaves the
previous checkpoint as it was (`checkpoints.training.writer`). This file verifies and reads them.
"""

from __future__ import annotations

import errno
import os
import pickle
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

from checkpoints.training.manifest import Checkpoint, find_size_problem, read_manifest, step_folders
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.parallel.ranks import Runtime

WEIGHT_PREFIX = "model."
ALONE = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)

# A single process saves and loads without a process group. Set here and not around the calls: a thread saves, and
# warnings.catch_warnings changes the filters of all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@dataclass(frozen=True)
class TrainedWeights:
    """The fp32 weights of a checkpoint under their global names."""

    model_config: ModelConfig
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    passed_over: list[str]  # why newer checkpoints of the run were not taken


def find_good_checkpoint(
    folder: Path, runtime: Runtime | None = None, before: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, of a step `before` that one, and why newer ones were passed over.

    With `runtime` a collective that comes to the same result on all ranks; without one, this process does all of it.
    Raises CheckpointError where there is none, or none that is whole.
    """
    runtime = runtime or ALONE
    problems: list[str] = []
    for path in reversed(runtime.on_first(lambda: step_folders(folder))):
        if before is not None and int(path.name.removeprefix("step-")) >= before:
            continue
        try:
            return verify_checkpoint(path, runtime), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(problems)}")
    limit = "" if before is None else f" of a step before {before}"
    raise CheckpointError(f"there is no checkpoint{limit} in {folder}")


def set_aside_after(checkpoint: Checkpoint) -> None:
    """Rename checkpoints newer than this one, which are damaged, so that they no longer count as any."""
    for path in step_folders(checkpoint.path.parent):
        if path.name > checkpoint.path.name:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def verify_checkpoint(path: Path, runtime: Runtime | None = None) -> Checkpoint:
    """Read the manifest of `path` and check every file's size and SHA-256 against it.

    With `runtime` a collective: each rank reads a share of the files. Raises CheckpointError, on all ranks then.
    """
    runtime = runtime or ALONE
    checkpoint = runtime.on_first(lambda: read_manifest(path))
    shares = runtime.gather(
        {
            name: find_problem(path / name, checkpoint.files[name])
            for name in list(checkpoint.files)[runtime.rank :: runtime.world_size]
        }
    )
    problems = {name: problem for share in shares for name, problem in share.items()}
    for name in checkpoint.files:
        if problems[name] is not None:
            raise CheckpointError(problems[name])
    return checkpoint


def find_problem(file: Path, expected: dict[str, Any]) -> str | None:
    """How `file` differs from what the manifest lists of it; a file that cannot be read is a problem, no error."""
    problem = find_size_problem(file, expected)
    if problem is not None:
        return problem
    try:
        if file_sha256(file) != expected["sha256"]:
            return f"{file} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def load_tensors(checkpoint: Checkpoint, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, on the CPU; all of them, or those named. No ranks are needed.

    Raises CheckpointError where one is missing.
    """
    stored = stored_tensors(checkpoint)
    wanted = list(stored) if names is None else names
    require_stored(checkpoint, stored, wanted)
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in wanted}
    read_into(tensors, checkpoint)
    return tensors


def fill_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Read the named tensors of a checkpoint into those given, in place; of a DTensor only this rank's slices.

    No collective: each rank reads for itself, whatever ranks have written. Raises CheckpointError, with nothing
    changed, where a name is missing or a shape (of a DTensor: the whole one) differs; and where a file cannot be read.
    """
    stored = stored_tensors(checkpoint)
    require_stored(checkpoint, stored, list(tensors))
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].size:
            raise CheckpointError(
                f"{checkpoint.path} holds {name} of shape {tuple(stored[name].size)}, not {tuple(tensor.shape)}; it is "
                "the checkpoint of another model"
            )
    read_into(tensors, checkpoint)


def require_stored(checkpoint: Checkpoint, stored: dict[str, TensorStorageMetadata], names: list[str]) -> None:
    for name in names:
        if name not in stored:
            raise CheckpointError(f"{checkpoint.path} holds no tensor {name}; it is the checkpoint of another model")


def read_into(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint.path, no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {root_message(error)}") from error


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
    return TrainedWeights(model_of(checkpoint), weights, metadata, passed_over)


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model whose weights a checkpoint holds. Raises CheckpointError for a layout that is no longer read."""
    config = parse_model(checkpoint.metadata["model"])
    if config.first_export_format > 1 and config.kv_heads_setting not in checkpoint.metadata["model"]:
        raise CheckpointError(
            f"{checkpoint.path} is of a program from before grouped-query attention, which kept the queries, keys and "
            f"values of a {config.architecture} Transformer in another order; use that version, or train anew"
        )
    return config


def stored_tensors(checkpoint: Checkpoint) -> dict[str, TensorStorageMetadata]:
    """Shape and type of each tensor in the checkpoint."""
    stored = read_index(checkpoint.path).state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


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
