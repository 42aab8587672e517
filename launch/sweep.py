"""Runs a sweep on this machine: python -m launch.sweep workers=2 -- optim.lr=1e-3,2e-3 data_dir=DATA run_dir=RUNS

The arguments before `--` are settings of this command (conf/sweep.yaml), those after it are of `kraken_train.train`.
Lists of values (`optim.lr=1e-3,2e-3`) make a run for each combination, in a folder of its own within `run_dir`. With
`-- evaluate` at the end each run is then exported and evaluated. Everything is checked before the first run starts. The
same command continues: runs that are finished stay as they are, others go on from their checkpoints.

On a cluster, `launch.submit` makes a job array of the same arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.cli import FAULT_EXIT_CODE, exit_with_message, run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.run.events import FINISHED
from kraken_train.run.state import read_state
from launch.local_queue import Job, interrupt_on_sigterm, places, python, run_jobs, usable_cores, visible_gpus
from launch.stages import EVALUATE, PREPARE, TRAIN, Training, check_stages, split_stages

COMMANDS = {EVALUATE: "launch.export_and_evaluate"}


@dataclass(frozen=True)
class SweepConfig:
    """The settings of `launch.sweep`."""

    # runs at a time, each with an equal part of the cores and a GPU of its own; null: one per GPU, or one
    workers: int | None


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    sys.argv[1:], stages = arguments[:split], arguments[split:]
    run_entry(lambda config: sweep(config, stages), SweepConfig, "sweep")


def sweep(config: SweepConfig, arguments: Sequence[str]) -> None:
    """Check and run all runs. Raises KrakenError, with nothing started, for what cannot run."""
    stage_arguments = split_stages(arguments)
    if TRAIN not in dict(stage_arguments):
        raise ConfigError("there is no training; give -- and its settings, as in -- optim.lr=1e-3,2e-3 data_dir=DATA "
                          "run_dir=RUNS")  # fmt: skip
    if PREPARE in dict(stage_arguments):
        raise ConfigError("prepare cannot be a stage of a sweep; run data_prep.prepare first, once for all runs")
    at = places(config.workers, usable_cores(), visible_gpus())
    stages, trainings = check_stages(stage_arguments, ranks=1)
    jobs = []
    for index, training in enumerate(trainings):
        commands = [] if is_finished(training) else [python("kraken_train.train", stages[0].runs[index])]
        commands += [python(COMMANDS[stage.name], stage.runs[index]) for stage in stages[1:]]
        folder = Path(training.config.run_dir).expanduser()
        if commands:
            jobs.append(Job(folder.name, tuple(commands), folder.with_name(f"{folder.name}.log")))
        else:
            print(f"{folder.name} is finished")
    interrupt_on_sigterm()
    failed = run_jobs(jobs, at, lambda line: print(line, flush=True))
    if failed:
        exit_with_message(
            f"{len(failed)} of {len(trainings)} runs failed: {', '.join(job.name for job in failed)}; the same command "
            "tries them again and keeps the others",
            FAULT_EXIT_CODE,
        )
    folders = " ".join(training.config.run_dir for training in trainings)
    print(f"compare them with: python -m kraken_train.report {folders}")


def is_finished(training: Training) -> bool:
    """Whether the run has come to the end that its settings give. If in doubt its own command finds out."""
    folder = Path(training.config.run_dir).expanduser()
    if not folder.is_dir() or training.config.length.tokens is not None:
        return False
    state = read_state(folder)
    return state.state == FINISHED and state.step >= training.config.max_steps


if __name__ == "__main__":
    main()
