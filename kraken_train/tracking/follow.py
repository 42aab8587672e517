"""Sends a run to Weights & Biases or TensorBoard: python -m kraken_train.tracking.follow RUN [--mode online]

It adds what the service lacks of the run in the folder RUN, for example from a machine with access to the internet, for
a run on nodes without. Training starts it with --live: then it runs until its standard input closes, which is when
training ends, and its standard output is for messages to training.

Training itself only appends to metrics.jsonl and events.jsonl. So a service that is slow, full or out of reach slows
down and stops nothing, and what it lacks can be added from the files at any later time.
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
from kraken_train.common.errors import ConfigError, KrakenError
from kraken_train.common.help import make_parser
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE
from kraken_train.run.events import FAILED, FINISHED, read_events
from kraken_train.run.layout import EVENTS_FILE
from kraken_train.run.metrics import METRICS_FILE
from kraken_train.tracking.backend import TrackerBackend, only_writer
from kraken_train.tracking.ready import require_ready
from kraken_train.tracking.run_info import RunInfo, read_run_info
from kraken_train.tracking.tail import Tail

POLL_SECONDS = 0.5
ATTEMPTS = 3
EXIT_CODES = {FINISHED: 0, FAILED: 1}


class Training:
    """The training process, connected through pipes. The last line that it writes is its exit code."""

    def __init__(self, finish_seconds: float) -> None:
        # This process's output is a log and the output that W&B shows; the pipe to training becomes `notes`.
        self.notes = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        os.dup2(2, 1)
        self.finish_seconds = finish_seconds
        self.exit_code = EXIT_CODES[FAILED]  # if it is killed
        self.ended = threading.Event()
        threading.Thread(target=self.listen, name="training", daemon=True).start()

    def note(self, text: str) -> None:
        """Send a message to the console of training."""
        print(text, flush=True)
        with suppress(OSError):  # it has ended
            print(text, file=self.notes)

    def listen(self) -> None:
        for line in sys.stdin:
            self.exit_code = int(line)
        self.ended.set()
        time.sleep(self.finish_seconds)
        print(f"not finished {self.finish_seconds:.0f} s after the end of the run; giving up", flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)


class Past:
    """In place of Training, for a run that is not followed live."""

    def __init__(self, run_dir: Path) -> None:
        starts = [event for event in read_events(run_dir / EVENTS_FILE) if event["event"] in ("started", "ended")]
        outcome = starts[-1].get("outcome") if starts else None
        self.exit_code = EXIT_CODES.get(
            str(outcome), INTERRUPTED_EXIT_CODE
        )  # without an end it is running, or will continue
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
        run_info = read_run_info(arguments.run_dir)
        mode = arguments.mode or run_info.tracking.mode
        if mode == "off":
            raise ConfigError(f"{arguments.run_dir} was trained with tracking.mode=off; give --mode online or offline")
        if arguments.live:
            for number in (signal.SIGTERM, signal.SIGINT):  # meant for training, whose end this process waits for
                signal.signal(number, signal.SIG_IGN)
            os.nice(10)  # training has priority
            training: Training | Past = Training(run_info.tracking.finish_seconds)
        else:
            tracking = dataclasses.replace(run_info.tracking, mode=mode)
            tracking.validate()
            require_ready(tracking, os.environ)
            training = Past(arguments.run_dir)
        with only_writer(arguments.run_dir, mode, wait=arguments.live):
            follow_with_retries(run_info, mode, training)


def follow_with_retries(run_info: RunInfo, mode: str, training: Training | Past) -> None:
    """Follow, and retry after a failure: W&B's own process ends at the SIGTERM that a job gets before its end."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            follow(run_info, make_backend(run_info, mode, training), training)
            return
        except KrakenError:  # the same at each attempt
            raise
        except Exception:
            if attempt == ATTEMPTS:
                raise
            traceback.print_exc()
            for process in psutil.Process().children(recursive=True):
                process.kill()
            time.sleep(POLL_SECONDS)


def make_backend(run_info: RunInfo, mode: str, training: Training | Past) -> TrackerBackend:
    # Each loads its library.
    if run_info.tracking.kind == "tensorboard":
        from kraken_train.tracking.tensorboard_backend import TensorBoardBackend  # noqa: PLC0415

        return TensorBoardBackend(run_info)
    from kraken_train.tracking.wandb_backend import WandbBackend  # noqa: PLC0415

    return WandbBackend(run_info, mode, training.note)


def follow(run_info: RunInfo, backend: TrackerBackend, training: Training | Past) -> None:
    """Send what the run's files hold, and what is added to them until training ends."""
    metrics = Tail(run_info.path / METRICS_FILE, when_replaced=backend.restart)
    events = Tail(run_info.path / EVENTS_FILE)
    past = list(events.read())
    news = start_of_news(past)
    for index, event in enumerate(past):
        backend.log_event(event, news=index >= news)
    while True:
        last_time = training.ended.is_set()  # read before the files, so that nothing is missed
        for event in events.read():
            backend.log_event(event, news=True)
        for record in metrics.read():
            if isinstance(record.get("step"), int):
                backend.log(record)
        if last_time:
            break
        training.ended.wait(POLL_SECONDS)
    backend.close(training.exit_code)


def start_of_news(events: list[dict[str, Any]]) -> int:
    """The index after the beginning, or else at the end, of the start before the latest one."""
    starts = [index for index, event in enumerate(events) if event.get("event") == "started"]
    if len(starts) < 2:
        return 0
    ends = [index for index in range(starts[-2], starts[-1]) if events[index].get("event") == "ended"]
    return ends[-1] if ends else starts[-2] + 1


if __name__ == "__main__":
    main()
