"""Blocks of records of each kind of source, and how records are found in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from data_prep.documents import BadRecords

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Lines:
    """Whole lines of a JSONL file, from line `first_line` on."""

    file: str
    first_line: int  # counted from 1
    data: bytes
    text_field: str

    @property
    def size(self) -> int:
        return len(self.data)

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            line = line.removeprefix(BYTE_ORDER_MARK)  # noqa: PLW2901 (of the file, or of one that was appended to it)
            if line and not line.isspace():
                yield from self._parse(line, f"{self.file}:{number}", bad_records)

    def _parse(self, line: bytes, place: str, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad_records.reject(place, "the line is not valid UTF-8", byte_position(error))
        except (ValueError, RecursionError) as error:
            detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            bad_records.reject(place, "the line is not JSON", detail)
        else:
            if not isinstance(record, dict):
                bad_records.reject(place, "the line is not a JSON object", f"it is {type(record).__name__}")
            elif self.text_field not in record:
                fields = ", ".join(list(record)[:8]) or "none"
                bad_records.reject(
                    place,
                    f"the record has no field {self.text_field}",
                    f"its fields: {fields}; text_field=FIELD takes one",
                )
            else:
                yield place, record[self.text_field]


@dataclass(frozen=True)
class WholeFile:
    """A text file, which is one record."""

    file: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        try:
            text = self.data.removeprefix(BYTE_ORDER_MARK).decode()
        except UnicodeDecodeError as error:
            bad_records.reject(self.file, "the file is not valid UTF-8", byte_position(error))
        else:
            yield self.file, text


@dataclass(frozen=True)
class Rows:
    """One column of consecutive rows of a Parquet file, as an Arrow record batch without its schema."""

    file: str
    first_row: int  # counted from 1
    schema: bytes
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @classmethod
    def of(cls, file: str, first_row: int, batch: pa.RecordBatch) -> Rows:
        return cls(file, first_row, batch.schema.serialize().to_pybytes(), batch.serialize().to_pybytes())

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        column = pa.ipc.read_record_batch(pa.py_buffer(self.data), pa.ipc.read_schema(pa.py_buffer(self.schema)))[0]
        for row, value in enumerate(column, self.first_row):
            place = f"{self.file} row {row}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                bad_records.reject(place, "the text is not valid UTF-8", byte_position(error))
            else:
                yield place, text


@dataclass(frozen=True)
class Values:
    """Records that are at hand already, each with its place."""

    values: list[tuple[str, object]]
    size: int  # bytes of text

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        yield from self.values


def byte_position(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at position {error.start}"
