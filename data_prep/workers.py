"""Worker processes that turn blocks into tokens, returned in order.

Each worker gets its next block while it still works on one. The blocks in work and those that wait to be written are
limited in bytes, so memory grows neither with the source nor with one slow block.

Workers are started afresh, not forked: libraries with threads of their own do not survive a fork. They use one thread
each and end with their parent, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from data_prep.documents import BLOCK_BYTES, Block, Cursor, TextRules
from data_prep.encoding import BlockEncoder, EncodedBlock
from data_prep.tokenizers import Tokenizer, load_tokenizer
from kraken_train.common.errors import DataError, KrakenError

BLOCKS_AT_ONCE = 2  # of a worker: one that it works on, and the next
BYTES_IN_FLIGHT = 8 << 20  # of blocks for each worker, whose tokens are not written yet
LARGE, LARGE_COUNTS = 2 * BLOCK_BYTES, 4  # tokenizers take so much memory for a larger document that it counts for more
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class EncoderSettings:
    """How to make a `BlockEncoder` in another process."""

    tokenizer_folder: Path
    rules: TextRules
    append_end_of_document: bool

    def build(self, tokenizer: Tokenizer | None = None) -> BlockEncoder:
        tokenizer = tokenizer or load_tokenizer(self.tokenizer_folder)
        return BlockEncoder(tokenizer, self.rules, self.append_end_of_document)


def encode_blocks(
    blocks: Iterable[tuple[Cursor, Block]], settings: EncoderSettings, num_workers: int
) -> Iterator[tuple[Cursor, Block, EncodedBlock]]:
    """Each block with its tokens, in order. With no workers, or less than two blocks, in this process.

    Raises DataError if a worker dies.
    """
    blocks = iter(blocks)
    first = list(islice(blocks, 2))
    if num_workers == 0 or len(first) < 2:
        encoder = settings.build()
        with _environment(ONE_THREAD):
            for cursor, block in chain(first, blocks):
                yield cursor, block, encoder.encode(block)
        return
    with _started(settings, num_workers) as workers:
        yield from _in_order(chain(first, blocks), workers)


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    num_blocks: int = 0  # that it has been given and not answered


def _in_order(
    blocks: Iterator[tuple[Cursor, Block]], workers: list[_Worker]
) -> Iterator[tuple[Cursor, Block, EncodedBlock]]:
    in_flight: deque[tuple[int, Cursor, Block]] = deque()  # blocks that were given to workers, by number
    done: dict[int, EncodedBlock] = {}
    given = size = 0
    upcoming = next(blocks, None)
    while upcoming or in_flight:
        while upcoming and (not in_flight or size + _cost(upcoming[1]) <= BYTES_IN_FLIGHT * len(workers)):
            worker = min(workers, key=lambda worker: worker.num_blocks)
            if worker.num_blocks == BLOCKS_AT_ONCE:
                break
            with _alive(worker):
                worker.connection.send((given, upcoming[1]))
            worker.num_blocks += 1
            in_flight.append((given, *upcoming))
            size += _cost(upcoming[1])
            given += 1
            upcoming = next(blocks, None)
        number, cursor, block = in_flight[0]
        if number in done:
            in_flight.popleft()
            size -= _cost(block)
            yield cursor, block, done.pop(number)
            continue
        for worker in _ready(workers):
            with _alive(worker):
                answered, encoded = worker.connection.recv()
            worker.num_blocks -= 1
            if isinstance(encoded, KrakenError):
                raise encoded
            if isinstance(encoded, str):
                raise RuntimeError(f"in a worker process:\n{encoded}")
            done[answered] = encoded


def _cost(block: Block) -> int:
    return block.size * (LARGE_COUNTS if block.size > LARGE else 1)


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Those that have answered or died; waits for one."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


@contextmanager
def _alive(worker: _Worker) -> Iterator[None]:
    """Turns a closed connection into a DataError that says how the worker ended."""
    try:
        yield
    except (EOFError, OSError) as error:
        worker.process.join(60)  # its end of the connection is closed a moment before it is dead
        code = worker.process.exitcode
        how = f"signal {-code}, {signal.strsignal(-code)}" if code and code < 0 else f"exit code {code}"
        memory = "; most often the system's memory ran out, so try a smaller num_workers" if code == -9 else ""
        raise DataError(
            f"a worker process died ({how}){memory}; what is finished is kept; the same command continues from there"
        ) from error


@contextmanager
def _started(settings: EncoderSettings, num_workers: int) -> Iterator[list[_Worker]]:
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        with _environment(ONE_THREAD), _interrupts_ignored():
            for _ in range(num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, settings), daemon=True)
                process.start()
                theirs.close()
                workers.append(_Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()  # it has nothing to lose
            worker.connection.close()
        for worker in workers:
            worker.process.join()


def _work(connection: Connection, settings: EncoderSettings) -> None:
    """A worker: answers numbered blocks until the parent is gone."""
    inbox: queue.SimpleQueue[tuple[int, Block]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    encoder = None
    while True:
        number, block = inbox.get()
        answer: EncodedBlock | KrakenError | str
        try:
            encoder = encoder or settings.build()
            answer = encoder.encode(block)
        except KrakenError as error:
            answer = error
        except BaseException:  # a library's panic is no Exception
            answer = traceback.format_exc()
        try:
            connection.send((number, answer))
        except OSError:
            os._exit(0)


def _receive(connection: Connection, inbox: queue.SimpleQueue[tuple[int, Block]]) -> None:
    """Takes blocks at once, so that the parent never waits for a worker that is busy."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone, perhaps killed


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for libraries and for processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile leave Ctrl-C to their parent."""
    before = None
    with suppress(ValueError):  # only the main thread has signals
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
