"""The settings of `launch.submit`, see conf/submit.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath, Name
from kraken_train.common.validation import require_at_least, require_positive
from launch.slurm.scheduler import seconds

# The least time from the start of a job to the signal to save: starting takes a minute or two, and Slurm may send the
# signal 60 s early.
MIN_TRAINING_SECONDS = 240


@dataclass(frozen=True)
class JobConfig:
    """The resources of a job on one node."""

    time: str | int  # a bare number means minutes
    cpus_per_task: int | None
    mem: str | None
    partition: Name | None

    def validate(self) -> None:
        """Raises ConfigError."""
        seconds(str(self.time))
        if self.cpus_per_task is not None:
            require_positive("cpus_per_task", self.cpus_per_task)


@dataclass(frozen=True)
class SubmitConfig:
    """The resources of the training job, and the settings of all jobs."""

    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    cpus_per_task: int | None
    mem: str | None
    time: str | int  # a bare number means minutes
    signal_seconds: int
    max_restarts: int
    partition: Name | None
    account: Name | None
    qos: Name | None
    constraint: Name | None
    sbatch_options: tuple[str, ...]
    venv: FilePath | None
    setup: tuple[str, ...]
    container: FilePath | None
    srun_options: tuple[str, ...]
    snapshot: bool
    prepare: JobConfig
    evaluate: JobConfig
    dry_run: bool

    def validate(self) -> None:
        """Raises ConfigError."""
        for name in ("nodes", "ranks_per_node", "cpus_per_task", "signal_seconds"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("gpus_per_node", "max_restarts"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 0)
        self.require_time_to_train()
        self.prepare.validate()
        self.evaluate.validate()
        for option in self.sbatch_options:
            if not option.startswith("--"):
                raise ConfigError(f"sbatch_options: {option} must be written as --NAME=VALUE or --NAME")
        if self.venv is not None and self.container is not None:
            raise ConfigError("venv and container are both set, but a container brings its own Python; use one of them")
        if self.venv is not None and not (Path(self.venv).expanduser() / "bin" / "python").exists():
            raise ConfigError(f"venv={self.venv} is not a Python environment (there is no bin/python in it)")

    def require_time_to_train(self) -> None:
        time_limit = seconds(str(self.time))
        training_time = time_limit - self.signal_seconds
        if training_time >= MIN_TRAINING_SECONDS:
            return
        maximum = time_limit - MIN_TRAINING_SECONDS
        shorter = f", or signal_seconds={maximum} at most" if maximum > 0 else ""
        raise ConfigError(
            f"time={self.time} is {time_limit} s, and the job gets the signal to save signal_seconds="
            f"{self.signal_seconds} before its end: that leaves {max(training_time, 0)} s to start and to train, and "
            f"{MIN_TRAINING_SECONDS} s are needed; use "
            f"time={-(-(self.signal_seconds + MIN_TRAINING_SECONDS) // 60)} (minutes) or longer{shorter}"
        )
