"""A rank that counts steps together with the others, watched, until it is asked to stop.

Usage, under a launcher: watched_rank.py FOLDER TIMEOUT_SECONDS MODE. It leaves in FOLDER `RANK.pid` once it runs,
`RANK.saved`, with the reason, when it ends because it was asked to, `RANK.log` with its stacks where these are written,
and `RANK.end`, with the message and whether it follows others, when the watchdog ends it. MODE is

    together    steps that all ranks do together; what a stopped rank holds up
    alone       30 steps without any communication, in which rank 0 is the fastest
    failing     the last rank raises, and the others do not see it
    hanging=K   steps together, of which rank K never completes the tenth; the limit for a step is TIMEOUT_SECONDS, and
                no rank is silent
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from kraken_train.interruption import INTERRUPTED_EXIT_CODE, Interrupted, StopRequest
from kraken_train.rendezvous import launcher_holds_store
from kraken_train.runtime import Runtime, read_runtime
from kraken_train.stacks import stacks_on_signal
from kraken_train.watchdog import Watchdog


def run(runtime: Runtime, folder: Path, timeout_seconds: float, mode: str) -> None:
    with ExitStack() as held:
        stop = StopRequest()
        held.enter_context(stop.on_signals())
        minute = timedelta(minutes=1)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=minute))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=minute)
        store_rank = None if launcher_holds_store() else 0
        mode, _, hanging = mode.partition("=")
        limits = (0.0, stop, store_rank, timeout_seconds) if hanging else (timeout_seconds, stop, store_rank)
        watchdog = held.enter_context(Watchdog(runtime, store, *limits))
        watchdog.log = folder / f"{rank}.log"
        watchdog.on_end = lambda message, follows: write(folder / f"{rank}.end", f"{follows} {message}")
        held.enter_context(stacks_on_signal(watchdog.log))
        write(folder / f"{rank}.pid", str(os.getpid()))
        for step in range(1, 31 if mode in ("alone", "failing") else 1000):
            time.sleep({"alone": 0.1 * (1 + rank), "failing": 1}.get(mode, 0.1))
            if step == 10 and hanging == str(rank):
                read_for_ever()
            if mode == "failing" and rank == world_size - 1:
                raise RuntimeError("this rank has failed")
            if mode in ("together", "hanging") and not runtime.all_true(not stop.requested):
                write(folder / f"{rank}.saved", str(stop.reason))
                raise Interrupted(stop.reason)
            watchdog.step = step


def read_for_ever() -> None:
    time.sleep(1000)


def write(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    runtime = read_runtime()
    try:
        run(runtime, Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
        if runtime.is_first:
            sys.exit()  # before the others
        time.sleep(1)
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
