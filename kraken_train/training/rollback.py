"""Rolling back after a loss spike or non-finite losses: whether the settings allow it, and to which checkpoint."""

from __future__ import annotations

from pathlib import Path

from checkpoints.training.manifest import Checkpoint, has_checkpoints
from checkpoints.training.store import find_good_checkpoint
from kraken_train.common.errors import CheckpointError, TrainingError
from kraken_train.config import TrainConfig
from kraken_train.health.loss_monitor import LossMonitor, Trouble
from kraken_train.parallel.ranks import Runtime


def require_rollback(trouble: Trouble, monitor: LossMonitor, config: TrainConfig, checkpoints: Path) -> None:
    """Raises TrainingError unless the settings ask for a rollback after `trouble` and allow one more."""
    if not monitor.wants_rollback(trouble):
        raise TrainingError(describe_trouble(trouble, config, checkpoints))
    if not monitor.may_roll_back():
        raise TrainingError(
            f"{trouble.reason}, and health.max_rollbacks={config.health.max_rollbacks} did not suffice to get "
            f"past step {monitor.furthest}; {describe_checkpoints(checkpoints)}. Try a lower optim.lr in a new "
            "run_dir"
        )


def find_checkpoint_before(trouble: Trouble, checkpoints: Path, runtime: Runtime) -> Checkpoint:
    """The newest good checkpoint from before `trouble`. A collective. Raises TrainingError where there is none.

    Preferred is one that the loss of the step after it has shown to be good.
    """
    for before in (trouble.first - 1, trouble.first):
        try:
            return find_good_checkpoint(checkpoints, runtime, before)[0]
        except CheckpointError as error:
            problem = error
    raise TrainingError(f"{trouble.reason}, and the run cannot be rolled back: {problem}") from problem


def describe_trouble(trouble: Trouble, config: TrainConfig, checkpoints: Path) -> str:
    if trouble.spike:
        return (
            f"{trouble.reason} (health.loss_spike=stop); {describe_checkpoints(checkpoints)}. The same command meets "
            "the same data: health.loss_spike=rollback continues with the data after it, ignore with all of it"
        )
    return (
        f"{trouble.reason} (max_nonfinite_steps={config.max_nonfinite_steps}); they changed no weight, and "
        f"{describe_checkpoints(checkpoints)}. Try a lower optim.lr or a longer schedule.warmup_steps in a new "
        "run_dir, or health.nonfinite=rollback"
    )


def describe_checkpoints(checkpoints: Path) -> str:
    kept = has_checkpoints(checkpoints)
    return f"the checkpoints in {checkpoints} are kept" if kept else "there is no checkpoint yet"
