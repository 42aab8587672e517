"""Verifies and reads training checkpoints, on any number of ranks.

A checkpoint is a `torch.distributed.checkpoint` directory plus a manifest (`checkpoints.training.manifest`). It is
written under a temporary name, synced and renamed, and only then `latest` names it, so that a kill at any moment leaves
the previous checkpoint unchanged (`checkpoints.training.writer`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.training.manifest import Checkpoint, find_size_problem, read_manifest, step_folders, step_of
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.parallel.ranks import Runtime

WEIGHT_PREFIX = "model."
EMA_PREFIX = "optimizer.ema."  # of the average of the weights
SINGLE_PROCESS = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)

# A single process saves and loads without a process group. The filter is set here and not around the calls, because a
# thread saves, and warnings.catch_warnings changes the filters of all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@dataclass(frozen=True)
class TrainedWeights:
    """The fp32 weights of a checkpoint by global name."""

    model_config: ModelConfig
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    skipped: list[str]  # the problems of newer checkpoints of the run


def find_good_checkpoint(
    folder: Path, runtime: Runtime | None = None, before: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """The newest undamaged checkpoint, of a step less than `before` if given, and the problems of newer ones.

    With `runtime` this is a collective with the same result on all ranks; without, this process reads all files.
    Raises CheckpointError if there is no checkpoint, or if all are damaged.
    """
    runtime = runtime or SINGLE_PROCESS
    problems: list[str] = []
    for path in reversed(runtime.on_first(lambda: step_folders(folder))):
        if before is not None and step_of(path) >= before:
            continue
        try:
            return verify_checkpoint(path, runtime), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: {'; '.join(problems)}")
    limit = "" if before is None else f" of a step before {before}"
    raise CheckpointError(f"there is no checkpoint{limit} in {folder}")


def mark_newer_as_damaged(checkpoint: Checkpoint) -> None:
    """Rename the checkpoints newer than this one, which are damaged, so that they are no longer found."""
    for path in step_folders(checkpoint.path.parent):
        if path.name > checkpoint.path.name:
            renamed = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)


def verify_checkpoint(path: Path, runtime: Runtime | None = None) -> Checkpoint:
    """Read the manifest of `path` and check every file's size and SHA-256 against it.

    With `runtime` this is a collective: each rank reads a share of the files. Raises CheckpointError, on all ranks.
    """
    runtime = runtime or SINGLE_PROCESS
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
    """How `file` differs from the manifest; None if it does not. An unreadable file is a problem too, not an error."""
    problem = find_size_problem(file, expected)
    if problem is not None:
        return problem
    try:
        if file_sha256(file) != expected["sha256"]:
            return f"{file} is damaged: its SHA-256 is not that of the manifest"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def read_weights(
    run_dir: Path, step: int | None = None, average: int = 1, prefix: str = WEIGHT_PREFIX
) -> TrainedWeights:
    """The weights of a run's newest undamaged checkpoint, or of the one at `step`.

    With `average` they are the mean over so many checkpoints, that one and the undamaged ones before it; `prefix` says
    which of its tensors are the weights. Raises CheckpointError, also where there are fewer checkpoints.
    """
    folder = run_dir / "checkpoints"
    if step is None:
        checkpoint, skipped = find_good_checkpoint(folder)
    else:
        available = [str(step_of(path)) for path in step_folders(folder)]
        if str(step) not in available:
            raise CheckpointError(f"step={step} is not in {folder}; available steps: {', '.join(available) or 'none'}")
        checkpoint, skipped = verify_checkpoint(folder / f"step-{step:08d}"), []
    metadata = {"step": checkpoint.step, **checkpoint.metadata}
    if average == 1:
        return TrainedWeights(model_of(checkpoint), stored_weights(checkpoint, prefix), metadata, skipped)
    averaged = [checkpoint]
    while len(averaged) < average:
        try:
            earlier, problems = find_good_checkpoint(folder, before=averaged[-1].step)
        except CheckpointError as error:
            steps = ", ".join(str(each.step) for each in averaged)
            raise CheckpointError(
                f"average={average} is more than the undamaged checkpoints in {folder} (steps {steps}); average "
                f"{len(averaged)}, or train with checkpoint.keep={average}"
            ) from error
        averaged.append(earlier)
        skipped = [*skipped, *problems]
    metadata["averaged_steps"] = sorted(each.step for each in averaged)
    return TrainedWeights(model_of(checkpoint), mean_of_weights(averaged, prefix), metadata, skipped)


def stored_weights(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The fp32 weights by global name. Raises CheckpointError if there are none of this prefix."""
    stored = StoredTensors(checkpoint)
    names = [name for name in stored.entries if name.startswith(prefix)]
    if not names and prefix == EMA_PREFIX:
        raise CheckpointError(f"{checkpoint.path} holds no average of the weights; train with ema_decay=0.999")
    return {name.removeprefix(prefix): tensor for name, tensor in stored.read(names).items()}


def mean_of_weights(checkpoints: Sequence[Checkpoint], prefix: str) -> dict[str, Tensor]:
    """Summed in float64, with one checkpoint in memory at a time. Raises CheckpointError for those of several runs."""
    first = checkpoints[0]
    sums = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in stored_weights(first, prefix).items()
    }
    for checkpoint in checkpoints:
        if checkpoint.metadata.get("run_id") != first.metadata.get("run_id"):
            raise CheckpointError(f"{checkpoint.path} is of another run than {first.path}; move it away")
        for name, tensor in stored_weights(checkpoint, prefix).items():
            sums[name] += tensor
    return {name: (total / len(checkpoints)).float() for name, total in sums.items()}


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model configuration of a checkpoint. Raises CheckpointError if its weights are in a layout of the past."""
    config = parse_model(checkpoint.recorded("model"))
    if config.first_export_format > 1 and config.kv_heads_setting not in checkpoint.metadata["model"]:
        raise CheckpointError(
            f"{checkpoint.path} was written before grouped-query attention was added, with queries, keys and values "
            f"of a {config.architecture} Transformer in another order; use the version that wrote it, or train again"
        )
    return config
