"""A process that reads what may be damaged, with limits on its memory and its processor time."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import io
import os
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from forked import context, start_server

MEMORY = 1 << 30  # bytes of address space beyond what the process has before a case
PROCESSOR_SECONDS = 20.0  # for a case; most take milliseconds
LOOKS = 40  # at a process that sleeps and computes nothing, half a second apart: it waits for something

Answer = tuple[str, str]  # ("read", digest), ("refused", message) or ("defect", what has happened)


class Worker:
    """Runs readers on folders, in a process that is started again where a case has ended it.

    `readers` is the name of a module with a dictionary READERS of functions of a folder.
    """

    def __init__(self, readers: str) -> None:
        self.readers = readers
        self.log = Path(tempfile.mkstemp(prefix="fuzz-worker-")[1])
        self._start()

    def _start(self) -> None:
        start_server()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.readers, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, kind: str, folder: Path, limited: bool = True) -> Answer:
        """What comes of reading `folder`. Without limits it may import what it needs."""
        self.connection.send((kind, str(folder), limited))
        try:
            if self._wait():
                answer: Answer = self.connection.recv()
                return answer
            reason = "waits for something that does not come"
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            reason = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        self.close()
        printed = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        self._start()
        return "defect", f"{reason}\n{printed}"

    def _wait(self) -> bool:
        """Wait for the answer; False if the process sleeps, however fast the machine is."""
        asleep, before = 0, None
        while not self.connection.poll(0.5):
            process = psutil.Process(self.process.pid)
            now = process.cpu_times()
            asleep = asleep + 1 if process.status() == psutil.STATUS_SLEEPING and now == before else 0
            if asleep == LOOKS:
                return False
            before = now
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, readers: str, log: str) -> None:
    """In the process: answer each folder."""
    functions = importlib.import_module(readers).READERS
    descriptor = os.open(log, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, chain=True)  # where it was, then the default: the end of the process
    warnings.simplefilter("ignore")
    while True:
        try:
            kind, folder, limited = connection.recv()
        except EOFError:
            return
        connection.send(answer(functions[kind], Path(folder), limited))


def answer(reader: Callable[[Path], str], folder: Path, limited: bool) -> Answer:
    from kraken_train.common.errors import KrakenError  # noqa: PLC0415 (after the fork)

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return "read", reader(folder)
    except KrakenError as error:
        return "refused", str(error)
    except BaseException:  # a panic in Rust and SystemExit too
        return "defect", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
