"""The logs of all ranks of a start as one, in the order of time: RUN_DIR/starts/0001/logs/rank-0000.log and so on."""

from __future__ import annotations

import heapq
import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from kraken_train.common.errors import DataError
from kraken_train.common.files import open_file
from kraken_train.run.layout import LOGS, start_folders

TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 ")
LOOK_SECONDS = 0.5


def logs_of(run_dir: Path, number: int | None) -> Path:
    """The folder of logs of a start, None: the newest. Raises DataError."""
    folders = {int(folder.name): folder for folder in start_folders(run_dir)}
    if not folders:
        raise DataError(f"{run_dir} has no logs: there was no start yet")
    if number is not None and number not in folders:
        raise DataError(f"--start {number}: {run_dir} has the starts {', '.join(map(str, folders))}")
    return folders[max(folders) if number is None else number] / LOGS


def log_files(folder: Path) -> dict[int, Path]:
    """The log of each rank."""
    files = {path.stem.removeprefix("rank-"): path for path in sorted(folder.glob("rank-*.log"))}
    return {int(rank): path for rank, path in files.items() if rank.isdecimal()}


def merged(folder: Path, last: int | None = None) -> Iterator[str]:
    """Lines as `TIME rank 3 | text`, of all ranks, in the order of time; only the `last` ones."""
    streams = [stamped(rank, path) for rank, path in log_files(folder).items()]
    if last is not None:  # no more of each rank than could be among them
        streams = [iter(deque(stream, last)) for stream in streams]
    lines = heapq.merge(*streams, key=lambda line: line[0])
    for stamp, rank, text in lines if last is None else deque(lines, last):
        yield show(stamp, rank, text)


def stamped(rank: int, path: Path) -> Iterator[tuple[str, int, str]]:
    """(time, rank, text) of each line; one without a time, as of a crash, has that of the line before it."""
    stamp = ""
    with open_file(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="replace") as file:
        for line in file:
            stamp, text = split(line, stamp)
            yield stamp, rank, text


def split(line: str, stamp: str) -> tuple[str, str]:
    match = TIME.match(line)
    return (match[0].strip(), line[match.end() :].rstrip("\n")) if match else (stamp, line.rstrip("\n"))


def show(stamp: str, rank: int, text: str) -> str:
    return f"{stamp} rank {rank} | {text}"


def follow(folder: Path, last: int, going_on: Callable[[], bool]) -> Iterator[str]:
    """The last lines, then new ones while `going_on`; simultaneous lines of two ranks may be out of order."""
    ends = {rank: path.stat().st_size for rank, path in log_files(folder).items()}
    yield from merged(folder, last)
    more = True
    while more:
        more = going_on()  # before the last look
        new = []
        for rank, path in log_files(folder).items():
            with path.open("rb") as file:
                file.seek(ends.get(rank, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # a line may be half written
            ends[rank] = ends.get(rank, 0) + len(whole)
            new += [(*split(line, ""), rank) for line in whole.decode(errors="replace").splitlines()]
        for stamp, text, rank in sorted(new, key=lambda line: line[0]):
            yield show(stamp, rank, text)
        if more:
            time.sleep(LOOK_SECONDS)
