"""Requests to save and end a run early: SIGTERM, SIGUSR1, or the end of the launcher that started it.

The `deepspeed` command does not forward SIGTERM: it dies and leaves `deepspeed.launcher.launch` and the ranks running.
So each rank watches its launchers itself. On other machines these include the remote shells, up to the SSH daemon that
started them.
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
LAUNCHER_SECONDS = 300.0  # for a run to finish its step, save and end after its launcher has ended

PROJECT_LAUNCHERS = ("launch.node", "launch.deepspeed")
RUNNERS = (*PROJECT_LAUNCHERS, "deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
LOCAL_LAUNCHER = "deepspeed.launcher.launch"  # started by a runner on each machine
LAUNCHERS = (*RUNNERS, LOCAL_LAUNCHER, "torchrun", "torch.distributed.run", "torch.distributed.launch")
STARTED_BY_NODE = "started_by=launch.node"  # a value of Python's option -X, which ignores it
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish")
REMOTE_SHELL_DAEMONS = ("sshd", "sshd-session")
PYTHON_OPTIONS_WITH_VALUE = ("-W", "-X")


class Interrupted(Exception):
    """The run was asked to end early, has saved and ends normally. The message is the reason."""


class StopRequest:
    """Whether, and why, this rank was asked to save and end. The first reason is kept."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Request it; may be called from any thread."""
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """A context in which STOP_SIGNALS become a request and do not kill the process.

        After a request they stay ignored: the process is about to end, and a second signal must not interrupt its last
        writes. Raises ValueError outside the main thread.
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
    """The launchers among the ancestors of this process, from its parent up to the first that is not a launcher.

    A shell, nohup or srun is not a launcher, so a run outlives the session that started it. But a local launcher that
    was started by a remote shell is watched together with that shell.
    """

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        self.orphaned = False
        parent = parent_of(psutil.Process())
        while parent is not None and (name := launcher_name(command := command_of(parent))) is not None:
            self.processes.append(parent)
            parent = parent_of(parent)
            if name == LOCAL_LAUNCHER and (parent is None or launcher_name(command_of(parent)) not in RUNNERS):
                # The runner may have died before this process looked for it. Only on the machines of a cluster,
                # where it gets a node rank, is a local launcher started by something else.
                has_node_rank = any(argument.startswith("--node_rank") for argument in command)
                self.orphaned = not has_node_rank or STARTED_BY_NODE in command
                self.processes += remote_shell(parent)
                break

    def __bool__(self) -> bool:
        return bool(self.processes)

    def have_ended(self) -> bool:
        """Whether at least one of them has ended, or the runner had ended before this process started."""
        return self.orphaned or any(has_ended(process) for process in self.processes)


def remote_shell(process: psutil.Process | None) -> list[psutil.Process]:
    """The shells from `process` upwards and the SSH daemon that started them; empty if there is no such daemon."""
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
    """Its arguments; empty if it has ended or this user may not read them."""
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
    """Which of LAUNCHERS a process with these arguments runs as the script or module of its Python, if any."""
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
    """Whether it has exited: its process ID is free or used by another process, or it is a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
