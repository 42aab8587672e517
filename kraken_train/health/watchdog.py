"""Ends a job in which a rank has stopped answering, or no step completes, which collectives alone would wait for.

Every rank beats: it writes a counter to the store through which the ranks have joined. Every rank watches the next
one, so the store has five small requests per rank and beat however many ranks there are. Whoever finds that its
neighbour's counter stands still names it, leaves word for the others in the store, and all of them end.

A rank that beats can still hang. Whoever has done no step for too long asks all ranks where they are, and names those
that do not wait for others. Before they end, all living ranks write their stacks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from kraken_train.health.shutdown import LAUNCHER_SECONDS, Interrupted, Launchers, StopRequest
from kraken_train.health.stack_dump import Place, describe_stall, where_is_main_thread, write_stacks
from kraken_train.parallel.ranks import Runtime

BEAT_SECONDS = 2.0
STARTING_SECONDS = 120.0  # more than the timeout, for a rank that has not beaten yet
NOTING_SECONDS = 30.0  # for a rank to note why it ends: a disk that hangs may be what ends it
FAILED_SECONDS = 10.0  # for a job to end by itself once a rank has failed
LEAVING_SECONDS = 10.0  # how long the rank that holds the store stays for the others at the end
FAILED_EXIT_CODE = 1
FIRST_STEP_FACTOR = 3  # the first step of a start may take so many times longer: reading a checkpoint, compilation
PLACE_BEATS = 5  # for the others to say where they are
BEATS_TO_LEAVE = 3  # for all to hear that the job ends, and to note it, before the first of them is gone

RUNNING, DONE, FAILED = "running", "done", "failed"


@dataclass(frozen=True)
class Beat:
    """What a rank writes of itself."""

    rank: int
    pid: int
    host: str
    started: float  # seconds since the epoch on its machine
    count: int  # beats so far
    step: int | None  # the last completed one; None before the first
    state: str  # RUNNING, DONE or FAILED

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def kill(self) -> None:
        """Kill it, if it is on this machine and still there. A stopped process ends by no other signal."""
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 2:  # or else its number has another process now
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            pass


@dataclass(frozen=True)
class Verdict:
    """Why a job is ended."""

    message: str
    culprit: Beat | None  # is killed
    ranks: tuple[int, ...]  # those who fail by it; the others only follow


class Silence:
    """For how many seconds a value has not changed."""

    def __init__(self, now: float = 0.0) -> None:
        self.since = now
        self.value: object = None

    def seconds(self, value: object, now: float) -> float:
        if value != self.value:
            self.since, self.value = now, value
        return now - self.since


class Watchdog:
    """A context in which this rank beats, and its neighbour and its launchers are watched, all in threads of its own.

    `store` is the one that the ranks have joined through, `store_rank` the rank whose process holds it, None if the
    launcher does. A neighbour that does not answer for `timeout_seconds` ends the job: the process is killed where it
    is on this machine, and all ranks exit with code 1. So they do when there is no `alive()` and no further `step` for
    `step_seconds`, three times that before the first step. 0 turns each off. A launcher's end becomes a request to
    `stop`; LAUNCHER_SECONDS later the process exits with code 1.

    Before it ends the job a rank writes its stacks to standard error and to `log`, and calls `on_end` with the message
    and whether this rank merely follows others.

    Leaving with an exception other than Interrupted tells the others that this rank has failed.
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
        self.log: Path | None = None  # of this rank, once there is one
        self.on_end: Callable[[str, bool], None] = lambda message, follows: None
        self.step: int | None = None  # the last completed one, as the trainer tells
        self.signs = 0  # of life, between steps
        self.state = RUNNING
        self.beats = 0
        self.host, self.started = socket.gethostname(), psutil.Process().create_time()
        self.store: dist.Store | None = None
        self.interval = BEAT_SECONDS
        limits = [seconds for seconds in (timeout_seconds, step_seconds) if seconds > 0]
        if limits:
            self.interval = min(BEAT_SECONDS, min(limits) / 5)
        if store is not None and limits and self.world_size > 1:
            # A connection of its own: a store's lock is held while somebody waits in it.
            self.store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
            self.store.set_timeout(timedelta(seconds=limits[0]))

        # What the talking thread has heard, and found when it asked.
        self.watched = (self.rank + 1) % self.world_size
        self.neighbour: Beat | None = None
        self.holder: Beat | None = None  # of the store
        self.answers = 0  # of the store
        self.heard: Verdict | None = None  # by which another rank has ended the job
        self.found: Verdict | None = None  # by which this one is to end it
        self.asks = False  # where the others are
        self.unanswered = 0  # beats since it has asked

        # What the watching thread has found.
        self.stalled: float | None = None  # seconds without a step
        self.verdict: Verdict | None = None  # by which this rank is ending
        self.launcher_ended: float | None = None
        self.store_silence, self.neighbour_silence, self.step_silence = Silence(), Silence(), Silence()
        self.warned = False

        self.placed = False  # has said where it is, and written its stacks
        self.leaving = threading.Event()
        self.talker = threading.Thread(target=self.talk, name="watchdog-talk", daemon=True)
        self.watcher = threading.Thread(target=self.watch, name="watchdog-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self.launchers = Launchers()
        if self.store is not None:
            self.talker.start()
        if self.store is not None or self.launchers or self.step_seconds > 0:
            self.watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.state = DONE if kind is None or issubclass(kind, Interrupted) else FAILED
        self.leaving.set()
        if self.talker.ident is not None:
            self.talker.join(LEAVING_SECONDS)  # it may never come back from a store that does not answer
        if self.watcher.ident is not None:
            self.watcher.join()  # for good, if it is ending the job
        if self.state == FAILED and self.heard is not None:
            os._exit(FAILED_EXIT_CODE)  # the error is only what follows from what another rank has told

    def alive(self) -> None:
        """Something other than a step that may take long is done: a save, a validation, a restore."""
        self.signs += 1

    def wait_for_end(self) -> None:
        """Never returns if this rank is ending the job: what goes wrong from then on is only what follows."""
        if self.verdict is not None:
            self.watcher.join()

    # ----------------------------------------------------------------------------------------------------------
    # The talking thread. A store that is stopped answers no request and no timeout ends it: only this one waits
    # ----------------------------------------------------------------------------------------------------------

    def talk(self) -> None:
        assert self.store is not None
        try:
            while not self.leaving.is_set():
                self.communicator(self.store)
                self.leaving.wait(self.interval)
            self.communicator(self.store)
            self.take_leave(self.store)
        except RuntimeError:  # the store is gone, which the watching thread will see
            pass

    def communicator(self, store: dist.Store) -> None:
        self.beats += 1
        beat = Beat(self.rank, os.getpid(), self.host, self.started, self.beats, self.step, self.state)
        store.set(f"beat/{self.rank}", encode(beat))
        if self.verdict is not None:
            store.set("ended", encode(self.verdict))
        else:
            self.heard = read_verdict(store)
        if self.store_rank is not None and self.holder is None:
            self.holder = read(store, f"beat/{self.store_rank}")
        if self.watched != self.rank:
            self.neighbour = read(store, f"beat/{self.watched}")
            if self.neighbour is not None and self.neighbour.state == DONE:
                self.watched = (self.watched + 1) % self.world_size  # whom it does not watch any more
                self.neighbour = None
        if self.stalled is not None or store.check(["stalled"]):
            self.tell_place(store)
        self.answers += 1

    def tell_place(self, store: dist.Store) -> None:
        """Say where this rank is, as all do once one of them has done no step for too long. The first one concludes."""
        if not self.placed:
            self.placed = True
            store.set(f"place/{self.rank}", encode(self.own_place()))
            self.asks = store.add("stalled", 1) == 1
            reason = f"rank {self.rank} has completed no step for too long, or another rank has not"
            begin(lambda: write_stacks(reason, self.log))
        if not self.asks or self.found is not None:
            return
        places = {rank: read_place(store, rank) for rank in range(self.world_size)}
        silent = [rank for rank, place in places.items() if place is None and not self.is_done(store, rank)]
        self.unanswered += 1
        if not silent or self.unanswered > PLACE_BEATS:
            self.found = self.conclude([place for place in places.values() if place is not None], silent)

    def is_done(self, store: dist.Store, rank: int) -> bool:
        beat = read(store, f"beat/{rank}")
        return beat is not None and beat.state == DONE

    def conclude(self, places: list[Place], silent: list[int]) -> Verdict:
        culprits = [place.rank for place in places if not place.waits]
        message = describe_stall(self.stalled or self.step_seconds, places, silent)
        return Verdict(message, None, tuple(culprits or [self.rank]))

    def own_place(self) -> Place:
        where, waits = where_is_main_thread()
        return Place(self.rank, f"process {os.getpid()} on {self.host}", where, waits)

    def take_leave(self, store: dist.Store) -> None:
        left = store.add("left", 1)
        if self.rank != self.store_rank or self.state == FAILED:
            return
        # The store goes with this process, and the others would complain.
        deadline = time.monotonic() + LEAVING_SECONDS
        while left < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            left = store.add("left", 0)

    # ----------------------------------------------------------------------------------------------------------
    # The watching thread
    # ----------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        awake, previous = 0.0, time.monotonic()
        while not self.leaving.wait(self.interval):
            # Time in which this process itself was stopped is nobody's silence.
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
            self.end_job(Verdict(message, None, (self.rank,)))

    def watch_steps(self, awake: float) -> None:
        limit = self.step_seconds * (FIRST_STEP_FACTOR if self.step is None else 1)
        silent = self.step_silence.seconds((self.step, self.signs), awake)
        if limit == 0 or silent <= limit:
            return
        # Without others, or where they have come to no conclusion, this rank can speak for itself only.
        if self.store is None or silent > limit + 4 * PLACE_BEATS * self.interval:
            self.end_job(Verdict(describe_stall(limit, [self.own_place()]), None, (self.rank,)))
        self.stalled = limit  # so that the talking thread asks

    def watch_ranks(self, awake: float) -> None:
        if self.heard is not None:
            self.end_job(self.heard, speaks=False)
        if self.found is not None:
            self.end_job(self.found)
        if self.timeout_seconds > 0:
            self.watch_neighbour(awake)

    def watch_neighbour(self, awake: float) -> None:
        silent = self.store_silence.seconds(self.answers, awake)
        if silent > 2 * self.interval:  # it tells nothing of the neighbour
            self.neighbour_silence = Silence(awake)
            if silent > self.timeout_seconds:
                self.end_without_store()
            return
        neighbour = self.neighbour
        silent = self.neighbour_silence.seconds(None if neighbour is None else (neighbour.rank, neighbour.count), awake)
        if neighbour is None:
            if self.watched != self.rank and silent > self.timeout_seconds + STARTING_SECONDS:
                message = f"rank {self.watched} has not answered since the ranks joined"
                self.end_job(Verdict(message, None, (self.rank,)))
        elif neighbour.state == FAILED:
            if silent > min(FAILED_SECONDS, self.timeout_seconds):
                self.end_job(Verdict(f"{neighbour} has failed, see its message", neighbour, (neighbour.rank,)))
        elif silent > self.timeout_seconds:
            self.end_job(Verdict(self.describe_silence(neighbour), neighbour, (self.rank,)))

    def end_without_store(self) -> None:
        if self.store_rank is None:
            # Training does not need the launcher, and if it has ended that is dealt with.
            if not self.warned and self.launcher_ended is None:
                tell(f"warning: the launcher does not answer rank {self.rank}, whose neighbour is not watched now")
            self.warned = True
        elif self.store_rank != self.rank:
            # All ranks see it by themselves, and could not be told. One speaks.
            speaks = self.watched == self.store_rank
            beat = (self.neighbour if speaks else None) or self.holder
            beat = beat or Beat(self.store_rank, 0, "an unknown machine", 0.0, 0, None, RUNNING)
            ranks = (self.rank,) if speaks else ()
            self.end_job(Verdict(self.describe_silence(beat), beat, ranks), speaks)

    def describe_silence(self, beat: Beat) -> str:
        # Steps are done together, so what this rank has completed may be newer than what the other could tell.
        step = max((step for step in (beat.step, self.step) if step is not None), default=None)
        steps = "it has completed no step" if step is None else f"its last completed step is {step}"
        return f"{beat} has not answered for {self.timeout_seconds:.0f} s ({steps})"

    def end_job(self, verdict: Verdict, speaks: bool = True) -> None:
        """Does not return. `speaks` says that this rank is the one that tells why."""
        self.verdict = verdict  # from now on the talking thread tells it
        noting = begin(lambda: self.note_end(verdict, speaks))
        # For all to read and note it before they see a process end.
        time.sleep(BEATS_TO_LEAVE * self.interval)
        noting.join(NOTING_SECONDS)
        if verdict.culprit is not None:
            verdict.culprit.kill()
        os._exit(FAILED_EXIT_CODE)

    def note_end(self, verdict: Verdict, speaks: bool) -> None:
        if speaks:
            tell(f"error: {verdict.message}; the job is ended. The same command continues from the newest checkpoint")
        if not self.placed:
            self.placed = True
            write_stacks(f"rank {self.rank} is ended", self.log)
        self.on_end(verdict.message, self.rank not in verdict.ranks)


def begin(write: Callable[[], None]) -> threading.Thread:
    """Writing, in a thread of its own: with a disk that hangs it may never end."""
    thread = threading.Thread(target=write, name="watchdog-write", daemon=True)
    thread.start()
    return thread


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def encode(told: Beat | Place | Verdict) -> str:
    return json.dumps(asdict(told))


def read_json(store: dist.Store, key: str) -> dict[str, Any] | None:
    """What is under `key`; None if there is nothing (where `get` would wait for it)."""
    return json.loads(store.get(key)) if store.check([key]) else None


def read(store: dist.Store, key: str) -> Beat | None:
    told = read_json(store, key)
    return None if told is None else Beat(**told)


def read_place(store: dist.Store, rank: int) -> Place | None:
    told = read_json(store, f"place/{rank}")
    return None if told is None else Place(**told)


def read_verdict(store: dist.Store) -> Verdict | None:
    told = read_json(store, "ended")
    if told is None:
        return None
    culprit = told["culprit"]
    return Verdict(told["message"], None if culprit is None else Beat(**culprit), tuple(told["ranks"]))
