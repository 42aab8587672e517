"""The state of a run, read from its folder, also while it is being written. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints.training.manifest import MANIFEST, find_complete_checkpoint
from kraken_train.common.errors import DataError
from kraken_train.common.files import open_file, try_lock
from kraken_train.recipe.phases import describe_phase, recorded_phases
from kraken_train.run.events import FAILED, Event, read_events
from kraken_train.run.inventory import (
    Export,
    command_again,
    data_folders,
    find_exports,
    folder_problems,
    identity_is_usable,
    missing_inputs,
    read_mapping,
)
from kraken_train.run.layout import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
    IDENTITY_FILE,
    LOCK_FILE,
    LOCK_TOUCH_SECONDS,
    start_folders,
)
from kraken_train.run.metrics import METRICS_FILE, is_finite, parse_record
from kraken_train.run.rank_errors import RankError, read_errors, root_causes

RUNNING, WAITING, DIED, NOT_STARTED, UNKNOWN = "running", "waiting", "died", "not started", "not known"
HOLDER = re.compile(r"process (\d+) on (\S+)")  # what is in the lock's file
TAIL_BYTES = 1 << 18  # of the metrics: hundreds of steps
SPEED_RECORDS = 20  # that the speed is the median of
# Events after which a start is to come, and their words.
AWAITING = {
    "submitted": "job {job} was submitted",
    "allocated": "the ranks of job {job} are being started",
    "requeued": "job {job} was requeued: {reason}",
}
LOCK_TOUCHES_MISSED = 3  # until a start on another machine counts as dead


@dataclass(frozen=True)
class Start:
    number: int
    from_step: int | None  # None: it did not come to its first step
    to_step: int | None
    outcome: str  # finished, interrupted, failed, died, running or not known
    reason: str | None
    time: str | None
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class RunState:
    path: str
    state: str  # running, waiting, finished, interrupted, failed, died, not started or not known
    reason: str | None
    step: int
    max_steps: int | None  # with which it ends
    phase: int | None  # number, from 0, of that of the last logged step; None: there are no phases, or no step
    phases: tuple[str, ...]  # as the settings have them
    precision: str | None  # of the newest start
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None  # median of the last SPEED_RECORDS records
    trend: float | None  # that over the median of as many records before, less 1
    seconds_left: float | None  # at that speed, for a run that is running
    checkpoint_step: int | None  # of the newest checkpoint whose files have the sizes that its manifest lists
    checkpoint_age: float | None  # seconds
    checkpoint_files: int
    damaged_checkpoints: tuple[str, ...]  # what is wrong with newer ones, the newest first
    saved_step: int | None  # the last one of which the events tell that it was saved
    problems: tuple[str, ...]  # what else is missing or damaged in the run's folder
    identity_usable: bool | None  # whether run.json can be used; None: it is missing
    missing_inputs: tuple[str, ...]  # what its command needs and does not find
    data_dir: str | None  # the first of its data folders that is there
    exports: tuple[Export, ...]  # the newest last
    starts: tuple[Start, ...]
    requeues: int
    job: str | None  # Slurm's
    skipped_steps: int
    rollbacks: int
    tracking: str | None
    errors: tuple[RankError, ...]  # root causes of the newest start's failure
    command: str | None  # that started it, as it must be to continue this folder
    folder: str | None  # in which

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_state(path: Path) -> RunState:
    """Raises DataError where the folder holds no run."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; name the run_dir of a training run")
    events = read_events(path / EVENTS_FILE)
    if not events and not (path / IDENTITY_FILE).exists():
        why = f"{IDENTITY_FILE} is missing" if any(path.iterdir()) else "it is empty"
        raise DataError(f"{path} holds no run ({why}); name the run_dir of a training run that has started")
    alive = is_alive(path, events)
    if not alive:
        events = read_events(path / EVENTS_FILE)  # it may have ended just now
    starts = read_starts(path, events, alive)
    state, reason = derive_state(events, starts, alive)
    newest = path / "starts" / f"{starts[-1].number if starts else 0:04d}"
    config = read_mapping(path / CONFIG_FILE) or read_mapping(newest / CONFIG_FILE)
    records = last_records(path)
    last = records[-1] if records else {}
    step = max([int(last.get("step", 0)), *(start.to_step or 0 for start in starts[-1:])])
    speed, trend = speed_of(records)
    checkpoint, damaged = find_complete_checkpoint(path / "checkpoints")
    environment = read_mapping(newest / ENVIRONMENT_FILE)
    max_steps, last_tokens = end_of(config, events)
    folder = environment.get("folder")
    exports, export_problems = find_exports(path)
    return RunState(
        path=str(path),
        state=state,
        reason=reason,
        step=step,
        max_steps=max_steps,
        phase=last.get("phase"),
        phases=tuple(describe_phase(phase) for phase in recorded_phases(config)),
        precision=config.get("precision"),
        loss=last.get("loss"),
        validation_loss=next((r["validation_loss"] for r in reversed(records) if "validation_loss" in r), None),
        tokens_per_second=speed,
        trend=trend,
        seconds_left=seconds_left(records, max_steps, last_tokens, speed) if state == RUNNING else None,
        checkpoint_step=None if checkpoint is None else checkpoint.step,
        checkpoint_age=None if checkpoint is None else age_of(checkpoint.path / MANIFEST),
        checkpoint_files=0 if checkpoint is None else len(checkpoint.files),
        damaged_checkpoints=tuple(damaged),
        saved_step=next((event.get("step") for event in reversed(events) if event["event"] == "saved"), None),
        problems=(*folder_problems(path, checkpoint is not None), *export_problems),
        identity_usable=identity_is_usable(path),
        missing_inputs=tuple(missing_inputs(config, folder, checkpoint is not None)),
        data_dir=next((str(data) for data in data_folders(config, folder) if data.is_dir()), None),
        exports=tuple(exports),
        starts=tuple(starts),
        requeues=sum(event["event"] == "requeued" for event in events),
        job=next((str(event["job"]) for event in reversed(events) if event.get("job") is not None), None),
        skipped_steps=len({event.get("step") for event in events if event["event"] == "skipped"}),
        rollbacks=sum(event["event"] == "rolled_back" for event in events),
        tracking=describe_tracking(path, config, events),
        errors=tuple(root_causes(read_errors(newest))) if state in (FAILED, DIED) else (),
        command=command_again(path, config, environment, checkpoint is not None),
        folder=folder,
    )


