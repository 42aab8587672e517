"""What each stage's job needs: GPUs and ranks per node, the options of sbatch, and the settings in its script."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

from kraken_train.common.errors import ConfigError
from launch.slurm.config import SubmitConfig
from launch.slurm.scheduler import Partition, choose_partition, require_allowed, require_available
from launch.slurm.script import Settings
from launch.stages import EVALUATE, PREPARE, TRAIN, Stage


def check_against_cluster(config: SubmitConfig, partitions: list[Partition], stages: Collection[str]) -> SubmitConfig:
    """The settings with `gpus_per_node` as the partition has them, if it was null.

    Raises ConfigError for a job of the named stages that the cluster could never run.
    """
    partition = choose_partition(partitions, config.partition)
    gpus = partition.gpus_per_node if config.gpus_per_node is None else config.gpus_per_node
    require_allowed(partition, config.account, config.qos)
    if TRAIN in stages:
        require_available(partition, config.nodes, gpus, str(config.time))
    for name, job in ((PREPARE, config.prepare), (EVALUATE, config.evaluate)):
        if name in stages:
            job_partition = choose_partition(partitions, job.partition or config.partition)
            require_allowed(job_partition, config.account, config.qos)
            require_available(job_partition, 1, 0, str(job.time))
    return dataclasses.replace(config, gpus_per_node=gpus)


def job_options(config: SubmitConfig, stage: Stage, folder: Path) -> dict[str, str | None]:
    """The options of sbatch; None removes an option of the shipped script. Raises ConfigError."""
    if "\\" in str(folder):
        raise ConfigError(f"{folder}: Slurm cannot write a job's output to a folder with a backslash in its name; use "
                          "another run_dir")  # fmt: skip
    output = f"{str(folder).replace('%', '%%')}/{stage.name}-%{'A_%a' if stage.is_array else 'j'}.out"
    common = {
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "output": output,
        "array": f"0-{len(stage.runs) - 1}" if stage.is_array else None,
    }
    for option in config.sbatch_options:
        key, _, value = option.removeprefix("--").partition("=")
        common[key] = value
    if stage.name == TRAIN:
        return {
            "nodes": str(config.nodes),
            "ntasks-per-node": str(config.ranks_per_node),
            "gpus-per-node": str(config.gpus_per_node) if config.gpus_per_node else None,
            "cpus-per-task": optional(config.cpus_per_task),
            "mem": config.mem,
            "time": str(config.time),
            "signal": f"B:USR1@{config.signal_seconds}",
            "partition": config.partition,
            **common,
        }
    job = config.prepare if stage.name == PREPARE else config.evaluate
    return {
        "gpus-per-node": "1" if stage.name == EVALUATE and config.gpus_per_node else None,
        "cpus-per-task": optional(job.cpus_per_task),
        "mem": job.mem,
        "time": str(job.time),
        "partition": job.partition or config.partition,
        **common,
    }


def optional(number: int | None) -> str | None:
    return None if number is None else str(number)


def script_settings(config: SubmitConfig, stage: Stage, folder: Path) -> Settings:
    """The settings in a stage's script; `folder` is that of the submission."""
    environment = list(config.setup)
    if config.container is not None:
        python, container = "python3", [f"--container-image={config.container}"]
    else:
        venv = Path(config.venv).expanduser().absolute() if config.venv else Path(sys.prefix)
        python, container = str(venv / "bin" / "python"), []
        environment.append(f'export PATH={shlex.quote(str(venv / "bin"))}:"$PATH"')
    return Settings(
        environment=environment,
        python=[python, str(folder / "code")] if config.snapshot else [python, "-m"],
        srun_options=[*container, *config.srun_options],
        max_restarts=config.max_restarts if stage.name == TRAIN else None,
        overrides=folder / stage.name if stage.is_array else None,
    )
