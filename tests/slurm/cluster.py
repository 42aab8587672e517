"""Helpers for tests on a real Slurm: submit jobs, read their state, and kill ranks and nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from helpers import run_module, wait_until

Result = TypeVar("Result")

STEP_MODULE = "kraken_train.train"
# Inserted at the end of kraken_train/train.py in a submission's code: steps of the tiny model take milliseconds, and
# these take as long as the file `seconds` says, so that a test can act in between.
SLOW_STEPS = """
import resource
import signal
import time
from pathlib import Path

from kraken_train.training.trainer import Trainer


def slow_step(trainer, step=Trainer.train_step):
    started, seconds = time.monotonic(), Path(__file__).with_name("seconds")
    while time.monotonic() < started + float(seconds.read_text()) and not trainer.stop.requested:
        time.sleep(0.1)
    if Path(__file__).with_name("disk-is-full").exists():  # room for log lines, but not for a checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    step(trainer)


Trainer.train_step = slow_step


"""


def has_slurm() -> bool:
    """Whether a Slurm controller answers."""
    if shutil.which("sbatch") is None:
        return False
    return subprocess.run(["scontrol", "ping"], capture_output=True, check=False, timeout=300).returncode == 0


needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(not has_slurm(), reason="no Slurm controller answers (see make test-slurm)"),
]


def call(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def submit(*arguments: str) -> list[str]:
    """Run `launch.submit`; the ids of the jobs."""
    result = run_module("launch.submit", "gpus_per_node=0", "ranks_per_node=2", *arguments)
    assert result.returncode == 0, result.stderr
    return re.findall(r"as job (\d+)", result.stdout)


def submit_slow(run: Path, seconds: float, *arguments: str) -> list[str]:
    """Like `submit`, with training steps that take so many seconds, by a change in the copy of the code."""
    jobs = submit('sbatch_options=["--hold"]', *arguments)
    path = newest(run) / "code" / "kraken_train" / "train.py"
    text, end = path.read_text(), 'if __name__ == "__main__":'
    assert end in text
    path.write_text(text.replace(end, SLOW_STEPS + end))
    set_step_seconds(run, seconds)
    for job in jobs:
        call("scontrol", "release", job)
    return jobs


def set_step_seconds(run: Path, seconds: float) -> None:
    """Change how long steps take on all ranks, including the current step."""
    file = newest(run) / "code" / "kraken_train" / "seconds"
    file.with_suffix(".tmp").write_text(str(seconds))
    file.with_suffix(".tmp").rename(file)


def fill_disk(run: Path) -> None:
    """Let all ranks fail to write a checkpoint from the next step on."""
    (newest(run) / "code" / "kraken_train" / "disk-is-full").touch()


def newest(run: Path) -> Path:
    """The folder of the newest submission of a run."""
    return max((run / "submissions").iterdir())


def output(run: Path) -> str:
    """The output of all jobs of the newest submission."""
    return "".join(path.read_text() for path in sorted(newest(run).glob("*.out")))


def show(job: str) -> dict[str, str]:
    """The fields that `scontrol show job` prints."""
    return dict(re.findall(r"(\S+?)=(\S*)", call("scontrol", "show", "job", job)))


def state(job: str) -> str:
    return show(job)["JobState"]


def wait_for(description: str, condition: Callable[[], Result]) -> Result:
    """The first result of `condition` that is true."""
    return wait_until(condition, lambda: f"timeout while waiting for {description}\n{call('squeue')}")


def wait_for_end(job: str) -> str:
    """The final state of a job. A requeued job is pending for a while, which is not final."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    return wait_for(f"the end of job {job}", lambda: (now := state(job)) in final and now)


def restarts(job: str) -> int:
    return int(show(job)["Restarts"])


def processes(run: Path) -> list[psutil.Process]:
    """All processes of a run, on all nodes: the nodes are slurmd daemons of this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if any(str(run) in argument for argument in command) and process.pid != os.getpid():
            found.append(process)
    return found


def ranks(run: Path) -> list[psutil.Process]:
    """The processes of a run that train."""
    found = []
    for process in processes(run):
        try:
            command, parent = process.cmdline(), process.parent()
        except psutil.Error:
            continue
        if STEP_MODULE in command and parent is not None and parent.name() == "slurmstepd":
            found.append(process)
    return found


def wait_for_no_processes(run: Path) -> None:
    wait_for(f"the end of all processes of {run}", lambda: not processes(run))


def slurm_folder() -> Path:
    """The folder of slurm.conf, with the subfolders pids and log."""
    return Path(os.environ["SLURM_CONF"]).parent


@contextmanager
def dead_node(name: str) -> Iterator[None]:
    """A context in which the slurmd of this node is dead, as if the node had lost its power."""
    pid_file = slurm_folder() / "pids" / f"{name}.pid"
    process = psutil.Process(int(pid_file.read_text()))
    command, environment = process.cmdline(), process.environ()
    process.kill()
    process.wait()
    try:
        yield
    finally:
        with (slurm_folder() / "log" / f"{name}.out").open("a") as log:
            restarted = subprocess.Popen(
                command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        pid_file.write_text(f"{restarted.pid}\n")
        wait_for(f"node {name}", lambda: "IDLE" in call("scontrol", "show", "node", name))