def is_alive(path: Path, events: list[Event]) -> bool:
    """Whether a start holds the run's lock, or, on another machine, where that may not show, has just touched it."""
    file = path / LOCK_FILE
    try:
        with open_file(file) as lock:
            if not try_lock(lock.fileno(), shared=True):
                return True
            holder = HOLDER.fullmatch(lock.read().decode(errors="replace"))
            age = time.time() - os.fstat(lock.fileno()).st_mtime
    except OSError:
        return False
    here = holder is None or holder[2] == socket.gethostname()
    ended = bool(events) and events[-1]["event"] == "ended"
    return not here and not ended and age < LOCK_TOUCHES_MISSED * LOCK_TOUCH_SECONDS


def read_starts(path: Path, events: list[Event], alive: bool) -> list[Start]:
    """All starts, the oldest first, also those that were killed and those that are not in the events."""
    numbers = {int(folder.name) for folder in start_folders(path)}
    numbers |= {event["start"] for event in events if isinstance(event.get("start"), int)}
    starts = []
    for number in sorted(numbers):
        begun = next((e for e in events if e["event"] == "started" and e.get("start") == number), None)
        ended = next((e for e in reversed(events) if e["event"] == "ended" and e.get("start") == number), None)
        folder = path / "starts" / f"{number:04d}"
        hosts = read_mapping(folder / ENVIRONMENT_FILE).get("hosts") or ()
        outcome, reason = DIED if events else UNKNOWN, None
        if ended is not None:
            outcome, reason = ended.get("outcome", FAILED), ended.get("reason")
        elif alive and number == max(numbers):
            outcome = RUNNING
        if outcome in (FAILED, DIED) and (errors := root_causes(read_errors(folder))):
            reason = f"{errors[0]}: {errors[0].message}"
        starts.append(
            Start(
                number=number,
                from_step=None if begun is None else begun.get("step"),
                to_step=None if ended is None else ended.get("step"),
                outcome=outcome,
                reason=reason,
                time=None if begun is None else begun["time"],
                hosts=tuple(dict.fromkeys(map(str, hosts))),
            )
        )
    return starts


