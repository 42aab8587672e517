"""Where the threads of a process are: their Python stacks, and in one line what the main thread is doing.

`kill -USR2 PROCESS` makes a rank of a run write its stacks to its log and continue.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import FrameType

import torch

SIGNAL = signal.SIGUSR2
LIBRARIES = {*sys.stdlib_module_names, "torch", "deepspeed", "numpy"}  # their innermost lines are not reported
# Modules that are on the stack of a rank while it waits for other ranks.
COLLECTIVES = {
    "torch.distributed.distributed_c10d",
    "torch.distributed._functional_collectives",
    "kraken_train.parallel.distributed",
}
# Modules in which the host waits for its GPU. On a GPU the device waits for the other ranks, and the host for it.
WAITS_FOR_DEVICE = {
    "kraken_train.training.engine",
    "kraken_train.parallel.step_timer",
    "kraken_train.parallel.replica_check",
}
# Prefixes of the names of background threads, for which the main thread never waits.
BACKGROUND_THREADS = ("watchdog-", "run-lock", "tracking")
MOST_NAMED = 4  # ranks listed in a message


@dataclass(frozen=True)
class Place:
    """What a rank is doing."""

    rank: int
    process: str  # "process 17 on node3"
    where: str  # "data.py:120 read"
    waits: bool  # for other ranks, as far as its stack shows

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process}) is in {self.where}"


def write_stacks(reason: str, log: Path | None) -> None:
    """The Python stacks of all threads to this rank's log, if it is known, and to standard error."""
    if log is not None:
        with suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk
            faulthandler.dump_traceback(file, all_threads=True)
    with suppress(OSError, ValueError):  # closed, or no file
        print(f"{reason}; the stacks of its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


@contextmanager
def stacks_on_signal(log: Path) -> Iterator[None]:
    """A context in which SIGNAL writes the stacks to `log`, even while the main thread waits in C."""
    with log.open("a", encoding="utf-8") as file:
        faulthandler.register(SIGNAL, file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(SIGNAL)


def where_is_main_thread() -> tuple[str, bool]:
    """The innermost line of the main thread outside LIBRARIES, and whether it waits there for other ranks.

    If the main thread waits for another thread of this process, such as the one that reads data, these are of that
    thread.
    """
    frames = sys._current_frames()
    main = list(stack_of(frames[threading.main_thread().ident or 0]))
    if waits_for_thread(main):
        others = [
            stack
            for thread in threading.enumerate()
            if thread is not threading.main_thread()
            and not thread.name.startswith(BACKGROUND_THREADS)
            and thread.ident in frames
            for stack in [list(stack_of(frames[thread.ident]))]
            if own_frame(stack) is not None and not waits_for_thread(stack)
        ]
        main = others[0] if others else main
    frame = own_frame(main) or main[0]
    return describe_frame(frame), waits_for_others(main, frame)


def stack_of(frame: FrameType | None) -> Iterator[FrameType]:
    """Its frames, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def own_frame(stack: Sequence[FrameType]) -> FrameType | None:
    """The innermost frame outside LIBRARIES."""
    return next((frame for frame in stack if module_of(frame).partition(".")[0] not in LIBRARIES), None)


def module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def describe_frame(frame: FrameType) -> str:
    return f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def waits_for_thread(stack: Sequence[FrameType]) -> bool:
    return module_of(stack[0]) == "threading"


def waits_for_others(stack: Sequence[FrameType], own: FrameType) -> bool:
    if torch.cuda.is_initialized() and module_of(own) in WAITS_FOR_DEVICE:
        return True
    return any(module_of(frame) in COLLECTIVES for frame in stack)


def describe_stall(seconds: float, places: Sequence[Place], missing: Sequence[int] = ()) -> str:
    """One sentence: which ranks hold the others up. `missing` ranks have not reported where they are."""
    waiting = [place for place in places if place.waits]
    busy = [str(place) for place in places if not place.waits]
    busy += [f"rank {rank} has not reported where it is" for rank in missing]
    if not busy:
        named = listed([f"rank {place.rank} ({place.process}) in {place.where}" for place in waiting])
        return f"no step for {seconds:.0f} s: all ranks wait for each other, {named}"
    message = f"no step for {seconds:.0f} s: {listed(busy)}"
    if waiting:
        where = Counter(place.where for place in waiting).most_common(1)[0][0]
        message += f"; the others wait for {'it' if len(busy) == 1 else 'them'} in {where}"
    return message


def listed(parts: Sequence[str]) -> str:
    """The first MOST_NAMED parts, and how many more there are."""
    more = len(parts) - MOST_NAMED
    return ", ".join(parts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
