"""The processes of `launch.node` on all hosts of a launch: start them, forward signals to them, wait for their end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import IO

import psutil

from kraken_train.health.shutdown import LAUNCHER_SECONDS, STOP_SIGNALS
from launch.exit_report import ErrorLines
from launch.hosts import is_local
from launch.node import KEEP_ALIVE, KILL, STOP, describe_end
from launch.plan import Plan
from launch.remote import SSH_FAILED, python_command

KEEP_ALIVE_SECONDS = 15.0
PEER_SECONDS = 60.0  # how long the ranks of other hosts have to notice a failed host and to end by themselves


@dataclass
class NodeProcess:
    """`launch.node` for one host: the process itself on this machine, its ssh for another one."""

    host: str
    plan: Plan
    ssh: list[str]

    def start(self) -> None:
        command = python_command(self.host, self.ssh, "-u", "-m", "launch.node")
        # A session of its own: signals of the terminal reach only the launcher, which forwards them.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.send(self.plan.to_line())

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # the process has ended
            pipe: IO[bytes] = self.process.stdin  # type: ignore[assignment]
            pipe.write(message)
            pipe.flush()

    @property
    def exit_code(self) -> int:
        """Its exit code; 1 if a signal killed it or its connection was lost."""
        code = self.process.poll()
        return code if code is not None and 0 <= code < SSH_FAILED else 1

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    each.kill()


class Supervision:
    """All nodes of a launch, from their start to their end."""

    def __init__(self, nodes: list[NodeProcess], error_lines: ErrorLines) -> None:
        self.nodes, self.error_lines = nodes, error_lines
        self.stop_requested = False  # by a signal
        self.kill_requested = False  # by a second Ctrl-C
        self.stop_at = float("inf")  # the time when the nodes are sent STOP
        self.stopped_at: float | None = None  # the time when they were sent STOP

    def run(self) -> None:
        """Start the nodes and wait until all of them have ended."""
        for number in (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.on_signal)
        for node in self.nodes:
            node.start()
        readers = [threading.Thread(target=self.copy_errors, args=(node,), daemon=True) for node in self.nodes]
        for reader in readers:
            reader.start()
        keep_alive_at = time.monotonic()
        while running := [node for node in self.nodes if node.process.poll() is None]:
            now = time.monotonic()
            if len(running) < len(self.nodes) and any(node.process.poll() for node in self.nodes):
                self.stop_at = min(self.stop_at, now + PEER_SECONDS)
            if now > keep_alive_at + KEEP_ALIVE_SECONDS:
                keep_alive_at = now
                for node in running:
                    node.send(KEEP_ALIVE)
            self.stop_if_due(running, now)
            time.sleep(0.1)
        for node, reader in zip(self.nodes, readers, strict=True):
            reader.join(5)
            self.report_lost(node)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.kill_requested = self.stop_requested and number == signal.SIGINT
        self.stop_requested = True
        self.stop_at = 0.0

    def stop_if_due(self, running: list[NodeProcess], now: float) -> None:
        """Send STOP and KILL once they are due, and kill nodes that do not end in time after that."""
        if now <= self.stop_at:
            return
        if self.stopped_at is None:
            self.stopped_at = now
            if self.stop_requested:
                self.print_line("stopping: the ranks save a checkpoint and end (Ctrl-C again kills them)")
            for node in running:
                node.send(STOP)
        if self.kill_requested:
            self.kill_requested = False
            for node in running:
                node.send(KILL)
        if now > self.stopped_at + LAUNCHER_SECONDS + PEER_SECONDS:
            for node in running:
                self.print_line(f"error: host {node.host} does not end its ranks")
                node.kill()

    def report_lost(self, node: NodeProcess) -> None:
        """Print an error if a node was killed or its connection was lost."""
        code = node.process.returncode
        if not is_local(node.host) and (code == SSH_FAILED or code < 0):
            self.print_line(f"error: the connection to host {node.host} was lost")
        elif code < 0:
            self.print_line(f"error: launch.node on {node.host} {describe_end(code)}")

    def copy_errors(self, node: NodeProcess) -> None:
        """Copy the standard error of a node to ours; with several hosts, each line begins with its host."""
        prefix = f"{node.host}: " if len(self.nodes) > 1 else ""
        pipe: IO[bytes] = node.process.stderr  # type: ignore[assignment]
        for raw in pipe:
            line = raw.decode(errors="replace")
            self.error_lines.add(line)
            with contextlib.suppress(OSError):  # standard error is closed
                sys.stderr.write(prefix + line)
                sys.stderr.flush()

    def print_line(self, line: str) -> None:
        self.error_lines.add(line)
        with contextlib.suppress(OSError):  # standard error is closed
            print(line, file=sys.stderr, flush=True)
