"""Traces of optimizer steps by PyTorch's profiler, for Perfetto or chrome://tracing, and snapshots of GPU memory.

The settings name the steps, or somebody asks for them while the run is running: `echo 5 > RUN/profile` traces the next
five steps. The ranks do not wait for each other for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kraken_train.common.errors import ConfigError
from kraken_train.parallel.ranks import Runtime
from kraken_train.run.folder import RunFolder
from kraken_train.run.layout import PROFILE_REQUEST, PROFILES
from kraken_train.settings.inspection import ProfileConfig

MOST_MEMORY_EVENTS = 200_000  # allocations and frees, the newest
MOST_REQUESTED = 100  # steps; a trace of more is too large to be looked at


def require_usable(config: ProfileConfig, runtime: Runtime) -> None:
    """Raises ConfigError for ranks that do not exist, and for GPU memory where there is no GPU."""
    absent = [rank for rank in config.ranks if rank >= runtime.world_size]
    if absent:
        raise ConfigError(
            f"profile.ranks={list(config.ranks)}: there is no rank {absent[0]} among the {runtime.world_size} of this "
            "run, which are counted from 0"
        )
    if config.memory and runtime.device.type != "cuda":
        raise ConfigError("profile.memory=true records the memory of a GPU, and this run is on the CPU; use false")


class StepProfiler:
    """On one rank: `of_step` is the context of each step. As a context manager it writes a trace that is under way."""

    def __init__(self, config: ProfileConfig, run: RunFolder, runtime: Runtime) -> None:
        self.config = config
        self.request = run.path / PROFILE_REQUEST
        self.folder = run.start / PROFILES
        self.rank = runtime.rank
        self.device = runtime.device
        self.first, self.last = config.steps or (0, -1)  # the steps to trace next
        self.seen = self.requested_at()  # a request of an earlier start is not one of this
        self.under_way: profile | None = None
        self.step = 0  # the newest

    @contextmanager
    def of_step(self, step: int, may_begin: bool) -> Iterator[None]:
        """The context of an optimizer step. A request counts from a step on in which it `may_begin`."""
        self.step = step
        if self.rank not in self.config.ranks:
            yield
            return
        if may_begin and self.under_way is None:
            self.read_request(step)
        if self.under_way is None and self.first <= step <= self.last:
            self.begin(step)
        if self.under_way is None:
            yield
            return
        with record_function(f"step {step}"):
            yield
        if step >= self.last:
            self.end()

    def read_request(self, step: int) -> None:
        """Take over what `echo STEPS > RUN/profile` asks for."""
        requested = self.requested_at()
        if requested == self.seen:
            return
        self.seen = requested
        try:
            steps = int(self.request.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            steps = 0
        if 1 <= steps <= MOST_REQUESTED:
            self.first, self.last = step, step + steps - 1
        else:
            print_note(f"{self.request} must hold a number of steps from 1 to {MOST_REQUESTED}; nothing is traced")

    def requested_at(self) -> int | None:
        try:
            return self.request.stat().st_mtime_ns
        except OSError:
            return None

    def begin(self, step: int) -> None:
        self.first = step
        if self.config.memory:
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.under_way = profile(activities=activities, record_shapes=True)
        self.under_way.start()

    def end(self) -> None:
        """Write the trace, if one is under way. A full disk does not stop the run."""
        finished, self.under_way = self.under_way, None
        if finished is None:
            return
        finished.stop()
        name = f"rank-{self.rank:05d}-steps-{self.first}-{self.step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / f"{name}.json.gz"
            finished.export_chrome_trace(str(trace))
            if self.config.memory:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}-memory.pickle"))
            print_note(f"wrote {trace}; open it at https://ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            print_note(f"the trace could not be written: {error}")
        finally:
            if self.config.memory:
                torch.cuda.memory._record_memory_history(enabled=None)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def print_note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
