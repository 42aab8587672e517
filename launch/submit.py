"""Hands training to Slurm: python -m launch.submit nodes=4 time=24:00:00 -- experiment=NAME data_dir=DATA run_dir=RUN

What is before `--` are settings of this command (conf/submit.yaml), what is after it those of `kraken_train.train`. A
chain of jobs, each beginning when the one before has succeeded, names its stages:

    python -m launch.submit nodes=4 -- prepare source=TEXT output_dir=DATA -- train run_dir=RUN ... -- evaluate

Everything is checked first, as the commands themselves and Slurm would. Then each job gets a script in
RUN/submissions/0001, made of those in launch/slurm, beside a copy of the code; a requeued job runs that again. Sweeps
(`optim.lr=1e-3,2e-3`) become a job array: independent jobs of one submission that Slurm starts, requeues and ends one
by one. (Hydra's launcher plugin for Slurm would pickle a function and wait for its result, and knows nothing of
requeueing a training that saves itself.)
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from kraken_train.common.cli import CONF_DIR, exit_with_message, run_entry
from kraken_train.common.errors import CheckpointError, ConfigError, KrakenError
from kraken_train.common.free_text import FilePath, Name
from kraken_train.common.settings import to_yaml
from kraken_train.common.validation import require_at_least, require_positive
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.planning.interconnect import Interconnect
from kraken_train.run.events import EventLog, read_events
from kraken_train.run.folder import SUBMISSIONS
from kraken_train.run.layout import EVENTS_FILE
from launch.export_and_evaluate import value_of
from launch.slurm import scheduler
from launch.slurm.script import Settings, fill_in
from launch.slurm.snapshot import write_snapshot
from launch.stages import EVALUATE, PREPARE, TRAIN, Stage, Training, check_stages, split_stages

# From a job's start to the request to save: starting takes a minute or two, and Slurm may be 60 s early.
LEAST_SECONDS = 240
NEAR, FAR = "h100_nvswitch", "ethernet_100g"  # of conf/interconnect: within a node, and between nodes

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class JobConfig:
    """The resources of a job on one node, see conf/submit.yaml."""

    time: str | int  # a bare number is of minutes
    cpus_per_task: int | None
    mem: str | None
    partition: Name | None

    def validate(self) -> None:
        scheduler.seconds(str(self.time))
        if self.cpus_per_task is not None:
            require_positive("cpus_per_task", self.cpus_per_task)


@dataclass(frozen=True)
class SubmitConfig:
    """See conf/submit.yaml."""

    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    cpus_per_task: int | None
    mem: str | None
    time: str | int  # a bare number is of minutes
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
        whole = scheduler.seconds(str(self.time))
        left = whole - self.signal_seconds
        if left >= LEAST_SECONDS:
            return
        shorter = f", or signal_seconds={whole - LEAST_SECONDS} at most" if whole > LEAST_SECONDS else ""
        raise ConfigError(
            f"time={self.time} is {whole} s, and signal_seconds={self.signal_seconds} before its end the job is told "
            f"to save: that leaves {max(left, 0)} s to start and to train, and it needs {LEAST_SECONDS} s; use "
            f"time={-(-(self.signal_seconds + LEAST_SECONDS) // 60)} (minutes) or longer{shorter}"
        )


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    sys.argv[1:], stages = arguments[:split], arguments[split:]
    run_entry(lambda config: submit(config, stages), SubmitConfig, "submit")


def submit(config: SubmitConfig, arguments: Sequence[str]) -> None:
    """Check and submit the stages. Raises KrakenError, with nothing submitted, for what cannot run."""
    named = split_stages(arguments)
    config = with_resources(config, {name for name, _ in named})
    stages, trainings = check_stages(named, config.nodes * (config.ranks_per_node or 1))
    if trainings:
        warn_of_network(trainings[0].config, trainings[0].model, config.ranks_per_node or 1)
    folder = next_submission(stages)
    options = {stage.name: job_options(config, stage, folder) for stage in stages}
    scripts = {
        stage.name: fill_in(stage.name, options[stage.name], script_settings(config, stage, folder)) for stage in stages
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
    hand_over(stages, trainings, folder)


# ---------------------------------------------------------------------------------------------------------------
# What the jobs need
# ---------------------------------------------------------------------------------------------------------------


def with_resources(config: SubmitConfig, names: set[str]) -> SubmitConfig:
    """With the GPUs and ranks per node that were left open, as the partition has them. Raises ConfigError."""
    gpus = config.gpus_per_node
    try:
        partitions = scheduler.partitions()
    except scheduler.SlurmError:
        if not config.dry_run:
            raise
        console.print("note: this machine has no Slurm, so nothing is compared with what a cluster has", style="yellow")
    else:
        partition = scheduler.choose_partition(partitions, config.partition)
        if gpus is None:
            gpus = partition.gpus_per_node
        scheduler.require_allowed(partition, config.account, config.qos)
        if TRAIN in names:
            scheduler.require_room(partition, config.nodes, gpus, str(config.time))
        for name, job in ((PREPARE, config.prepare), (EVALUATE, config.evaluate)):
            if name in names:
                place = scheduler.choose_partition(partitions, job.partition or config.partition)
                scheduler.require_allowed(place, config.account, config.qos)
                scheduler.require_room(place, 1, 0, str(job.time))
    gpus = gpus or 0
    return dataclasses.replace(config, gpus_per_node=gpus, ranks_per_node=config.ranks_per_node or gpus or 1)


def job_options(config: SubmitConfig, stage: Stage, folder: Path) -> dict[str, str | None]:
    """Options of sbatch; None for those that the shipped script has and this job has not."""
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


def warn_of_network(config: TrainConfig, model: ModelConfig, ranks_per_node: int) -> None:
    """Say what it costs where the ranks of a copy of the model are not all in one node."""
    size = config.parallel.sub_layer_parallel_size
    if ranks_per_node % size == 0:
        return
    all_reduces = sum(one.count for one in model.all_reduces)  # per micro-batch, forward and backward
    bytes_per_number = 4 if config.precision == "fp32" else 2  # auto: nodes of GPUs
    message = config.micro_batch_size * model.context_length * model.hidden_size * bytes_per_number
    copies_in_batch = config.global_batch_size // config.micro_batch_size
    near, far = (all_reduces * read_interconnect(name).all_reduce_seconds(message, size) for name in (NEAR, FAR))
    console.print(
        f"warning: parallel.sub_layer_parallel_size={size} does not divide ranks_per_node={ranks_per_node}, so copies "
        f"of the model exchange over the network: per micro-batch {all_reduces} all-reduces of "
        f"{message / 1e6:,.3g} MB, {1e3 * far:,.3g} ms on {FAR} and {1e3 * near:,.3g} ms on {NEAR}; "
        f"{all_reduces * message * copies_in_batch / 1e9:,.3g} GB per step over all "
        f"{copies_in_batch} micro-batches. Ranks of a copy belong into one node",
        style="yellow",
        markup=False,
    )


def read_interconnect(name: str) -> Interconnect:
    return Interconnect(**yaml.safe_load((CONF_DIR / "interconnect" / f"{name}.yaml").read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------------
# Writing and submitting
# ---------------------------------------------------------------------------------------------------------------


def next_submission(stages: Sequence[Stage]) -> Path:
    """A folder that does not exist yet: RUN/submissions/0001, of a preparation alone DATA.submissions/0001."""
    arguments = stages[-1].runs[0]
    run_dir = value_of("run_dir", arguments)
    if run_dir is None:
        parent = Path(f"{Path(value_of('output_dir', arguments) or '.').expanduser().absolute()}.{SUBMISSIONS}")
    else:
        run = Path(run_dir).expanduser().absolute()
        parent = (run.parent if stages[-1].is_array else run) / SUBMISSIONS
    taken = [int(entry.name) for entry in parent.glob("*") if entry.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:04d}"


def require_idle(run_dir: Path) -> None:
    """Raises ConfigError if an earlier job of the run still waits or runs."""
    jobs = [event["job"] for event in read_events(run_dir / EVENTS_FILE) if event["event"] == "submitted"]
    if jobs and scheduler.is_active(jobs[-1]):
        raise ConfigError(
            f"run_dir={run_dir} has job {jobs[-1]}, which still waits or runs; it continues by itself, or end it first "
            f"with scancel {jobs[-1]}"
        )


def write_submission(config: SubmitConfig, stages: Sequence[Stage], scripts: dict[str, str], folder: Path) -> None:
    """The scripts, their arguments, these settings and the code. Raises CheckpointError if they cannot be written."""
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


def hand_over(stages: Sequence[Stage], trainings: Sequence[Training], folder: Path) -> None:
    """Submit the scripts, each to begin when the one before it has succeeded, and tell how to follow them."""
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
        what = f"{len(stage.runs)} runs" if stage.is_array else "1 run" if stage.name == TRAIN else "1 job"
        console.print(f"submitted {stage.name} as job {job} ({what}), {folder / stage.name}.sbatch", markup=False)
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
    try:
        main()
    except OSError as error:
        exit_with_message(
            f"{error.filename2 or error.filename or os.getcwd()} cannot be read or written: {error.strerror}"
        )
