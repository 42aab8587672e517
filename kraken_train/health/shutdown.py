"""What asks a run to save and end early: SIGTERM, SIGUSR1, or the end of the launcher that started it.

The `deepspeed` command does not pass SIGTERM on: it dies and leaves `deepspeed.launcher.launch` and the ranks behind.
So a rank looks at its launchers itself; on other machines these are remote shells, up to the daemon that started them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType

import psutil

INTERRUPTED_EXIT_CODE = 128 + signal.SIGTERM
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm sends one or both, depending on the job's --signal
LAUNCHER_SECONDS = 300.0  # for a run to finish its step, save and end once its launcher has

OURS = ("launch.node", "launch.deepspeed")
RUNNERS = (*OURS, "deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
LOCAL_LAUNCHER = "deepspeed.launcher.launch"  # which a runner starts on each machine
LAUNCHERS = (*RUNNERS, LOCAL_LAUNCHER, "torchrun", "torch.distributed.run", "torch.distributed.launch")
STARTED_BY_NODE = "started_by=launch.node"  # an option (-X) of its Python, which that ignores
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish")
REMOTE_SHELL_DAEMONS = ("sshd", "sshd-session")
PYTHON_OPTIONS_WITH_VALUE = ("-W", "-X")


class Interrupted(Exception):
    """The run has ended early and in good order, because it was asked to. The message is the reason."""


class StopRequest:
    """Whether, and why, this rank was asked to save and end. The first reason is kept."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for it, from any thread."""
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Make STOP_SIGNALS a request, in place of death. Main thread only (ValueError elsewhere).

        Once there is a request they are ignored for good: the process is about to end, and a second signal must not
        cut off what is left to be written.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            self.request(signal.Signals(number).name)

        previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if self.requested else handler)


class Launchers:
    """The launchers among the ancestors of this process: the nearest ones, up to the first that is none.

    A shell, nohup or srun is none, so a run outlives the session that started it; but a local launcher that a remote
    shell has started is watched with that shell.
    """

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        self.orphaned = False
        parent = parent_of(psutil.Process())
        while parent is not None and (name := launcher_name(command := command_of(parent))) is not None:
            self.processes.append(parent)
            parent = parent_of(parent)
            if name == LOCAL_LAUNCHER and (parent is None or launcher_name(command_of(parent)) not in RUNNERS):
                # A runner may have died before this process could look. Only on the machines of a cluster, which are
                # told their number, is a local launcher started by something else.
                told_its_number = any(argument.startswith("--node_rank") for argument in command)
                self.orphaned = not told_its_number or STARTED_BY_NODE in command
                self.processes += remote_shell(parent)
                break

    def __bool__(self) -> bool:
        return bool(self.processes)

    def have_ended(self) -> bool:
        """Whether one of them is gone."""
        return self.orphaned or any(has_ended(process) for process in self.processes)


def remote_shell(process: psutil.Process | None) -> list[psutil.Process]:
    """The shells from `process` upwards and the daemon that has started them for another machine; none without it."""
    found = []
    while process is not None:
        found.append(process)
        if name_of(process) in REMOTE_SHELL_DAEMONS:
            return found
        if name_of(process) not in SHELLS:
            break
        process = parent_of(process)
    return []


def parent_of(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def command_of(process: psutil.Process) -> list[str]:
    """Its arguments; none if it has ended or they are not ours to see."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def name_of(process: psutil.Process) -> str:
    """The name of its program; empty if it has ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def launcher_name(command: list[str]) -> str | None:
    """Which of LAUNCHERS a process with these arguments runs: the script or module that its Python was given."""
    if not command or not PurePath(command[0]).name.startswith("python"):
        return None
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in PYTHON_OPTIONS_WITH_VALUE:
            next(arguments, None)
        elif not argument.startswith("-"):
            name = PurePath(argument).name
            return name if name in LAUNCHERS else None
    return None


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, its number possibly given to another one, or dead and only not yet collected."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
