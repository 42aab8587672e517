"""Runs commands on this machine, several at a time, each with cores and perhaps a GPU of its own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.durations import duration
from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_positive

# glibc returns the memory of each large tensor to the system when it is freed, and asks for it again: a sixth to a
# fourth of the time of a small model on a CPU. With these settings (mallopt(3)) a process keeps it. Other C libraries
# ignore them.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other, each only if those before it have succeeded."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path  # their output is appended


@dataclass(frozen=True)
class Place:
    """What one job at a time may use."""

    cores: tuple[int, ...]  # empty: this system cannot bind a process to cores
    gpu: str | None = None  # as in CUDA_VISIBLE_DEVICES


def places(workers: int | None, cores: Sequence[int], gpus: Sequence[str]) -> list[Place]:
    """A place per worker: a GPU each where there are some, and an equal part of the cores.

    `workers` None: one per GPU, or one. Raises ConfigError for more workers than GPUs or cores.
    """
    count = max(1, len(gpus)) if workers is None else workers
    require_positive("workers", count)
    for what, available in (("GPUs", gpus), ("cores", cores)):
        if available and count > len(available):
            raise ConfigError(f"workers={count}, but there are {len(available)} {what} here; use at most so many")
    share = len(cores) // count
    return [
        Place(tuple(cores[i * share : (i + 1) * share]), gpus[i] if gpus else None) for i in range(count)
    ]  # fmt: skip


def run_jobs(jobs: Sequence[Job], at: Sequence[Place], report: Callable[[str], None]) -> list[Job]:
    """Run all jobs, as many at a time as there are places; those that failed, in their order.

    A failure does not stop the others. KeyboardInterrupt asks the running ones to end, waits for them, and is raised.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    pool = Pool(waiting, len(jobs), report)
    with ThreadPoolExecutor(len(at)) as executor:
        workers = [executor.submit(pool.work, place) for place in at]
        try:
            for worker in workers:
                worker.result()
        except KeyboardInterrupt:
            pool.stop()
            raise  # after the threads have ended
    return [job for job in jobs if job.name in pool.failed]


class Pool:
    """What the threads of `run_jobs`, one per place, share."""

    def __init__(self, waiting: queue.SimpleQueue[Job], total: int, report: Callable[[str], None]) -> None:
        self.waiting = waiting
        self.total = total
        self.report = report
        self.failed: set[str] = set()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.is_stopping = False
        self.begun = 0
        self.lock = threading.Lock()

    def work(self, place: Place) -> None:
        if place.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, place.cores)  # of this thread, whose processes inherit it
        while not self.is_stopping:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                return
            with self.lock:
                self.begun += 1
                self.report(f"started {job.name} ({self.begun} of {self.total})")
            start = time.monotonic()
            code = self.run(job, place)
            if self.is_stopping:
                return
            after = f"after {duration(time.monotonic() - start)}"
            if code:
                self.failed.add(job.name)
                self.report(f"FAILED {job.name} {after}, exit code {code}: {last_line(job.log)} (see {job.log})")
            else:
                self.report(f"finished {job.name} {after}")

    def run(self, job: Job, place: Place) -> int:
        """The exit code of the first command that fails, or 0."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            for command in job.commands:
                with self.lock:
                    if self.is_stopping:
                        return 0
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(place))
                    self.running.add(process)
                code = process.wait()
                self.running.discard(process)
                if code:
                    return code
        return 0

    def stop(self) -> None:
        with self.lock:
            self.is_stopping = True
            for process in list(self.running):
                process.terminate()


def interrupt_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does where the program was not started in the background."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def environment(place: Place) -> dict[str, str]:
    """Of a command at a place. What the user has set for threads and memory stays."""
    defaults = {"OMP_NUM_THREADS": str(len(place.cores))} if place.cores else {}
    if place.gpu is None:
        return {**defaults, **KEEP_FREED_MEMORY, **os.environ}
    return {**defaults, **os.environ, "CUDA_VISIBLE_DEVICES": place.gpu}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has printed nothing")


def usable_cores() -> list[int]:
    """Those that this process may run on; none where the system cannot tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch  # noqa: PLC0415 (takes seconds)

    from kraken_train.parallel.ranks import gpu_is_usable  # noqa: PLC0415

    if not gpu_is_usable():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def python(module: str, arguments: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)
