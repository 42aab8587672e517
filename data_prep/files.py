"""Documents from files: .txt (the whole file is one), .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.documents import BadRecords, Document, check_text
from kraken_train.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PARQUET_ROWS_AT_ONCE = 1000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FilesSource:
    """One file, or all files of a folder that we can read, in the order of their relative names.

    Hidden files and folders are left out, other files that we cannot read as well (`ignored`). Raises DataError if
    nothing is left.
    """

    kind = "files"

    def __init__(self, path: Path, text_field: str) -> None:
        self.path = path.resolve()
        self.location = str(self.path)
        self.text_field = text_field
        self.ignored: list[Path] = []
        self.files = self._find()

    def _find(self) -> list[Path]:
        known = f"known are {', '.join(SUFFIXES)}"
        if not self.path.is_dir():
            if not self.path.name.endswith(SUFFIXES):
                raise DataError(f"{self.path}: this kind of file is not known; {known}; convert or rename it")
            return [self.path]
        files = []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        files.sort(key=lambda file: file.relative_to(self.path).as_posix())
        self.ignored = [file for file in files if not file.name.endswith(SUFFIXES)]
        if len(files) == len(self.ignored):
            found = f"{len(files)} other files" if files else "no files"
            raise DataError(f"{self.path} holds {found} and none to read; {known}")
        return [file for file in files if file.name.endswith(SUFFIXES)]

    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        total = 0
        for file in self.files:
            state = file.stat()
            total += state.st_size
            entry = [os.path.relpath(file, self.path), state.st_size, state.st_mtime_ns]
            listing.update(json.dumps(entry).encode() + b"\n")
        return {
            "kind": self.kind,
            "location": self.location,
            "text_field": self.text_field,
            "files": len(self.files),
            "bytes": total,
            "files_sha256": listing.hexdigest(),  # of names, sizes and modification times
        }

    def documents(self, bad_records: BadRecords) -> Iterator[Document]:
        for file in self.files:
            read = {".txt": _read_text, ".parquet": _read_parquet}.get(file.suffix, _read_jsonl)
            try:
                yield from read(file, self.text_field, bad_records)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read: {error}; copy it again or leave it out") from error


def _read_text(file: Path, text_field: str, bad_records: BadRecords) -> Iterator[Document]:
    try:
        text = file.read_bytes().removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        bad_records.reject(str(file), "the file is not valid UTF-8", _byte_position(error))
        return
    if document := check_text(text, str(file), bad_records):
        yield document


def _read_jsonl(file: Path, text_field: str, bad_records: BadRecords) -> Iterator[Document]:
    number = 0
    with _open_decompressed(file) as lines:
        while True:
            try:
                line = lines.readline()
            except OSError as error:  # cut off or damaged in the middle, so what follows is lost
                raise DataError(f"{file}:{number + 1}: {error}; the file is damaged; copy it again") from error
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.isspace() and (document := _parse_line(line, f"{file}:{number}", text_field, bad_records)):
                yield document


def _open_decompressed(file: Path) -> BinaryIO:
    if file.suffix == ".jsonl":
        return open(file, "rb")
    # pyarrow, unlike the zstandard package, notices when a stream has been cut off.
    compressed = pa.input_stream(str(file), compression="gzip" if file.suffix == ".gz" else "zstd")
    return io.BufferedReader(compressed, 1 << 20)


def _parse_line(line: bytes, place: str, text_field: str, bad_records: BadRecords) -> Document | None:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        bad_records.reject(place, "the line is not valid UTF-8", _byte_position(error))
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        bad_records.reject(place, "the line is not JSON", detail)
    else:
        if not isinstance(record, dict):
            bad_records.reject(place, "the line is not a JSON object", f"it is {type(record).__name__}")
        elif text_field not in record:
            fields = ", ".join(list(record)[:8]) or "none"
            bad_records.reject(
                place, f"the record has no field {text_field}", f"its fields: {fields}; text_field=FIELD takes one"
            )
        else:
            return check_text(record[text_field], place, bad_records)
    return None


def _read_parquet(file: Path, text_field: str, bad_records: BadRecords) -> Iterator[Document]:
    row = 0
    with pq.ParquetFile(file) as table:
        if text_field not in table.schema_arrow.names:
            raise DataError(
                f"{file} has no column {text_field}; its columns are {', '.join(table.schema_arrow.names)}; "
                "choose one with text_field=COLUMN"
            )
        for batch in table.iter_batches(PARQUET_ROWS_AT_ONCE, columns=[text_field]):
            for value in batch.column(0):
                row += 1
                place = f"{file} row {row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    bad_records.reject(place, "the text is not valid UTF-8", _byte_position(error))
                    continue
                if document := check_text(text, place, bad_records):
                    yield document


def _byte_position(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at position {error.start}"
