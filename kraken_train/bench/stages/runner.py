"""Runs stages one after the other: each within its time, whatever became of the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from kraken_train.bench.stages.preset import Preset
from kraken_train.bench.stages.record import DONE, FAILED, TIMED_OUT, Record, read_record
from kraken_train.bench.stages.stage import REPOSITORY, Command, Stage, Workplace
from kraken_train.common.durations import duration

LOG_FILE = "output.log"
MESSAGE_CHARACTERS = 3000
SECONDS_TO_END = 20.0  # after SIGTERM; launchers end their ranks within it


class OutOfTimeError(Exception):
    """A command did not end within the time of its stage."""


@dataclass(frozen=True)
class Runner:
    preset: Preset
    output_dir: Path  # of the records
    work_dir: Path  # of all that the commands write
    device: str  # name of it, for the records
    say: Callable[[str], None] = print

    def run(self, stages: Sequence[Stage], again: bool = False, piece_seconds: float | None = None) -> list[str]:
        """Run what is not done, what has never run first. Returns the names of stages that wait for the next piece.

        A stage begins only where its whole limit fits into what is left of `piece_seconds`. With `again` those that
        are done are run as well.
        """
        begin, waiting = time.monotonic(), []
        for stage in self.in_order(stages, again):
            left = None if piece_seconds is None else piece_seconds - (time.monotonic() - begin)
            limit = self.preset.minutes(stage.minutes) * 60
            if left is not None and limit > left:
                waiting.append(stage.name)
                continue
            self.say(f"{stage.name}: {stage.what} (at most {duration(limit)})")
            record = self.run_stage(stage)
            record.write(self.output_dir)
            self.say(f"{stage.name}: {record.status} after {duration(record.seconds)}")
            if record.status != DONE:
                self.say(record.message)
        return waiting

    def in_order(self, stages: Sequence[Stage], again: bool) -> list[Stage]:
        records = {stage.name: read_record(self.output_dir, stage.name) for stage in stages}
        never = [stage for stage in stages if records[stage.name] is None]
        before = [stage for stage in stages if records[stage.name] is not None]
        return never + [stage for stage in before if again or not self.is_done(stage, records[stage.name])]

    def is_done(self, stage: Stage, record: Record | None) -> bool:
        """Whether the stage has succeeded on such a device with these commands."""
        if record is None or record.status != DONE or record.device != self.device:
            return False
        # Of what was run, the preparation of data is not repeated.
        return {str(command) for command in stage.commands(self.workplace(stage))} <= set(record.commands)

    def workplace(self, stage: Stage) -> Workplace:
        return Workplace(self.preset, (self.work_dir / stage.name).absolute(), (self.work_dir / "data").absolute())

    def run_stage(self, stage: Stage) -> Record:
        begin = time.monotonic()
        place, status, message, figures = self.workplace(stage), DONE, "", {}
        place.folder.mkdir(parents=True, exist_ok=True)
        log = place.folder / LOG_FILE
        log.write_text("", encoding="utf-8")
        commands: Sequence[Command] = ()
        try:
            commands = stage.commands(place)
            for command in commands:
                code = execute(command, log, begin + self.preset.minutes(stage.minutes) * 60)
                if code not in command.accepted:
                    status, message = FAILED, f"{command}\nended with exit code {code}\n{end_of(log)}"
                    break
            else:
                figures = stage.figures(place)
        except OutOfTimeError:
            status, message = (
                TIMED_OUT,
                f"not finished in time\n{end_of(log)}",
            )
        except Exception as error:  # a file or a figure is missing; the next stage must run all the same
            status, message = FAILED, f"{type(error).__name__}: {error}\n{end_of(log)}"
        return Record(
            stage.name,
            status,
            time.monotonic() - begin,
            tuple(map(str, commands)),
            figures,
            message,
            self.device,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )


def execute(command: Command, log: Path, deadline: float) -> int:
    """Run it with its output appended to `log`; its exit code. Nothing of it is left afterwards.

    Raises OutOfTimeError where it is not over at `deadline`, in the time of `time.monotonic`.
    """
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {command}\n")
        output.flush()
        process = subprocess.Popen(
            command.arguments,
            env=os.environ | command.environment,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, which may be in sessions of their own."""
    started: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    for other in started:
        with suppress(psutil.NoSuchProcess):
            other.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-MESSAGE_CHARACTERS:]
