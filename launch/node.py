"""The ranks of one host: starts DeepSpeed's launcher, watches its ranks, and ends every process that they started.

`launch.deepspeed` starts `python -m launch.node` on each host, through ssh if it is another machine, and writes to its
standard input: first one line with a Plan as JSON (no shell reads it, so arguments arrive unchanged), then KEEP_ALIVE
at intervals, STOP (the ranks save a checkpoint and end) and KILL. The end of the input, or CONNECTION_TIMEOUT seconds
without input, means that the connection was lost, and has the effect of STOP.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from kraken_train.common.locales import use_unicode
from kraken_train.health.shutdown import (
    INTERRUPTED_EXIT_CODE,
    LAUNCHER_SECONDS,
    STOP_SIGNALS,
    has_ended,
)
from kraken_train.run.events import now
from kraken_train.run.rank_errors import RankError, error_file, read_errors, record_error
from launch.plan import Plan

STOP, KILL, KEEP_ALIVE = b"stop\n", b"kill\n", b"\n"
CONNECTION_TIMEOUT = 120.0  # seconds
POLL_SECONDS = 0.1
LEFTOVER_SECONDS = 30.0  # how long processes that ranks started may run on after the ranks have ended
PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl.h
REPORTED_EXIT_CODES = (0, 1, 2, INTERRUPTED_EXIT_CODE)  # a rank with one of these has printed the reason itself


@dataclass
class RankProcess:
    number: int
    process: psutil.Process
    stop_sent: bool = False  # whether it was sent SIGTERM
    ended: bool = False
    exit_code: int | None = None  # negative: the signal that killed it; None if it is not known
    pidfd: int | None = None  # a file descriptor that becomes readable when the process ends

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.process.pid} on {socket.gethostname()})"

    def poll(self) -> None:
        """Update `ended` and `exit_code`."""
        if not self.ended and has_ended(self.process):
            self.exit_code = exit_code_of_zombie(self.process.pid)
            self.ended = True


def open_pidfd(process: psutil.Process) -> int | None:
    """A pidfd of the process; None if it has ended, or if the kernel has no pidfds (before Linux 5.3)."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        return None


