"""The process that makes a run's copy, as training sees it: started, heard now and then, and not waited for long."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from kraken_train.config import TrackingConfig
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE

LOG = "tracking.log"
INTERRUPTED_SECONDS = 5.0  # at most, for a run that goes on later: whoever has stopped it is in a hurry
SERVICES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}


def start_follower(tracking: TrackingConfig, run_dir: Path, logs: Path, note: Callable[[str], None]) -> Follower | None:
    """The process that follows the run in `run_dir`; None where that is off or, as `note` is told, fails."""
    if tracking.mode == "off":
        return None
    try:
        return Follower(tracking, run_dir, logs, note)
    except OSError as error:
        note(f"{SERVICES[tracking.kind]}: no process can be started to follow the run ({error}); training goes on")
        return None


class Follower:
    """`tracking.follow` on a run folder, until `close`. `note` gets, from another thread, what people should know."""

    def __init__(self, tracking: TrackingConfig, run_dir: Path, logs: Path, note: Callable[[str], None]) -> None:
        self.tracking = tracking
        self.run_dir = run_dir
        self.log = logs / LOG
        self.note = note
        self.closing = False
        command = [sys.executable, "-m", "kraken_train.tracking.follow", str(run_dir), "--live"]
        logs.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            # In a session of its own, as an interruption from the keyboard is for training alone. Its input ends
            # with this process, however that happens.
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
            self.tell_missing("the process that follows the run has ended; training goes on")

    def close(self, exit_code: int) -> None:
        """Tell how training has ended, and let the copy become complete, for `tracking.finish_seconds` at most."""
        if self.process.poll() is not None:  # which has been told
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
            self.tell_missing(f"not everything had arrived {seconds:g} s after the end of training")

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()

    def tell_missing(self, problem: str) -> None:
        self.note(
            f"{SERVICES[self.tracking.kind]}: {problem} (see {self.log}). What is missing there comes with the next "
            f"start, or with `python -m kraken_train.tracking.follow {shlex.quote(str(self.run_dir))}`"
        )
