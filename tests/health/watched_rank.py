"""A rank that counts steps together with the others, watched, until it is asked to stop.

Usage, under a launcher: watched_rank.py FOLDER TIMEOUT_SECONDS MODE. It leaves in FOLDER `RANK.pid` once it runs,
`RANK.watches` once it has done a step and heard of its neighbour, `RANK.saved`, with the reason, when it ends because
it was asked to, `RANK.log` with its stacks where these are written, and `RANK.end`, with the message and whether it
follows others, when the watchdog ends it. MODE is

    together    steps that all ranks do together; what a stopped rank holds up
    alone       steps without any communication, until FOLDER has `leave`; rank 0 leaves first, with the store
    failing     the last rank raises, and the others do not see it; rank 0 gives it time until it has ended
    hanging=K   steps together, of which rank K does not complete the one that begins when FOLDER has `hang`; the limit
                for a step is TIMEOUT_SECONDS, and no rank is silent
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from kraken_train.health import watchdog
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE, Interrupted, StopRequest, has_ended
from kraken_train.health.stack_dump import stacks_on_signal
from kraken_train.health.watchdog import Watchdog
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.parallel.rendezvous import launcher_holds_store

HOUR = 3600.0  # seconds that no test takes


def run(runtime: Runtime, folder: Path, timeout_seconds: float, mode: str) -> None:
    with ExitStack() as held:
        stop = StopRequest()
        held.enter_context(stop.on_signals())
        limit = timedelta(minutes=15)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        store_rank = None if launcher_holds_store() else 0
        mode, _, hanging = mode.partition("=")
        limits = (0.0, stop, store_rank, timeout_seconds) if hanging else (timeout_seconds, stop, store_rank)
        dog = held.enter_context(Watchdog(runtime, store, *limits))
        dog.log = folder / f"{rank}.log"
        dog.on_end = lambda message, follows: write(folder / f"{rank}.end", f"{follows} {message}")
        held.enter_context(stacks_on_signal(dog.log))
        write(folder / f"{rank}.pid", str(os.getpid()))
        for step in itertools.count(1):
            time.sleep(0.1)
            if hanging == str(rank) and (folder / "hang").exists():
                read_for_ever()
            if mode == "failing":
                if rank == world_size - 1 and dog.neighbour is not None:
                    raise RuntimeError("this rank has failed")
                if rank == 0 and has_left(folder, world_size - 1):
                    watchdog.FAILED_SECONDS = 0.0
            if mode in ("together", "hanging") and not runtime.all_true(not stop.requested):
                write(folder / f"{rank}.saved", str(stop.reason))
                raise Interrupted(stop.reason)
            dog.step = step
            if dog.neighbour is not None and not (folder / f"{rank}.watches").exists():
                write(folder / f"{rank}.watches", str(step))
            if mode == "alone" and ((folder / "leave").exists() if rank == 0 else dog.watched == rank):
                break


def has_left(folder: Path, rank: int) -> bool:
    """Whether this rank's process has run, and has ended."""
    file = folder / f"{rank}.pid"
    try:
        return file.exists() and has_ended(psutil.Process(int(file.read_text())))
    except psutil.NoSuchProcess:
        return True


def read_for_ever() -> None:
    time.sleep(HOUR)


def write(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    # What others wait for at the end of a run lasts until it is there.
    watchdog.LEAVING_SECONDS = watchdog.FAILED_SECONDS = HOUR
    if sys.argv[3] == "failing":
        watchdog.HEARTBEAT_SECONDS = 0.5
    runtime, folder = read_runtime(), Path(sys.argv[1])
    try:
        run(runtime, folder, float(sys.argv[2]), sys.argv[3])
        while not runtime.is_first and not has_left(folder, 0):
            time.sleep(0.1)
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
