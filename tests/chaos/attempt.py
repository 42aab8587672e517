"""One start of a command: its processes, its exit code, what it printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from forked import REPOSITORY, run_forked
from helpers import PATIENCE

from chaos.plan import VARIABLE, Plan

OUTPUT = "output.log"  # in the control folder: what the command has printed
TESTS = REPOSITORY / "tests"
OF_A_RANK = re.compile(r"error: rank \d+ \(process \d+ on \S+\): ")
OF_A_JOB = " (a restart would not help, so the job ends)"  # after the message of a rank that Slurm has started
FOLLOWS = ("see its message", "a rank failed, see above")  # in messages of ranks and jobs that end because of a rank
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Attempt:
    """How a start has ended."""

    code: int  # negative: the signal that killed the command itself
    output: str
    left: tuple[str, ...] = ()  # command lines of processes that did not end

    @property
    def errors(self) -> list[str]:
        """The different error messages, without those of ranks that only follow another one."""
        lines = [line.strip() for line in self.output.splitlines()]
        errors = [line for line in lines if line.startswith("error: ") and not any(part in line for part in FOLLOWS)]
        # The launcher repeats the first message last, with the rank that it is of.
        bare = {OF_A_RANK.sub("error: ", line).removesuffix(OF_A_JOB): line for line in reversed(errors)}
        return list(bare.values())[::-1]

    @property
    def has_traceback(self) -> bool:
        return TRACEBACK in self.output


class Start:
    """A command that runs in processes of its own."""

    def __init__(self, command: list[str], plan: Plan, folder: Path, answer: Path | None) -> None:
        """`answer` takes the standard output; None: it is kept with the error messages."""
        self.plan = plan
        self.log = Path(plan.control, OUTPUT)
        environment = command_environment(plan)
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS / "chaos" / "inject"), environment["PYTHONPATH"]])
        with ExitStack() as files:  # not pipes, which processes left over keep open
            errors = output = files.enter_context(self.log.open("w", encoding="utf-8"))
            if answer is not None:
                answer.parent.mkdir(exist_ok=True)
                output = files.enter_context(answer.open("w", encoding="utf-8"))
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> Attempt:
        """Wait until the command and all that it has started have ended; kill what hangs."""
        deadline = time.monotonic() + PATIENCE
        hangs = not wait_until(lambda: not self.is_running() and not processes_of(self.plan.case), deadline)
        left = processes_of(self.plan.case) if hangs else []
        described = tuple(describe(process) for process in left)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        return Attempt(self.process.wait(), self.log.read_text(encoding="utf-8", errors="replace"), described)


class ForkedStart:
    """A Python command in one process, as a fork of a process that has imported PyTorch: seconds faster."""

    def __init__(self, command: list[str], plan: Plan, folder: Path, answer: Path | None) -> None:
        assert command[1] == "-m", "only modules run in forks"
        self.plan, self.answer = plan, answer
        self.thread = threading.Thread(target=self.run, args=(["-m", "chaos.injected", *command[2:]],))
        self.thread.start()

    def run(self, program: list[str]) -> None:
        (result,) = run_forked([program], [command_environment(self.plan)])
        output = result.stderr
        if self.answer is None:
            output = result.stdout + output
        else:
            self.answer.parent.mkdir(exist_ok=True)
            self.answer.write_text(result.stdout, encoding="utf-8")
        self.result = Attempt(result.returncode, output)
        Path(self.plan.control, OUTPUT).write_text(self.result.output, encoding="utf-8")

    def is_running(self) -> bool:
        return self.thread.is_alive()

    def wait(self) -> Attempt:
        self.thread.join()
        return self.result


Starter = Callable[[list[str], Plan, Path, Path | None], Start | ForkedStart]


def command_environment(plan: Plan) -> dict[str, str]:
    """The environment of a command that runs on the CPU with its fault."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return environment | {
        VARIABLE: plan.to_json(),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "WANDB_SILENT": "true",
    }


def processes_of(case: str) -> list[psutil.Process]:
    """The processes of a case that have not ended, known by their environment."""
    mark = Plan.mark(case)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.environ().get(VARIABLE, ""):
                found.append(process)
    return found


def describe(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline())[:200]}"
    return f"process {process.pid}"


def wait_until(condition: Callable[[], object], deadline: float | None = None) -> bool:
    """Wait for the condition; False if it has not come true at the deadline, in seconds of time.monotonic."""
    deadline = time.monotonic() + PATIENCE if deadline is None else deadline
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def resume_process(pid: int) -> None:
    """Let a stopped process go on, once it has stopped."""

    def has_stopped() -> bool:
        try:
            return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return True

    wait_until(has_stopped)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
