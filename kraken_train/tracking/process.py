"""Starts and ends the process that sends a run to a tracker, for training."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.settings.tracking import TrackingConfig

LOG = "tracking.log"
INTERRUPTED_SECONDS = 5.0  # for a run that continues later: after a request to stop there is little time
SERVICES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}


def start_follower(tracking: TrackingConfig, run_dir: Path, logs: Path, note: Callable[[str], None]) -> Follower | None:
    """The process that follows the run in `run_dir`; None if tracking is off, or if it cannot start (see `note`)."""
    if tracking.mode == "off":
        return None
    try:
        return Follower(tracking, run_dir, logs, note)
    except OSError as error:
        note(f"{SERVICES[tracking.kind]}: no process can be started to follow the run ({error}); training continues")
        return None


class Follower:
    """`tracking.follow` on a run folder, until `close`. `note` gets its messages, from another thread."""

    def __init__(self, tracking: TrackingConfig, run_dir: Path, logs: Path, note: Callable[[str], None]) -> None:
        self.tracking = tracking
        self.run_dir = run_dir
        self.log = logs / LOG
        self.note = note
        self.closing = False
        command = [sys.executable, "-m", "kraken_train.tracking.follow", str(run_dir), "--live"]
        logs.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            # In a session of its own, so that Ctrl-C reaches only training. Its standard input closes when this process
            # ends, for whatever reason.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        self.listener = threading.Thread(target=self.listen, name="tracking", daemon=True)
        self.listener.start()

    def listen(self) -> None:
        for line in self.process.stdout or ():
            self.note(line.rstrip("\n"))
        if not self.closing:
            self.warn_incomplete("the process that follows the run has ended; training continues")

    def close(self, exit_code: int) -> None:
        """Send the exit code of training, and wait until everything is sent, `tracking.finish_seconds` at most."""
        if self.process.poll() is not None:  # there was a message
            return
        self.closing = True
        seconds = self.tracking.finish_seconds
        if exit_code == INTERRUPTED_EXIT_CODE:
            seconds = min(seconds, INTERRUPTED_SECONDS)
        if self.process.stdin is not None:
            with suppress(OSError):  # it ends just now
                self.process.stdin.write(f"{exit_code}\n")
                self.process.stdin.close()
        try:
            failed = self.process.wait(seconds) != 0
        except subprocess.TimeoutExpired:
            failed = True
            self.kill()
        self.listener.join(1.0)
        if failed:
            self.warn_incomplete(f"not everything had arrived {seconds:g} s after the end of training")

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()

    def warn_incomplete(self, problem: str) -> None:
        self.note(
            f"{SERVICES[self.tracking.kind]}: {problem} (see {self.log}). What is missing there comes with the next "
            f"start, or with `python -m kraken_train.tracking.follow {shlex.quote(str(self.run_dir))}`"
        )
