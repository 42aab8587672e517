"""What W&B's own files hold: RUN_DIR/wandb/*run-*/run-ID.wandb, where each start leaves one.

The format is that of LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a header of
seven bytes, with protocol buffers as records. The reader of W&B 0.31 is not made for Python.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32768
PART = struct.Struct("<IHB")  # checksum of what follows it, bytes of the payload, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_files(run_dir: Path, run_id: str) -> list[Path]:
    """The files of the run, offline ones and those of which parts may have been sent, the oldest first."""
    return sorted(
        (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb"), key=lambda file: file.parent.name.split("run-", 1)[1]
    )


def last_step(files: list[Path]) -> int:
    """The last step in any of the files; 0 if there is none."""
    return max((step for file in files for step, _ in history(file)), default=0)


def end_at_last_record(file: Path) -> None:
    """Cut off what a killed process has left half-written, and delete a file without a record.

    At such an end `wandb sync` gives up, and with it on the later files of the run. What is cut off was no record yet,
    and is logged again.
    """
    with file.open("rb") as opened:
        opened.seek(FILE_HEADER_BYTES)
        end = 0
        for kind, _ in parts(opened):
            if kind in (FULL, LAST):
                end = opened.tell()
    if end == 0:
        file.unlink()
    elif end < file.stat().st_size:
        os.truncate(file, end)


def history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each step that was logged to the file and its values."""
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield (
                record.history.step.num,
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items},
            )


def records(file: Path) -> Iterator[Any]:
    """W&B's protocol buffers in the order of the file, to its end or to what a dying machine has left half-written."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # noqa: PLC0415 (takes a second)

    with file.open("rb") as opened:
        opened.seek(FILE_HEADER_BYTES)
        whole = b""
        for kind, payload in parts(opened):
            whole = payload if kind in (FULL, FIRST) else whole + payload
            if kind in (FULL, LAST):
                yield Record.FromString(whole)


def parts(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while True:
        left = BLOCK_BYTES - file.tell() % BLOCK_BYTES
        if left < PART.size:  # no part begins there
            file.read(left)
        header = file.read(PART.size)
        if len(header) < PART.size:
            return
        checksum, size, kind = PART.unpack(header)
        payload = file.read(size)
        if kind not in (FULL, FIRST, MIDDLE, LAST) or zlib.crc32(payload, zlib.crc32(header[-1:])) != checksum:
            return
        yield kind, payload