def derive_state(events: list[Event], starts: list[Start], alive: bool) -> tuple[str, str | None]:
    """The state and its reason."""
    if alive:
        return RUNNING, None
    last = next((event for event in reversed(events) if event["event"] in (*AWAITING, "started", "ended")), None)
    newest = starts[-1].number if starts else 0
    if last is not None and last["event"] in AWAITING and newest <= last.get("earlier_starts", newest):
        return WAITING, AWAITING[last["event"]].format_map({"job": "?", "reason": "?"} | last)
    if not starts:
        return NOT_STARTED, None
    return starts[-1].outcome, starts[-1].reason


def last_records(path: Path) -> list[dict[str, Any]]:
    """The last records of the metrics, the oldest first; a line that is being written is left out."""
    try:
        with open_file(path / METRICS_FILE) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := parse_record(line)) is not None]


def speed_of(records: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Median tokens per second of the last records, and how it has changed against those before."""
    found = [record.get("tokens_per_second") for record in records]
    speeds = [speed for speed in found if is_finite(speed) and speed > 0]
    if not speeds:
        return None, None
    now, before = statistics.median(speeds[-SPEED_RECORDS:]), speeds[-2 * SPEED_RECORDS : -SPEED_RECORDS]
    return now, now / statistics.median(before) - 1 if before else None


def end_of(config: dict[str, Any], events: list[Event]) -> tuple[int | None, int | None]:
    """The step and the tokens with which the run ends; each None where it is not known.

    The newest start has written both. Older programs have not, and all their steps were in the settings.
    """
    in_tokens = config.get("max_tokens") is not None or bool(config.get("phases"))
    for event in reversed(events):
        if event["event"] == "started":
            if "last_step" in event and in_tokens:
                return event["last_step"], event.get("last_tokens")
            return config.get("max_steps"), event.get("last_tokens")
    return None if in_tokens else config.get("max_steps"), None


def seconds_left(
    records: list[dict[str, Any]], max_steps: int | None, last_tokens: int | None, speed: float | None
) -> float | None:
    last = records[-1] if records else {}
    if max_steps is None or not speed or not last.get("tokens") or not last["step"]:
        return None
    if last_tokens is not None and "global_batch_size" in last:  # steps differ in size
        return float(max(0, last_tokens - last["tokens"]) / speed)
    return float(max(0, max_steps - last["step"]) * last["tokens"] / last["step"] / speed)


def age_of(file: Path) -> float | None:
    """Seconds since it was written; None where it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return None


def describe_tracking(path: Path, config: dict[str, Any], events: list[Event]) -> str | None:
    """What is known of Weights & Biases or TensorBoard; None where it is off."""
    settings = config.get("tracking")
    if not isinstance(settings, dict) or settings.get("mode", "off") == "off":
        return None
    words = f"{settings.get('kind', 'wandb')}, {settings['mode']}"
    if settings.get("kind", "wandb") == "wandb" and list(path.glob("wandb/offline-run-*")):
        words += f"; to upload: wandb sync {path}/wandb/offline-run-*"
    notes = [event["note"] for event in events if event["event"] == "tracking" and event.get("note")]
    return f"{words}; {notes[-1]}" if notes else words
