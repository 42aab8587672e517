"""Ends a job in which a rank no longer answers, or no step completes. Collectives alone would wait for that.

Every rank writes a heartbeat with a counter to the store of the process group, and watches the heartbeat of the next
rank, so the store gets five small requests per rank and heartbeat for any number of ranks. A rank whose neighbour's
counter does not change writes a JobFailure that names the neighbour to the store, and all ranks end.

A rank that writes heartbeats can still hang. A rank that has completed no step for too long asks all ranks where they
are, and reports those that do not wait for other ranks. Before they end, all running ranks write their stacks.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
import torch.distributed as dist

from kraken_train.health.heartbeat import DONE, FAILED, RUNNING, Heartbeat, HeartbeatStore, JobFailure
from kraken_train.health.shutdown import LAUNCHER_SECONDS, Interrupted, Launchers, StopRequest
from kraken_train.health.stack_dump import Place, describe_stall, where_is_main_thread, write_stacks
from kraken_train.parallel.ranks import Runtime

HEARTBEAT_SECONDS = 2.0
STARTING_SECONDS = 120.0  # added to the timeout for a rank that has not written its first heartbeat
RECORD_SECONDS = 30.0  # for a rank to record why it ends; limited because a hanging disk may be the cause
FAILED_SECONDS = 10.0  # for a job to end by itself once a rank has failed
LEAVING_SECONDS = 10.0  # for the rank that holds the store to wait at the end for the other ranks
FAILED_EXIT_CODE = 1
FIRST_STEP_FACTOR = 3  # the first step of a start may take so many times longer: reading a checkpoint, compilation
PLACE_HEARTBEATS = 5  # to wait for the other ranks to write where they are
HEARTBEATS_BEFORE_EXIT = 3  # for all ranks to read that the job ends, and to record it, before the first one exits


class StallTimer:
    """For how many seconds a value has not changed."""

    def __init__(self, now: float = 0.0) -> None:
        self.since = now
        self.value: object = None

    def seconds(self, value: object, now: float) -> float:
        if value != self.value:
            self.since, self.value = now, value
        return now - self.since


class Watchdog:
    """A context with two background threads: one exchanges heartbeats, one watches the neighbour and the launchers.

    `store` is the store of the process group, `store_rank` the rank whose process holds it, None if the launcher does.
    A neighbour that does not answer for `timeout_seconds` ends the job: its process is killed if it is on this
    machine, and all ranks exit with code 1. The job also ends when there is no `report_progress()` and no further
    `step` for `step_seconds`, three times that before the first step. 0 turns each limit off. The end of a launcher
    becomes a request to `stop`; LAUNCHER_SECONDS later the process exits with code 1.

    Before it ends the job a rank writes its stacks to standard error and to `log`, and calls `on_end` with the message
    and whether this rank ends only because of other ranks.

    Leaving with an exception other than Interrupted reports to the other ranks that this rank has failed.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: dist.Store | None,
        timeout_seconds: float,
        stop: StopRequest,
        store_rank: int | None = 0,
        step_seconds: float = 0.0,
    ) -> None:
        self.rank, self.world_size, self.store_rank = runtime.rank, runtime.world_size, store_rank
        self.timeout_seconds, self.step_seconds = timeout_seconds, step_seconds
        self.stop = stop
        self.log: Path | None = None  # of this rank, once it is open
        self.on_end: Callable[[str, bool], None] = lambda message, follows: None
        self.step: int | None = None  # the last completed one, set by the trainer
        self.progress_reports = 0  # between steps
        self.state = RUNNING
        self.heartbeats = 0
        self.host, self.started = socket.gethostname(), psutil.Process().create_time()
        self.store: HeartbeatStore | None = None
        self.interval = HEARTBEAT_SECONDS
        limits = [seconds for seconds in (timeout_seconds, step_seconds) if seconds > 0]
        if limits:
            self.interval = min(HEARTBEAT_SECONDS, min(limits) / 5)
        if store is not None and limits and self.world_size > 1:
            self.store = HeartbeatStore(store, limits[0])

        # Set by the store thread.
        self.watched = (self.rank + 1) % self.world_size
        self.neighbour: Heartbeat | None = None
        self.store_holder: Heartbeat | None = None
        self.exchanges = 0  # that the store has answered
        self.failure_of_others: JobFailure | None = None  # with which another rank ends the job
        self.stall_failure: JobFailure | None = None  # with which this rank must end the job
        self.collects_places = False  # this rank was the first to report a stall
        self.heartbeats_collecting = 0

        # Set by the watching thread.
        self.stalled: float | None = None  # the limit in seconds that a step has exceeded
        self.failure: JobFailure | None = None  # with which this rank is ending
        self.launcher_ended: float | None = None
        self.store_stall, self.neighbour_stall, self.step_stall = StallTimer(), StallTimer(), StallTimer()
        self.warned_about_store = False

        self.stacks_written = False  # or being written
        self.leaving = threading.Event()
        self.store_thread = threading.Thread(target=self.exchange_until_left, name="watchdog-store", daemon=True)
        self.watcher = threading.Thread(target=self.watch, name="watchdog-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self.launchers = Launchers()
        if self.store is not None:
            self.store_thread.start()
        if self.store is not None or self.launchers or self.step_seconds > 0:
            self.watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.state = DONE if kind is None or issubclass(kind, Interrupted) else FAILED
        self.leaving.set()
        if self.store_thread.ident is not None:
            self.store_thread.join(LEAVING_SECONDS)  # it may hang in a store that does not answer
        if self.watcher.ident is not None:
            self.watcher.join()  # never returns if the watcher is ending the job
        if self.state == FAILED and self.failure_of_others is not None:
            os._exit(FAILED_EXIT_CODE)  # the error only follows from the failure that another rank has reported

    def report_progress(self) -> None:
        """Report that something other than a step that may take long is done: a save, a validation, a restore."""
        self.progress_reports += 1

    def wait_for_end(self) -> None:
        """Never returns if this rank is ending the job: any error from then on is only a consequence."""
        if self.failure is not None:
            self.watcher.join()

    # ----------------------------------------------------------------------------------------------------------
    # The store thread. A stopped store answers no request, and no timeout ends the wait: only this thread may wait
    # ----------------------------------------------------------------------------------------------------------

    def exchange_until_left(self) -> None:
        assert self.store is not None
        try:
            while not self.leaving.is_set():
                self.exchange(self.store)
                self.leaving.wait(self.interval)
            self.exchange(self.store)
            self.leave(self.store)
        except RuntimeError:  # the store is gone, which the watching thread will notice
            pass

    def exchange(self, store: HeartbeatStore) -> None:
        """Write this rank's heartbeat, and read what the other ranks have written."""
        self.heartbeats += 1
        store.write_heartbeat(
            Heartbeat(self.rank, os.getpid(), self.host, self.started, self.heartbeats, self.step, self.state)
        )
        if self.failure is not None:
            store.write_failure(self.failure)
        else:
            self.failure_of_others = store.read_failure()
        if self.store_rank is not None and self.store_holder is None:
            self.store_holder = store.read_heartbeat(self.store_rank)
        if self.watched != self.rank:
            self.neighbour = store.read_heartbeat(self.watched)
            if self.neighbour is not None and self.neighbour.state == DONE:
                self.watched = (self.watched + 1) % self.world_size  # the rank that the finished one watched
                self.neighbour = None
        if self.stalled is not None or store.stall_reported():
            self.report_place(store)
        self.exchanges += 1

    def report_place(self, store: HeartbeatStore) -> None:
        """Write where this rank is, as all ranks do after a stall. The first rank to write collects the places."""
        if not self.stacks_written:
            self.stacks_written = True
            self.collects_places = store.write_place(self.own_place())
            reason = f"rank {self.rank} has completed no step for too long, or another rank has not"
            start_writing(lambda: write_stacks(reason, self.log))
        if not self.collects_places or self.stall_failure is not None:
            return
        places = {rank: store.read_place(rank) for rank in range(self.world_size)}
        missing = [rank for rank, place in places.items() if place is None and not store.is_done(rank)]
        self.heartbeats_collecting += 1
        if not missing or self.heartbeats_collecting > PLACE_HEARTBEATS:
            self.stall_failure = self.failure_at([place for place in places.values() if place is not None], missing)

    def failure_at(self, places: list[Place], missing: list[int]) -> JobFailure:
        """The failure of the ranks that do not wait for others; `missing` ranks have not written where they are."""
        culprits = [place.rank for place in places if not place.waits]
        message = describe_stall(self.stalled or self.step_seconds, places, missing)
        return JobFailure(message, None, tuple(culprits or [self.rank]))

    def own_place(self) -> Place:
        where, waits = where_is_main_thread()
        return Place(self.rank, f"process {os.getpid()} on {self.host}", where, waits)

    def leave(self, store: HeartbeatStore) -> None:
        """Count this rank as left. The rank that holds the store waits for the others, which it would cut off."""
        left = store.count_left(1)
        if self.rank != self.store_rank or self.state == FAILED:
            return
        deadline = time.monotonic() + LEAVING_SECONDS
        while left < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            left = store.count_left()

    # ----------------------------------------------------------------------------------------------------------
    # The watching thread
    # ----------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        awake, previous = 0.0, time.monotonic()
        while not self.leaving.wait(self.interval):
            # Time in which this process itself was stopped counts against no rank.
            now = time.monotonic()
            awake += min(now - previous, 2 * self.interval)
            previous = now
            self.watch_launchers(awake)
            self.watch_steps(awake)
            if self.store is not None:
                self.watch_ranks(awake)

    def watch_launchers(self, awake: float) -> None:
        if self.launcher_ended is None:
            if self.launchers.have_ended():
                self.launcher_ended = awake
                self.stop.request("its launcher has ended")
        elif awake - self.launcher_ended > LAUNCHER_SECONDS:
            message = f"rank {self.rank} has not ended in the {LAUNCHER_SECONDS:.0f} s since its launcher has"
            self.end_job(JobFailure(message, None, (self.rank,)))

    def watch_steps(self, awake: float) -> None:
        limit = self.step_seconds * (FIRST_STEP_FACTOR if self.step is None else 1)
        stalled = self.step_stall.seconds((self.step, self.progress_reports), awake)
        if limit == 0 or stalled <= limit:
            return
        # Without other ranks, or where these have reached no conclusion, this rank reports only itself.
        if self.store is None or stalled > limit + 4 * PLACE_HEARTBEATS * self.interval:
            self.end_job(JobFailure(describe_stall(limit, [self.own_place()]), None, (self.rank,)))
        self.stalled = limit  # the store thread then asks the other ranks

    def watch_ranks(self, awake: float) -> None:
        if self.failure_of_others is not None:
            self.end_job(self.failure_of_others, is_reporter=False)
        if self.stall_failure is not None:
            self.end_job(self.stall_failure)
        if self.timeout_seconds > 0:
            self.watch_neighbour(awake)

    def watch_neighbour(self, awake: float) -> None:
        stalled = self.store_stall.seconds(self.exchanges, awake)
        if stalled > 2 * self.interval:  # without the store nothing is known about the neighbour
            self.neighbour_stall = StallTimer(awake)
            if stalled > self.timeout_seconds:
                self.handle_stalled_store()
            return
        neighbour = self.neighbour
        stalled = self.neighbour_stall.seconds(None if neighbour is None else (neighbour.rank, neighbour.count), awake)
        if neighbour is None:
            if self.watched != self.rank and stalled > self.timeout_seconds + STARTING_SECONDS:
                message = f"rank {self.watched} has not answered since the ranks joined"
                self.end_job(JobFailure(message, None, (self.rank,)))
        elif neighbour.state == FAILED:
            if stalled > min(FAILED_SECONDS, self.timeout_seconds):
                self.end_job(JobFailure(f"{neighbour} has failed, see its message", neighbour, (neighbour.rank,)))
        elif stalled > self.timeout_seconds:
            self.end_job(JobFailure(self.describe_timeout(neighbour), neighbour, (self.rank,)))

    def handle_stalled_store(self) -> None:
        """End the job if the rank that holds the store does not answer; only warn if it is the launcher."""
        if self.store_rank is None:
            # Training does not need the launcher, and `watch_launchers` handles a launcher that has ended.
            if not self.warned_about_store and self.launcher_ended is None:
                print_error(
                    f"warning: the launcher does not answer rank {self.rank}, whose neighbour is not watched now"
                )
            self.warned_about_store = True
        elif self.store_rank != self.rank:
            # Each rank notices this by itself, since none can write to the store. One rank prints the message.
            is_reporter = self.watched == self.store_rank
            holder = (self.neighbour if is_reporter else None) or self.store_holder
            holder = holder or Heartbeat(self.store_rank, 0, "an unknown machine", 0.0, 0, None, RUNNING)
            ranks = (self.rank,) if is_reporter else ()
            self.end_job(JobFailure(self.describe_timeout(holder), holder, ranks), is_reporter)

    def describe_timeout(self, heartbeat: Heartbeat) -> str:
        # Ranks do steps together, so this rank's last step may be newer than the one in the other's last heartbeat.
        step = max((step for step in (heartbeat.step, self.step) if step is not None), default=None)
        steps = "it has completed no step" if step is None else f"its last completed step is {step}"
        return f"{heartbeat} has not answered for {self.timeout_seconds:.0f} s ({steps})"

    def end_job(self, failure: JobFailure, is_reporter: bool = True) -> None:
        """Exit with FAILED_EXIT_CODE; never returns. `is_reporter`: this rank prints the message."""
        self.failure = failure  # from now on the store thread writes it to the store
        recording = start_writing(lambda: self.record_end(failure, is_reporter))
        # For all ranks to read and record it before the first process exits.
        time.sleep(HEARTBEATS_BEFORE_EXIT * self.interval)
        recording.join(RECORD_SECONDS)
        if failure.culprit is not None:
            failure.culprit.kill()
        os._exit(FAILED_EXIT_CODE)

    def record_end(self, failure: JobFailure, is_reporter: bool) -> None:
        if is_reporter:
            print_error(
                f"error: {failure.message}; the job is ended. The same command continues from the newest checkpoint"
            )
        if not self.stacks_written:
            self.stacks_written = True
            write_stacks(f"rank {self.rank} is ended", self.log)
        self.on_end(failure.message, self.rank not in failure.ranks)


def start_writing(write: Callable[[], None]) -> threading.Thread:
    """Call `write` in a thread, as it may never return from a disk that hangs."""
    thread = threading.Thread(target=write, name="watchdog-write", daemon=True)
    thread.start()
    return thread


def print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
