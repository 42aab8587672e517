"""One machine's part of a launch: starts DeepSpeed's launcher, watches its ranks, and leaves nothing behind.

`launch.deepspeed` starts `python -m launch.node` on each machine, through ssh where it is another one, and talks to it
over its input: first a line with a Plan, which no shell reads, so arguments arrive as they are; then anything at all to
say that it is still there, STOP (the ranks are asked to save and end), KILL. The end of the input, or silence, means
that the connection is lost, and is a STOP too.
"""

from __future__ import annotations

import base64
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from kraken_train.common.locales import use_unicode
from kraken_train.health.shutdown import (
    INTERRUPTED_EXIT_CODE,
    LAUNCHER_SECONDS,
    LOCAL_LAUNCHER,
    STARTED_BY_NODE,
    STOP_SIGNALS,
    has_ended,
)
from kraken_train.run.events import now
from kraken_train.run.layout import start_folders
from kraken_train.run.rank_errors import RankError, error_file, record_error

STOP, KILL, STILL_HERE = b"stop\n", b"kill\n", b"\n"
SILENCE_SECONDS = 120.0
LOOK_SECONDS = 0.1
LEFTOVER_SECONDS = 30.0  # for what ranks have started to end after them
PR_SET_CHILD_SUBREAPER = 36
SPOKEN_EXIT_CODES = (0, 1, 2, INTERRUPTED_EXIT_CODE)  # with which a rank ends that has said why


@dataclass(frozen=True)
class Plan:
    """What one machine is to start."""

    node_rank: int
    hosts: dict[str, list[str]]  # of the whole job: the slots of each
    master_addr: str
    master_port: int
    launcher_options: list[str]
    module: str
    arguments: list[str]
    environment: dict[str, str]  # in addition to what is there
    run_dir: str | None  # for the errors of ranks that cannot speak any more
    earlier_starts: int  # the number of the run's newest start before this launch

    @property
    def slots(self) -> list[str]:
        return list(self.hosts.values())[self.node_rank]

    def newest_start(self) -> Path | None:
        """The folder of the run's start that this launch has made, as soon as it is there."""
        number = newest_start_number(self.run_dir)
        return start_folders(Path(self.run_dir))[-1] if self.run_dir and number > self.earlier_starts else None

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    def command(self) -> list[str]:
        """What the deepspeed command would start here, with Hydra's overrides as they are."""
        several = [f"--node_rank={self.node_rank}"] if len(self.hosts) > 1 else []
        return [
            *(sys.executable, "-u", "-X", STARTED_BY_NODE, "-m", LOCAL_LAUNCHER),
            f"--world_info={encode_world(self.hosts)}",
            *several,
            f"--master_addr={self.master_addr}",
            f"--master_port={self.master_port}",
            "--module",
            "--no_local_rank",
            *self.launcher_options,
            self.module,
            *self.arguments,
        ]


def newest_start_number(run_dir: str | Path | None) -> int:
    """0 where there is no start."""
    folders = start_folders(Path(run_dir)) if run_dir is not None else []
    return int(folders[-1].name) if folders else 0


def encode_world(hosts: dict[str, list[str]]) -> str:
    """As DeepSpeed's launcher reads it."""
    return base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()


@dataclass
class Rank:
    number: int
    process: psutil.Process
    asked: bool = False  # to save and end
    ended: bool = False
    exit_code: int | None = None  # negative: the signal that killed it; None where it was not seen
    end: int | None = None  # a file descriptor that can be read once it has ended

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.process.pid} on {socket.gethostname()})"

    def look(self) -> None:
        if not self.ended and has_ended(self.process):
            self.exit_code = exit_code_of_dead(self.process.pid)
            self.ended = True


