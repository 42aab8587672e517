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

    time: str | int  # time limit; a bare number means minutes
    cpus_per_task: int | None  # cores; null: the cluster's default
    mem: str | None  # memory, such as 64G; null: the cluster's default
    partition: Name | None  # null: that of the training

    def validate(self) -> None:
        """Raises ConfigError."""
        seconds(str(self.time))
        if self.cpus_per_task is not None:
            require_positive("cpus_per_task", self.cpus_per_task)


@dataclass(frozen=True)
class SubmitConfig:
    """The resources of the training job, and the settings of all jobs."""

    nodes: int  # nodes of a training
    gpus_per_node: int | None  # null: as many as the partition's nodes have; 0: ranks on CPUs
    ranks_per_node: int | None  # null: one per GPU, or one without GPUs
    cpus_per_task: int | None  # cores per rank; null: the cluster's default
    mem: str | None  # memory per node, such as 200G; null: the cluster's default
    # time limit, after which the job requeues itself and continues until the run is finished; a bare number means
    # minutes
    time: str | int
    # seconds before the time limit at which the run saves: longer than a step and a save; 240 s must be left
    signal_seconds: int
    max_restarts: int  # restarts in a row without a newer checkpoint after which the job ends
    partition: Name | None  # of all jobs; null: the cluster's default
    account: Name | None  # of all jobs; null: the user's default
    qos: Name | None  # of all jobs; null: the default
    constraint: Name | None  # features that nodes must have; null: none
    # further options of sbatch, such as 'sbatch_options=["--exclusive","--reservation=NAME"]'
    sbatch_options: tuple[str, ...]
    venv: FilePath | None  # folder of the Python environment; null: the one that runs this command
    setup: tuple[str, ...]  # shell commands before Python starts, such as 'setup=["module load cuda/12.4"]'
    # image for srun --container-image of pyxis, whose python3 is used instead of venv; null: none
    container: FilePath | None
    srun_options: tuple[str, ...]  # further options of srun, such as 'srun_options=["--container-mounts=/data"]'
    snapshot: bool  # the jobs run a copy of the code of now; false: the code at the time when they run
    prepare: JobConfig
    evaluate: JobConfig
    dry_run: bool  # print the scripts; write and submit nothing

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
