"""A real Slurm, small enough to break: jobs on it, what becomes of them, and whom to kill."""

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
# Steps of the tiny model take milliseconds; these last long enough for something to happen between them.
SLOW_STEPS = """
import resource
import signal


def slow_step(trainer, step=Trainer.train_step):
    begun, seconds = time.monotonic(), Path(__file__).with_name("seconds")
    while time.monotonic() < begun + float(seconds.read_text()) and not trainer.stop.requested:
        time.sleep(0.1)
    if Path(__file__).with_name("disk-is-full").exists():  # no room for a checkpoint, but for words
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    step(trainer)


Trainer.train_step = slow_step


"""


def answers() -> bool:
    """Whether there is a controller."""
    if shutil.which("sbatch") is None:
        return False
    return subprocess.run(["scontrol", "ping"], capture_output=True, check=False, timeout=300).returncode == 0


needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(not answers(), reason="no Slurm answers here (see make test-slurm)"),
]


def call(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def submit(*arguments: str) -> list[str]:
    """The numbers of the jobs that `launch.submit` makes of this."""
    result = run_module("launch.submit", "gpus_per_node=0", "ranks_per_node=2", *arguments)
    assert result.returncode == 0, result.stderr
    return re.findall(r"as job (\d+)", result.stdout)


def submit_slow(run: Path, seconds: float, *arguments: str) -> list[str]:
    """Jobs whose training steps take longer, by a change in the copy of the code that they run; their numbers."""
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
    """Of all ranks, from now on: also of the step that is under way."""
    file = newest(run) / "code" / "kraken_train" / "seconds"
    file.with_suffix(".tmp").write_text(str(seconds))
    file.with_suffix(".tmp").rename(file)


def fill_disk(run: Path) -> None:
    (newest(run) / "code" / "kraken_train" / "disk-is-full").touch()


def newest(run: Path) -> Path:
    """The folder of a run's last submission."""
    return max((run / "submissions").iterdir())


def output(run: Path) -> str:
    """All that the jobs of the last submission have printed."""
    return "".join(path.read_text() for path in sorted(newest(run).glob("*.out")))


def show(job: str) -> dict[str, str]:
    """What `scontrol show job` tells."""
    return dict(re.findall(r"(\S+?)=(\S*)", call("scontrol", "show", "job", job)))


def state(job: str) -> str:
    return show(job)["JobState"]


def wait_for(what: str, condition: Callable[[], Result]) -> Result:
    """The first result of `condition` that is true."""
    return wait_until(condition, lambda: f"{what} has not come\n{call('squeue')}")


def wait_for_end(job: str) -> str:
    """The state in which a job stays; a requeued one is pending for a while."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    return wait_for(f"the end of job {job}", lambda: (now := state(job)) in ends and now)


def restarts(job: str) -> int:
    return int(show(job)["Restarts"])


def processes(run: Path) -> list[psutil.Process]:
    """All that work on this run, on any pretend node: their processes are children of this machine's."""
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
    """Those of them that train."""
    found = []
    for process in processes(run):
        try:
            command, parent = process.cmdline(), process.parent()
        except psutil.Error:
            continue
        if STEP_MODULE in command and parent is not None and parent.name() == "slurmstepd":
            found.append(process)
    return found


def require_nothing_left(run: Path) -> None:
    wait_for(f"the end of all processes of {run}", lambda: not processes(run))


def pretend_folder() -> Path:
    return Path(os.environ["SLURM_CONF"]).parent


@contextmanager
def dead_node(name: str) -> Iterator[None]:
    """A context in which this pretend node has lost its power."""
    pid_file = pretend_folder() / "pids" / f"{name}.pid"
    process = psutil.Process(int(pid_file.read_text()))
    command, environment = process.cmdline(), process.environ()
    process.kill()
    process.wait()
    try:
        yield
    finally:
        with (pretend_folder() / "log" / f"{name}.out").open("a") as log:
            again = subprocess.Popen(
                command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        pid_file.write_text(f"{again.pid}\n")
        wait_for(f"node {name}", lambda: "IDLE" in call("scontrol", "show", "node", name))