def end_of(process: psutil.Process) -> int | None:
    """A descriptor of the process; None if it is gone, or the kernel has none (before Linux 5.3)."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        return None


class Node:
    """The ranks of a plan, from their start to the end of the last process that they leave."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks: dict[int, Rank] = {}  # by process, all that were seen
        self.order: list[Rank] = []  # in which they ended
        self.asked: str | None = None  # why the ranks were asked to end
        self.told_launcher = False
        self.deadline = float("inf")
        self.heard, self.connected = time.monotonic(), True
        become_subreaper()

    def run(self) -> int:
        """Wait for the end of all; the exit code of the rank that failed first, as far as the launcher knows it."""
        for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self.on_signal)
        # DeepSpeed's launcher would die of it where a whole job gets the signal. What is ignored stays so in a child.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.launcher = subprocess.Popen(
            self.plan.command(), stdin=subprocess.DEVNULL, env=os.environ | self.plan.environment
        )
        signal.signal(signal.SIGUSR1, self.on_signal)
        while self.launcher.poll() is None:
            self.listen()
            self.look_at_ranks()
            self.pass_on()
        self.look_at_ranks()
        code = self.launcher.returncode
        if code not in (0, INTERRUPTED_EXIT_CODE) and self.asked is None:
            self.tell_silent_death(code)
        self.clear()
        return code if code in SPOKEN_EXIT_CODES else 1

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        """Let the ranks save and end, for LAUNCHER_SECONDS."""
        if self.asked is None:
            self.asked, self.deadline = why, time.monotonic() + LAUNCHER_SECONDS

    def listen(self) -> None:
        # A rank's end wakes at once: a moment later its launcher ends the others, and who was first is not to be seen.
        inputs = [sys.stdin.fileno()] if self.connected else []
        ends = [rank.end for rank in self.ranks.values() if not rank.ended and rank.end is not None]
        ready = select.select([*inputs, *ends], [], [], LOOK_SECONDS)[0]
        if not self.connected:
            return
        if inputs[0] in ready:
            heard = os.read(sys.stdin.fileno(), 4096)
            self.heard, self.connected = time.monotonic(), bool(heard)
            if STOP in heard or not heard:
                self.ask("the launcher asks" if heard else "the launcher is gone")
            if KILL in heard:
                self.ask("the launcher asks")
                self.deadline = 0.0
        elif time.monotonic() - self.heard > SILENCE_SECONDS:
            self.connected = False
            self.ask(f"the launcher was silent for {SILENCE_SECONDS:.0f} s")

    def look_at_ranks(self) -> None:
        if len(self.ranks) < len(self.plan.slots) and self.launcher.poll() is None:
            for process in children_of(self.launcher.pid):
                if process.pid not in self.ranks and (number := rank_of(process)) is not None:
                    self.ranks[process.pid] = Rank(number, process, end=end_of(process))
        for rank in self.ranks.values():
            if not rank.ended:
                rank.look()
                if rank.ended:
                    self.order.append(rank)

    def pass_on(self) -> None:
        if self.asked is None:
            return
        for rank in self.ranks.values():
            if not rank.asked and not rank.ended:
                rank.asked = True
                send(rank.process, signal.SIGTERM)
        if len(self.ranks) < len(self.plan.slots) and not self.told_launcher:
            self.launcher.terminate()  # it has not started all of them, and never will
            self.told_launcher = True
        if time.monotonic() > self.deadline:
            late = [str(rank) for rank in self.ranks.values() if not rank.ended]
            if late and self.deadline > 0:
                say(f"error: {', '.join(late)} had not ended {LAUNCHER_SECONDS:.0f} s after SIGTERM and is killed")
            for process in psutil.Process().children(recursive=True):
                send(process, signal.SIGKILL)

    def tell_silent_death(self, launcher_code: int) -> None:
        """Say, and keep in the run's folder, which rank was killed if one was: it could not do so itself."""
        if launcher_code < 0:
            say(f"error: DeepSpeed's launcher on {socket.gethostname()} {describe_end(launcher_code)}")
            return
        # DeepSpeed's launcher ends with the code of the rank that failed first, or 256 less its signal.
        known = launcher_code - 256 if launcher_code > 192 else launcher_code
        if known in SPOKEN_EXIT_CODES:
            return
        if len(self.ranks) < len(self.plan.slots):
            say(f"error: a rank on {socket.gethostname()}: {describe_end(known)} right after its start")
            return
        first = next((rank for rank in self.order if rank.exit_code in (None, known)), None)
        if first is None:
            return
        say(f"error: {first}: {describe_end(known)}")
        start = self.plan.newest_start()
        if start is not None and not error_file(start, first.number).exists():
            pid, host = first.process.pid, socket.gethostname()
            record_error(start, RankError(now(), first.number, host, pid, describe_end(known), None, False, True))

    def clear(self) -> None:
        """Wait for what is left, ask it to end, kill it. Ranks that have lost their launcher are saving by now."""
        ranks_left = any(not rank.ended for rank in self.ranks.values())
        for number, seconds in (
            (None, LAUNCHER_SECONDS if ranks_left else LEFTOVER_SECONDS),
            (signal.SIGTERM, 10.0),
            (signal.SIGKILL, 10.0),
        ):
            left = psutil.Process().children(recursive=True)
            if not left:
                return
            if number is not None:
                for process in left:
                    send(process, number)
            if self.deadline > 0:
                psutil.wait_procs(left, timeout=seconds)


def describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def rank_of(process: psutil.Process) -> int | None:
    """Which rank it is by its environment; None if it is none, or not yet."""
    try:
        number = process.environ().get("RANK")
    except (psutil.Error, OSError):
        return None
    return None if number is None else int(number)


def exit_code_of_dead(pid: int) -> int | None:
    """The exit code of a process that has ended and that its parent has not collected yet."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[49])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status)


def send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):  # it has ended
        process.send_signal(number)


def become_subreaper() -> None:
    """Processes whose parent ends become children of this one, so that none can get away."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def say(message: str) -> None:
    with suppress(OSError):  # nobody listens any more
        print(message, file=sys.stderr, flush=True)


def read_plan() -> Plan:
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows is for `listen`
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit("error: launch.node is started by launch.deepspeed, which tells it what to do")
        line += byte
    return Plan(**json.loads(line))


def main() -> None:
    use_unicode()
    plan = read_plan()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    sys.exit(Node(plan).run())


if __name__ == "__main__":
    main()
