"""A run's copy in Weights & Biases or TensorBoard: python -m kraken_train.tracking.follow RUN [--mode online]

Adds what the copy lacks of the run in the folder RUN, and ends; for example from a machine that has a way to the
internet, for a run on machines that have none. Training starts it with --live: then it goes on until its standard
input ends, which is when training does, however that happens, and speaks to training through its standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import ConfigError
from kraken_train.common.help import make_parser
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.run.events import FAILED, FINISHED, read_events
from kraken_train.run.layout import EVENTS_FILE
from kraken_train.run.metrics import METRICS_FILE
from kraken_train.tracking.backend import Copy, only_writer
from kraken_train.tracking.ready import require_ready
from kraken_train.tracking.run_info import DescribedRun, read_described_run
from kraken_train.tracking.tail import Tail

POLL_SECONDS = 0.5
ATTEMPTS = 3
EXIT_CODES = {FINISHED: 0, FAILED: 1}


class Training:
    """The process whose run is followed. Its last line, if it can still write one, is its exit code."""

    def __init__(self, finish_seconds: float) -> None:
        # This process's output is a log and the output that W&B shows; the pipe to training becomes `notes`.
        self.notes = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        os.dup2(2, 1)
        self.finish_seconds = finish_seconds
        self.exit_code = EXIT_CODES[FAILED]  # if it is killed
        self.ended = threading.Event()
        threading.Thread(target=self.listen, name="training", daemon=True).start()

    def note(self, text: str) -> None:
        """Something for its console."""
        print(text, flush=True)
        with suppress(OSError):  # it has ended
            print(text, file=self.notes)

    def listen(self) -> None:
        for line in sys.stdin:
            self.exit_code = int(line)
        self.ended.set()
        time.sleep(self.finish_seconds)
        print(f"not finished {self.finish_seconds:.0f} s after the run, so given up", flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)


class Past:
    """In place of Training for a run of which only what is there counts."""

    def __init__(self, run_dir: Path) -> None:
        starts = [event for event in read_events(run_dir / EVENTS_FILE) if event["event"] in ("started", "ended")]
        outcome = starts[-1].get("outcome") if starts else None
        self.exit_code = EXIT_CODES.get(str(outcome), INTERRUPTED_EXIT_CODE)  # without an end it goes on now, or later
        self.ended = threading.Event()
        self.ended.set()

    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the run_dir of a training run")
    parser.add_argument("--mode", choices=("online", "offline"), help="in place of the run's tracking.mode")
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with user_errors(arguments.run_dir):
        described = read_described_run(arguments.run_dir)
        mode = arguments.mode or described.tracking.mode
        if mode == "off":
            raise ConfigError(f"{arguments.run_dir} was trained with tracking.mode=off; give --mode online or offline")
        if arguments.live:
            for number in (signal.SIGTERM, signal.SIGINT):  # which mean the training, whose end is waited for
                signal.signal(number, signal.SIG_IGN)
            os.nice(10)  # training has the first claim to the processor
            training: Training | Past = Training(described.tracking.finish_seconds)
        else:
            tracking = dataclasses.replace(described.tracking, mode=mode)
            tracking.validate()
            require_ready(tracking, os.environ)
            training = Past(arguments.run_dir)
        with only_writer(arguments.run_dir, mode, wait=arguments.live):
            follow_stubbornly(described, mode, training)


def follow_stubbornly(described: DescribedRun, mode: str, training: Training | Past) -> None:
    """Begin again where a copy fails: W&B's own process ends at the SIGTERM that a job gets before its end."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            follow(described, make_copy(described, mode, training), training)
            return
        except Exception:
            if attempt == ATTEMPTS:
                raise
            traceback.print_exc()
            for process in psutil.Process().children(recursive=True):
                process.kill()
            time.sleep(POLL_SECONDS)


def make_copy(described: DescribedRun, mode: str, training: Training | Past) -> Copy:
    # Each loads its library.
    if described.tracking.kind == "tensorboard":
        from kraken_train.tracking.tensorboard_backend import TensorBoardCopy  # noqa: PLC0415

        return TensorBoardCopy(described)
    from kraken_train.tracking.wandb_backend import WandbCopy  # noqa: PLC0415

    return WandbCopy(described, mode, training.note)


def follow(described: DescribedRun, copy: Copy, training: Training | Past) -> None:
    """Give the copy what the run's files hold, and what they get until training ends."""
    metrics = Tail(described.path / METRICS_FILE, when_replaced=copy.begin_again)
    events = Tail(described.path / EVENTS_FILE)
    past = list(events.read())
    news = start_of_news(past)
    for index, event in enumerate(past):
        copy.tell(event, news=index >= news)
    while True:
        last_time = training.ended.is_set()  # asked before the files are read, so that nothing is left in them
        for event in events.read():
            copy.tell(event, news=True)
        for record in metrics.read():
            if isinstance(record.get("step"), int):
                copy.log(record)
        if last_time:
            break
        training.ended.wait(POLL_SECONDS)
    copy.close(training.exit_code)


def start_of_news(events: list[dict[str, Any]]) -> int:
    """The index after the beginning, or else at the end, of the start before the latest one."""
    starts = [index for index, event in enumerate(events) if event.get("event") == "started"]
    if len(starts) < 2:
        return 0
    ends = [index for index in range(starts[-2], starts[-1]) if events[index].get("event") == "ended"]
    return ends[-1] if ends else starts[-2] + 1


if __name__ == "__main__":
    main()
