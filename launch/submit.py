"""Submits training to Slurm: python -m launch.submit nodes=4 time=24:00:00 -- experiment=NAME data_dir=DATA run_dir=RUN

The arguments before `--` are settings of this command (conf/submit.yaml), those after it are of `kraken_train.train`.
A chain of jobs, in which each job starts when the one before it has succeeded, names its stages:

    python -m launch.submit nodes=4 -- prepare source=TEXT output_dir=DATA -- train run_dir=RUN ... -- evaluate

Everything is checked first, as the commands themselves and Slurm would check it. Then each job gets a script in
RUN/submissions/0001, made from the script in launch/slurm, and a copy of the code, which a requeued job runs again.
Sweeps (`optim.lr=1e-3,2e-3`) become a job array: independent jobs of one submission, which Slurm starts, requeues and
ends one by one. (Hydra's launcher plugin for Slurm is not used: it pickles a function and waits for its result, and it
cannot requeue a training that saves its own checkpoints.)
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from kraken_train.common.cli import exit_with_message, run_entry
from kraken_train.common.errors import CheckpointError, ConfigError, KrakenError
from kraken_train.common.settings import to_yaml
from kraken_train.run.events import EventLog, read_events
from kraken_train.run.folder import SUBMISSIONS
from kraken_train.run.layout import EVENTS_FILE
from launch.export_and_evaluate import value_of
from launch.jobs import check_against_cluster, job_options, script_settings
from launch.network_warning import network_warning
from launch.slurm import scheduler
from launch.slurm.config import SubmitConfig
from launch.slurm.script import fill_in
from launch.slurm.snapshot import write_snapshot
from launch.stages import TRAIN, Stage, Training, check_stages, split_stages

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    sys.argv[1:], stages = arguments[:split], arguments[split:]
    try:
        run_entry(lambda config: submit(config, stages), SubmitConfig, "submit")
    except OSError as error:
        exit_with_message(
            f"{error.filename2 or error.filename or os.getcwd()} cannot be read or written: {error.strerror}"
        )


def submit(config: SubmitConfig, arguments: Sequence[str]) -> None:
    """Check and submit the stages. Raises KrakenError, with nothing submitted, for what cannot run."""
    stage_arguments = split_stages(arguments)
    config = complete_resources(config, {name for name, _ in stage_arguments})
    ranks_per_node = config.ranks_per_node or 1
    stages, trainings = check_stages(stage_arguments, config.nodes * ranks_per_node)
    if trainings:
        warning = network_warning(trainings[0].config, trainings[0].model, ranks_per_node)
        if warning is not None:
            console.print(warning, style="yellow", markup=False)
    folder = next_submission(stages)
    scripts = {
        stage.name: fill_in(stage.name, job_options(config, stage, folder), script_settings(config, stage, folder))
        for stage in stages
    }
    if config.dry_run:
        for stage in stages:
            console.rule(f"{folder / stage.name}.sbatch", align="left")
            print(scripts[stage.name], end="")
            for run in stage.runs:
                console.print(f"# arguments: {shlex.join(run)}", markup=False)
        return
    for training in trainings:
        require_idle(Path(training.config.run_dir))
    for script in scripts.values():
        scheduler.require_accepted(script)
    write_submission(config, stages, scripts, folder)
    submit_jobs(stages, trainings, folder)


def complete_resources(config: SubmitConfig, stages: Collection[str]) -> SubmitConfig:
    """The settings with GPUs and ranks per node filled in. Raises ConfigError for what the cluster cannot run."""
    try:
        partitions = scheduler.read_partitions()
    except scheduler.SlurmError:
        if not config.dry_run:
            raise
        console.print("note: there is no Slurm on this machine, so no cluster's limits are checked", style="yellow")
    else:
        config = check_against_cluster(config, partitions, stages)
    gpus = config.gpus_per_node or 0
    return dataclasses.replace(config, gpus_per_node=gpus, ranks_per_node=config.ranks_per_node or gpus or 1)


def next_submission(stages: Sequence[Stage]) -> Path:
    """The folder of the next submission: RUN/submissions/0001, or DATA.submissions/0001 if data is only prepared."""
    arguments = stages[-1].runs[0]
    run_dir = value_of("run_dir", arguments)
    if run_dir is None:
        parent = Path(f"{Path(value_of('output_dir', arguments) or '.').expanduser().absolute()}.{SUBMISSIONS}")
    else:
        run = Path(run_dir).expanduser().absolute()
        parent = (run.parent if stages[-1].is_array else run) / SUBMISSIONS
    numbers = [int(entry.name) for entry in parent.glob("*") if entry.name.isdigit()]
    return parent / f"{max(numbers, default=0) + 1:04d}"


def require_idle(run_dir: Path) -> None:
    """Raises ConfigError if an earlier job of the run is still pending or running."""
    jobs = [event["job"] for event in read_events(run_dir / EVENTS_FILE) if event["event"] == "submitted"]
    if jobs and scheduler.is_active(jobs[-1]):
        raise ConfigError(
            f"run_dir={run_dir} has job {jobs[-1]}, which is still pending or running; it continues by itself, or end "
            f"it first with scancel {jobs[-1]}"
        )


def write_submission(config: SubmitConfig, stages: Sequence[Stage], scripts: dict[str, str], folder: Path) -> None:
    """Write the scripts, their arguments, these settings and the code. Raises CheckpointError if that fails."""
    try:
        folder.mkdir(parents=True)
        (folder / "submit.yaml").write_text(to_yaml(config), encoding="utf-8")
        for stage in stages:
            (folder / f"{stage.name}.sbatch").write_text(
                scripts[stage.name], encoding="utf-8", errors="surrogateescape"
            )
            for index, run in enumerate(stage.runs):
                name = f"{stage.name}.{index}" if stage.is_array else f"{stage.name}.overrides"
                (folder / name).write_text(
                    "".join(f"{argument}\n" for argument in run), encoding="utf-8", errors="surrogateescape"
                )
        if config.snapshot:
            write_snapshot(folder / "code")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error


def submit_jobs(stages: Sequence[Stage], trainings: Sequence[Training], folder: Path) -> None:
    """Submit the scripts, each to start when the one before it has succeeded, and print how to follow the jobs."""
    jobs: list[str] = []
    previous: Stage | None = None
    for stage in stages:
        options = []
        if previous is not None:
            condition = "aftercorr" if previous.is_array and stage.is_array else "afterok"
            options = [f"--dependency={condition}:{jobs[-1]}", "--kill-on-invalid-dep=yes"]
        try:
            job = scheduler.submit(folder / f"{stage.name}.sbatch", () if stage.is_array else stage.runs[0], *options)
        except KrakenError:
            for submitted in jobs:
                scheduler.call("scancel", submitted)
            raise
        jobs.append(job)
        previous = stage
        content = f"{len(stage.runs)} runs" if stage.is_array else "1 run" if stage.name == TRAIN else "1 job"
        console.print(f"submitted {stage.name} as job {job} ({content}), {folder / stage.name}.sbatch", markup=False)
        for index, training in enumerate(trainings if stage.name == TRAIN else ()):
            run_dir = Path(training.config.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            number = f"{job}_{index}" if stage.is_array else job
            EventLog(run_dir / EVENTS_FILE).write("submitted", job=number, submission=str(folder))
    console.print(f"  squeue --jobs {','.join(jobs)}", markup=False)
    for training in trainings:
        console.print(f"  python -m kraken_train.status {shlex.quote(training.config.run_dir)}", markup=False)
    console.print(f"  tail -F {shlex.quote(str(folder))}/*.out", markup=False)


if __name__ == "__main__":
    main()
