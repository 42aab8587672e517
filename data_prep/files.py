"""Documents from files: .txt (the whole file is one), .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.columns import holds_text, plain, plain_size
from data_prep.documents import (
    BLOCK_BYTES,
    DEFAULT_MAX_DOCUMENT_BYTES,
    START,
    WHOLE,
    Block,
    Cursor,
    DocumentsOfBlocks,
    Part,
    RejectedRecord,
    too_long,
)
from data_prep.listing import list_folder
from data_prep.records import Lines, Rows, WholeFile
from kraken_train.common.errors import DataError
from kraken_train.common.files import require_regular

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
MOST_ROWS = 4096  # in a block
# JSON may use six bytes for a byte of text, but rarely does; a longer line is not read into memory.
LINE_BYTES_PER_TEXT_BYTE = 2
LINE_EXTRA_BYTES = 1 << 20
Span = tuple[int, int]  # positions [start, stop) in a file


class FilesSource(DocumentsOfBlocks):
    """One file, or all files of a folder that we can read, in the order of their relative names.

    `left_out` says what is not read (data_prep/listing.py). Raises DataError if nothing is left.

    The position of a record, which decides to what part of the source it belongs, is the number of bytes before it: in
    a compressed file those of its content, which is read once more to count them; in a Parquet file each row counts
    for the same share of the file.
    """

    kind = "files"

    def __init__(self, path: Path, text_field: str, max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES) -> None:
        if not path.is_dir():
            require_regular(path, "source", DataError)
        self.path = path.resolve()
        self.name = path.absolute()  # what a link leads to may have no ending, as in the cache of Hugging Face
        self.location = str(self.path)
        self.text_field = text_field
        self.max_document_bytes = max_document_bytes
        self.fraction = 0.0
        self.left_out: list[str] = []
        self.files = self._find()

    def _find(self) -> list[Path]:
        known = f"known are {', '.join(SUFFIXES)}"
        if not self.path.is_dir():
            for name in (self.path, self.name):
                if name.name.endswith(SUFFIXES):
                    return [name]
            raise DataError(f"{self.name}: this kind of file is not known; {known}; convert or rename it")
        listing = list_folder(self.path, SUFFIXES)
        self.left_out = listing.notes()
        if not listing.files:
            there = f"nothing to read: {'; '.join(self.left_out)}" if self.left_out else "no files"
            raise DataError(f"source={self.path} holds {there}; {known}")
        return listing.files

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

    def blocks(self, start: Cursor = START, part: Part = WHOLE) -> Iterator[tuple[Cursor, Block]]:
        sizes = [file.stat().st_size for file in self.files] if part == WHOLE else self._content_sizes()
        sizes = [max(size, 1) for size in sizes]
        begin, end = part.bounds(sum(sizes))
        position = 0
        for index, (file, size) in enumerate(zip(self.files, sizes, strict=True)):
            # The whole of a file is not cut: its size on disk says nothing about positions in its content.
            span = (0, 1 << 62) if part == WHOLE else (begin - position, end - position)
            if index >= start[0] and span[0] < size and span[1] > 0:
                done = start[1] if index == start[0] else 0
                for number, (read, block) in enumerate(self._read(file, span)):
                    self.fraction = min(1.0, (position + size * read - begin) / (end - begin))
                    if block is not None and number >= done:
                        yield (index, number + 1), block
            position += size
        self.fraction = 1.0

    def _content_sizes(self) -> list[int]:
        """Bytes of each file, decompressed."""
        sizes = []
        for file in self.files:
            if file.suffix not in COMPRESSION:
                sizes.append(file.stat().st_size)
                continue
            with _reading(file), open(file, "rb") as raw, _decompressed(raw, file) as content:
                size = 0
                while chunk := content.read(BLOCK_BYTES):
                    size += len(chunk)
                sizes.append(size)
        return sizes

    def _read(self, file: Path, span: Span) -> Iterator[tuple[float, Block | None]]:
        """All blocks of a file, each reduced to `span` (None if nothing remains), and the fraction read so far."""
        if file.suffix == ".txt":
            yield 1.0, self._whole_file(file) if span[0] <= 0 else None
        elif file.suffix == ".parquet":
            yield from self._rows(file, span)
        else:
            yield from self._lines(file, span)

    def _whole_file(self, file: Path) -> Block:
        with _reading(file):
            size = file.stat().st_size
            return (
                self._too_long(str(file), size) if size > self._line_limit else WholeFile(str(file), file.read_bytes())
            )

    def _lines(self, file: Path, span: Span) -> Iterator[tuple[float, Block | None]]:
        size = max(1, file.stat().st_size)
        line, position = 1, 0
        with _reading(file), open(file, "rb") as raw, _decompressed(raw, file) as content:
            while True:
                try:
                    data = content.read(BLOCK_BYTES)
                    if data and not data.endswith(b"\n"):
                        data += content.readline(self._line_limit)
                    rest = 0 if data.endswith(b"\n") or not data else _skip_line(content)
                except OSError as error:  # cut off or damaged in the middle, so what follows is lost
                    raise DataError(f"{file}:{line}: {error}; the file is damaged; copy it again") from error
                if not data:
                    return
                read = min(1.0, raw.tell() / size)
                # What is too long is the last line alone; the whole ones before it are a block of their own.
                whole = data.rfind(b"\n") + 1 if rest else len(data)
                yield read, self._cut(Lines(str(file), line, data[:whole], self.text_field), position, span)
                line += data.count(b"\n", 0, whole)
                if rest:
                    inside = span[0] <= position + whole < span[1]
                    yield read, self._too_long(f"{file}:{line}", len(data) - whole + rest) if inside else None
                    line += 1
                position += len(data) + rest

    def _cut(self, lines: Lines, position: int, span: Span) -> Lines | None:
        """The lines that begin in `span`, if `lines` begins at `position`."""
        data = lines.data
        first, stop = (_next_line(data, bound - position) for bound in span)
        if first == 0 and stop == len(data):
            return lines
        skipped = data.count(b"\n", 0, first)
        kept = data[first:stop]
        return Lines(lines.file, lines.first_line + skipped, kept, self.text_field) if kept else None

    def _rows(self, file: Path, span: Span) -> Iterator[tuple[float, Block | None]]:
        size = file.stat().st_size
        with (
            _reading(file),
            pa.OSFile(os.fsencode(file)) as raw,  # of which a str must be valid Unicode
            pq.ParquetFile(raw, buffer_size=BLOCK_BYTES) as table,
        ):
            names = table.schema_arrow.names
            if self.text_field not in names:
                yield (
                    1.0,
                    RejectedRecord(
                        str(file),
                        f"the file has no column {self.text_field}",
                        f"its columns are {', '.join(names)}; choose one with text_field=COLUMN",
                    )
                    if span[0] <= 0
                    else None,
                )
                return
            kind = table.schema_arrow.field(names.index(self.text_field)).type
            if not holds_text(kind):
                what = f"the column {self.text_field} has the type {kind}, which is no text"
                place = RejectedRecord(
                    str(file), what, "choose another with text_field=COLUMN, or convert it to strings"
                )
                yield 1.0, place if span[0] <= 0 else None
                return
            rows = table.metadata.num_rows
            row = 0
            for batch in self._batches(table):
                first = min(max(_ceiling(span[0] * rows, size) - row, 0), batch.num_rows)
                stop = min(max(_ceiling(span[1] * rows, size) - row, 0), batch.num_rows)
                kept = batch.slice(first, stop - first)
                yield (row + batch.num_rows) / rows, self._block_of_rows(file, row + first + 1, kept) if kept else None
                row += batch.num_rows

    def _batches(self, table: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        """The text column in batches of about a block's size, none across row groups."""
        for group in range(table.num_row_groups):
            metadata = table.metadata.row_group(group)
            columns = [metadata.column(i) for i in range(metadata.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == self.text_field)
            at_once = max(1, min(MOST_ROWS, BLOCK_BYTES * metadata.num_rows // max(size, 1)))
            for batch in table.iter_batches(at_once, row_groups=[group], columns=[self.text_field], use_threads=False):
                for part in _halved(batch):
                    yield pa.record_batch([plain(part.column(0))], [self.text_field])

    def _block_of_rows(self, file: Path, first_row: int, batch: pa.RecordBatch) -> Block:
        if batch.num_rows == 1 and batch.nbytes > self._line_limit:
            return self._too_long(f"{file} row {first_row}", batch.nbytes)
        return Rows.of(str(file), first_row, batch)

    @property
    def _line_limit(self) -> int:
        return LINE_BYTES_PER_TEXT_BYTE * self.max_document_bytes + LINE_EXTRA_BYTES

    def _too_long(self, place: str, size: int) -> RejectedRecord:
        return RejectedRecord(
            place, too_long(self.max_document_bytes), f"its record has {size:,} bytes; a larger limit takes more memory"
        )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what may go wrong while `file` is read into a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}; copy it again or leave it out") from error


def _decompressed(raw: BinaryIO, file: Path) -> BinaryIO:
    if file.suffix not in COMPRESSION:
        return raw
    # pyarrow, unlike the zstandard package, notices when a stream has been cut off.
    return io.BufferedReader(pa.CompressedInputStream(raw, COMPRESSION[file.suffix]), BLOCK_BYTES)


def _skip_line(content: BinaryIO) -> int:
    """Bytes up to the end of the line, which are dropped."""
    skipped = 0
    while part := content.readline(BLOCK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _next_line(data: bytes, bound: int) -> int:
    """Where the first line begins that does not begin before `bound`."""
    if bound <= 0:
        return 0
    found = data.find(b"\n", bound - 1) + 1 if bound <= len(data) else 0
    return found or len(data)


def _halved(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """`batch` in pieces of at most two blocks' size, or of one row."""
    if batch.num_rows <= 1 or plain_size(batch.column(0)) <= 2 * BLOCK_BYTES:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from _halved(batch.slice(0, middle))
    yield from _halved(batch.slice(middle))


def _ceiling(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