class Node:
    """The ranks of a plan, from their start to the end of the last process that they started."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks: dict[int, RankProcess] = {}  # process id -> rank
        self.ended_ranks: list[RankProcess] = []  # in the order in which they ended
        self.stop_reason: str | None = None  # why the ranks must save and end; None if they need not
        self.launcher_terminated = False
        self.deadline = float("inf")  # the time when ranks that still run are killed
        self.last_input, self.connected = time.monotonic(), True
        become_subreaper()

    def run(self) -> int:
        """Start the ranks and wait for their end.

        The exit code is that of the rank that failed first, as far as DeepSpeed's launcher reports it.
        """
        for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self.on_signal)
        # If the whole job is sent SIGUSR1, it must not kill DeepSpeed's launcher. A child inherits an ignored signal.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.launcher = subprocess.Popen(
            self.plan.command(), stdin=subprocess.DEVNULL, env=os.environ | self.plan.environment
        )
        signal.signal(signal.SIGUSR1, self.on_signal)
        while self.launcher.poll() is None:
            self.read_input()
            self.update_ranks()
            self.forward_stop()
        self.update_ranks()
        code = self.launcher.returncode
        if code not in (0, INTERRUPTED_EXIT_CODE) and self.stop_reason is None:
            self.report_silent_end(code)
        self.end_leftovers()
        return code if code in REPORTED_EXIT_CODES else 1

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request_stop(signal.Signals(number).name)

    def request_stop(self, reason: str) -> None:
        """Let the ranks save and end within LAUNCHER_SECONDS. The first reason is kept."""
        if self.stop_reason is None:
            self.stop_reason, self.deadline = reason, time.monotonic() + LAUNCHER_SECONDS

    def read_input(self) -> None:
        """Wait up to POLL_SECONDS for a message of the launcher or for the end of a rank, and obey the message."""
        # The end of a rank must wake this up at once: a moment later DeepSpeed's launcher ends the other ranks, and it
        # can no longer be seen which one was first.
        inputs = [sys.stdin.fileno()] if self.connected else []
        pidfds = [rank.pidfd for rank in self.ranks.values() if not rank.ended and rank.pidfd is not None]
        ready = select.select([*inputs, *pidfds], [], [], POLL_SECONDS)[0]
        if not self.connected:
            return
        if inputs[0] in ready:
            message = os.read(sys.stdin.fileno(), 4096)
            self.last_input, self.connected = time.monotonic(), bool(message)
            if STOP in message or not message:
                self.request_stop("the launcher sent STOP" if message else "the launcher has ended")
            if KILL in message:
                self.request_stop("the launcher sent KILL")
                self.deadline = 0.0
        elif time.monotonic() - self.last_input > CONNECTION_TIMEOUT:
            self.connected = False
            self.request_stop(f"the launcher sent nothing for {CONNECTION_TIMEOUT:.0f} s")

    def update_ranks(self) -> None:
        """Find the ranks that have started and those that have ended."""
        if len(self.ranks) < len(self.plan.slots) and self.launcher.poll() is None:
            for process in children_of(self.launcher.pid):
                if process.pid not in self.ranks and (number := rank_of(process)) is not None:
                    self.ranks[process.pid] = RankProcess(number, process, pidfd=open_pidfd(process))
        for rank in self.ranks.values():
            if not rank.ended:
                rank.poll()
                if rank.ended:
                    self.ended_ranks.append(rank)

    def forward_stop(self) -> None:
        """Once a stop is requested: send each rank SIGTERM once; after the deadline, kill every process."""
        if self.stop_reason is None:
            return
        for rank in self.ranks.values():
            if not rank.stop_sent and not rank.ended:
                rank.stop_sent = True
                send_signal(rank.process, signal.SIGTERM)
        if len(self.ranks) < len(self.plan.slots) and not self.launcher_terminated:
            self.launcher.terminate()  # it has not started all ranks yet and must not start more
            self.launcher_terminated = True
        if time.monotonic() > self.deadline:
            late = [str(rank) for rank in self.ranks.values() if not rank.ended]
            if late and self.deadline > 0:
                print_error(f"{', '.join(late)} did not end within {LAUNCHER_SECONDS:.0f} s after SIGTERM; killing it")
            for process in psutil.Process().children(recursive=True):
                send_signal(process, signal.SIGKILL)

    def report_silent_end(self, launcher_code: int) -> None:
        """Print, and record in the run's folder, which rank ended without a message: one that a signal killed."""
        if launcher_code < 0:
            print_error(f"DeepSpeed's launcher on {socket.gethostname()} {describe_end(launcher_code)}")
            return
        # DeepSpeed's launcher ends with the exit code of the rank that failed first, or with 256 minus its signal.
        code = launcher_code - 256 if launcher_code > 192 else launcher_code
        if code in REPORTED_EXIT_CODES:
            return
        if len(self.ranks) < len(self.plan.slots):
            print_error(f"a rank on {socket.gethostname()}: {describe_end(code)} right after its start")
            return
        first = next((rank for rank in self.ended_ranks if rank.exit_code in (None, code)), None)
        if first is None:
            return
        start = self.plan.newest_start()
        if start is not None and any(str(first) in error.message for error in read_errors(start)):
            return  # the watchdog of another rank has killed it, and said why
        print_error(f"{first}: {describe_end(code)}")
        if start is not None and not error_file(start, first.number).exists():
            pid, host = first.process.pid, socket.gethostname()
            record_error(start, RankError(now(), first.number, host, pid, describe_end(code), None, False, True))

    def end_leftovers(self) -> None:
        """Wait for processes that still run, then send them SIGTERM, then SIGKILL.

        Ranks among them have lost DeepSpeed's launcher and are saving, so they get as long as after a STOP.
        """
        ranks_left = any(not rank.ended for rank in self.ranks.values())
        for number, seconds in (
            (None, LAUNCHER_SECONDS if ranks_left else LEFTOVER_SECONDS),
            (signal.SIGTERM, 10.0),
            (signal.SIGKILL, 10.0),
        ):
            processes = psutil.Process().children(recursive=True)
            if not processes:
                return
            if number is not None:
                for process in processes:
                    send_signal(process, number)
            if self.deadline > 0:
                psutil.wait_procs(processes, timeout=seconds)


def describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def rank_of(process: psutil.Process) -> int | None:
    """The variable RANK in the environment of a process; None if it has none (yet)."""
    try:
        number = process.environ().get("RANK")
    except (psutil.Error, OSError):
        return None
    return None if number is None else int(number)


def exit_code_of_zombie(pid: int) -> int | None:
    """The exit code of a process that has ended and that its parent has not waited for; None if it is not one."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[49])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status)


def send_signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):  # the process has ended
        process.send_signal(number)


def become_subreaper() -> None:
    """Make this process the parent of descendants whose own parent ends, so that it can find and end them all."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def print_error(message: str) -> None:
    with suppress(OSError):  # standard error is closed
        print(f"error: {message}", file=sys.stderr, flush=True)


def read_plan() -> Plan:
    line = b""
    while not line.endswith(b"\n"):  # byte by byte, because `read_input` reads what follows
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit("error: launch.node is started by launch.deepspeed; run `python -m launch.deepspeed` instead")
        line += byte
    return Plan(**json.loads(line))


def main() -> None:
    use_unicode()
    plan = read_plan()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    sys.exit(Node(plan).run())


if __name__ == "__main__":
    main()
