"""Ends a job in which a rank has stopped answering, which collectives alone would wait for.

Every rank beats: it writes a counter to the store through which the ranks have joined. Every rank watches the next
one, so the store has four small requests per rank and beat however many ranks there are. Whoever finds that its
neighbour's counter stands still names it, leaves word for the others in the store, and all of them end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType

import psutil
import torch.distributed as dist

from kraken_train.interruption import INTERRUPTED_EXIT_CODE, Interrupted, Launchers, StopRequest
from kraken_train.runtime import Runtime

BEAT_SECONDS = 2.0
STARTING_SECONDS = 120.0  # more than the timeout, for a rank that has not beaten yet
FAILED_SECONDS = 10.0  # for a job to end by itself once a rank has failed
LEAVING_SECONDS = 10.0  # how long the rank that holds the store stays for the others at the end
LAUNCHER_SECONDS = 300.0  # for a run to finish its step, save and end once its launcher has
FAILED_EXIT_CODE = 1

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
    is on this machine, and all ranks exit with code 1. 0 turns that off. A launcher's end becomes a request to `stop`;
    LAUNCHER_SECONDS later the process exits with INTERRUPTED_EXIT_CODE.

    Leaving with an exception other than Interrupted tells the others that this rank has failed.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: dist.Store | None,
        timeout_seconds: float,
        stop: StopRequest,
        store_rank: int | None = 0,
    ) -> None:
        self.rank, self.world_size, self.store_rank = runtime.rank, runtime.world_size, store_rank
        self.timeout_seconds = timeout_seconds
        self.stop = stop
        self.step: int | None = None  # the last completed one, as the trainer tells
        self.state = RUNNING
        self.beats = 0
        self.host, self.started = socket.gethostname(), psutil.Process().create_time()
        self.store: dist.Store | None = None
        self.interval = BEAT_SECONDS
        if store is not None and timeout_seconds > 0 and self.world_size > 1:
            self.interval = min(BEAT_SECONDS, timeout_seconds / 5)
            # A connection of its own: a store's lock is held while somebody waits in it.
            self.store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
            self.store.set_timeout(timedelta(seconds=timeout_seconds))

        # What the talking thread has heard.
        self.watched = (self.rank + 1) % self.world_size
        self.neighbour: Beat | None = None
        self.holder: Beat | None = None  # of the store
        self.answers = 0  # of the store
        self.ended: Beat | None = None  # the rank for whose sake another one has ended the job

        # What the watching thread has found.
        self.culprit: Beat | None = None
        self.launcher_ended: float | None = None
        self.store_silence, self.neighbour_silence = Silence(), Silence()
        self.warned = False

        self.leaving = threading.Event()
        self.talker = threading.Thread(target=self.talk, name="watchdog-talk", daemon=True)
        self.watcher = threading.Thread(target=self.watch, name="watchdog-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self.launchers = Launchers()
        if self.store is not None:
            self.talker.start()
        if self.store is not None or self.launchers:
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
        if self.state == FAILED and self.ended is not None:
            os._exit(FAILED_EXIT_CODE)  # the error is only what follows from what another rank has told

    # ----------------------------------------------------------------------------------------------------------
    # The talking thread. A store that is stopped answers no request and no timeout ends it: only this one waits
    # ----------------------------------------------------------------------------------------------------------

    def talk(self) -> None:
        assert self.store is not None
        try:
            while not self.leaving.is_set():
                self.exchange(self.store)
                self.leaving.wait(self.interval)
            self.exchange(self.store)
            self.take_leave(self.store)
        except RuntimeError:  # the store is gone, which the watching thread will see
            pass

    def exchange(self, store: dist.Store) -> None:
        self.beats += 1
        beat = Beat(self.rank, os.getpid(), self.host, self.started, self.beats, self.step, self.state)
        store.set(f"beat/{self.rank}", encode(beat))
        if self.culprit is not None:
            store.set("ended", encode(self.culprit))
        else:
            self.ended = read(store, "ended")
        if self.store_rank is not None and self.holder is None:
            self.holder = read(store, f"beat/{self.store_rank}")
        if self.watched != self.rank:
            self.neighbour = read(store, f"beat/{self.watched}")
            if self.neighbour is not None and self.neighbour.state == DONE:
                self.watched = (self.watched + 1) % self.world_size  # whom it does not watch any more
                self.neighbour = None
        self.answers += 1

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
            if self.store is not None:
                self.watch_ranks(awake)

    def watch_launchers(self, awake: float) -> None:
        if self.launcher_ended is None:
            if self.launchers.have_ended():
                self.launcher_ended = awake
                self.stop.request("its launcher has ended")
        elif awake - self.launcher_ended > LAUNCHER_SECONDS:
            tell(f"error: rank {self.rank} has not ended in the {LAUNCHER_SECONDS:.0f} s since its launcher has")
            os._exit(INTERRUPTED_EXIT_CODE)

    def watch_ranks(self, awake: float) -> None:
        if self.ended is not None:
            self.ended.kill()
            os._exit(FAILED_EXIT_CODE)
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
                unheard = Beat(self.watched, 0, "", 0.0, 0, None, RUNNING)
                self.end_job(unheard, f"rank {self.watched} has not answered since the ranks joined")
        elif neighbour.state == FAILED:
            if silent > min(FAILED_SECONDS, self.timeout_seconds):
                self.end_job(neighbour, f"{neighbour} has failed, see its message")
        elif silent > self.timeout_seconds:
            self.end_job(neighbour, self.describe_silence(neighbour))

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
            self.end_job(beat, self.describe_silence(beat) if speaks else None)

    def describe_silence(self, beat: Beat) -> str:
        # Steps are done together, so what this rank has completed may be newer than what the other could tell.
        step = max((step for step in (beat.step, self.step) if step is not None), default=None)
        steps = "it has completed no step" if step is None else f"its last completed step is {step}"
        return f"{beat} has not answered for {self.timeout_seconds:.0f} s ({steps})"

    def end_job(self, culprit: Beat, message: str | None) -> None:
        if message is not None:
            tell(f"error: {message}; the job is ended. The same command continues from the newest checkpoint")
        self.culprit = culprit
        # For the others to read it, or for the one to speak that does, before they see this process end.
        time.sleep(3 * self.interval)
        culprit.kill()
        os._exit(FAILED_EXIT_CODE)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def encode(beat: Beat) -> str:
    return json.dumps(asdict(beat))


def read(store: dist.Store, key: str) -> Beat | None:
    """The beat under `key`; None if there is none (where `get` would wait for it)."""
    return Beat(**json.loads(store.get(key))) if store.check([key]) else None
