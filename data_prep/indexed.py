"""Token shards in Megatron's indexed format, which Megatron-LM, GPT-NeoX and NeMo read and write as well.

A shard `NAME` is two little-endian files. `NAME.bin` holds the tokens and nothing else; `NAME.idx`, without padding:

    offset  type       value
    0       9 bytes    MAGIC
    9       u64        version = 1
    17      u8         type code of a token (TOKEN_TYPES)
    18      u64        S = number of sequences
    26      u64        D = number of documents + 1
    34      i32 x S    length of each sequence in tokens
    ...     i64 x S    byte offset of each sequence in NAME.bin
    ...     i64 x D    document boundaries as sequence indices: 0, ..., S

We write one sequence per document and read any number.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kraken_train.common.errors import DataError
from kraken_train.common.files import kind_of, sync_folder

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_TYPES = {6: "float64", 7: "float32"}  # of the format, but no type for tokens
LONGEST_SEQUENCE = 2**31 - 1  # tokens, because lengths are i32


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65500, else int32: Megatron's rule."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def idx_size(sequences: int, documents: int) -> int:
    """Bytes of an index file."""
    return HEADER.size + (4 + 8) * sequences + 8 * (documents + 1)


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenShard:
    """What a closed writer left on disk."""

    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes documents one by one under temporary names; `close` gives the two files their names.

    As a context manager it closes on success and removes its temporary files on an exception. Memory grows by four
    bytes per document only.

    With `lengths` (tokens of each document) it appends to the documents that an earlier writer synced to the
    temporary file; what follows them there is removed.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, lengths: Iterable[int] = ()) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._lengths = array("i", lengths)
        self.tokens = sum(self._lengths)
        self._checksum = hashlib.sha256()
        self._bin_temporary = _temporary(bin_path(self.prefix))
        self._idx_temporary = _temporary(idx_path(self.prefix))
        self._bin = open(self._bin_temporary, "r+b" if self._lengths else "wb")  # noqa: SIM115 (closed by close or abort)
        if self._lengths:
            self._go_on()

    def _go_on(self) -> None:
        self._bin.truncate(self.tokens * self.dtype.itemsize)
        while block := self._bin.read(1 << 20):
            self._checksum.update(block)
        if self._bin.tell() != self.tokens * self.dtype.itemsize:
            raise DataError(f"{self._bin_temporary} is shorter than what was written to it; prepare the data again")

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def append(self, document: ArrayLike) -> None:
        """Append one document, a 1-d sequence of token ids. Raises DataError for an id that `dtype` cannot hold."""
        ids = np.asarray(document)
        if ids.size == 0:
            ids = ids.astype(self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{self.prefix}: a document must be a 1-d sequence of integers, not {ids.dtype}{ids.shape}")
        if ids.size > LONGEST_SEQUENCE:
            raise DataError(f"{self.prefix}: a document of {ids.size} tokens exceeds the format's {LONGEST_SEQUENCE}")
        self._write(ids)
        self._lengths.append(ids.size)

    def append_many(self, tokens: NDArray[Any], lengths: NDArray[np.integer]) -> None:
        """Append documents, whose (sum of lengths,) ids follow one another. Raises DataError as `append` does."""
        if len(lengths) and int(lengths.max()) > LONGEST_SEQUENCE:
            raise DataError(f"{self.prefix}: a document of {lengths.max()} tokens exceeds {LONGEST_SEQUENCE}")
        self._write(tokens)
        self._lengths.extend(lengths.tolist())

    def _write(self, ids: NDArray[Any]) -> None:
        limits = np.iinfo(self.dtype)
        if ids.size and not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max:
            raise DataError(
                f"{self.prefix}: token ids {ids.min()} to {ids.max()} do not fit {self.dtype.name} "
                f"({limits.min} to {limits.max})"
            )
        raw = ids.astype(self.dtype).tobytes()
        self._bin.write(raw)
        self._checksum.update(raw)
        self.tokens += ids.size

    def sync(self) -> None:
        """Wait until the disk has all tokens so far."""
        self._bin.flush()
        os.fsync(self._bin.fileno())

    def close(self) -> WrittenShard:
        """Write the index, sync both files and give them their final names, the index last."""
        index = index_bytes(self._lengths, self.dtype)
        try:
            self.sync()
            self._bin.close()
            with open(self._idx_temporary, "wb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.abort()
            raise
        os.replace(self._bin_temporary, bin_path(self.prefix))
        os.replace(self._idx_temporary, idx_path(self.prefix))
        sync_folder(self.prefix.parent)
        return WrittenShard(
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self.tokens * self.dtype.itemsize,
            bin_sha256=self._checksum.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Remove the temporary files; the shard does not come to exist."""
        with suppress(OSError):  # a full disk refuses the last flush as well; the file is removed next
            self._bin.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def index_bytes(lengths: ArrayLike, dtype: np.dtype) -> bytes:
    """The index file of a shard with one sequence per document, of these lengths in tokens."""
    lengths = np.asarray(lengths, dtype="<i4")
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:], dtype="<i8")
    boundaries = np.arange(len(lengths) + 1, dtype="<i8")
    code = next(code for code, known in TOKEN_TYPES.items() if known == dtype)
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(boundaries))
    return header + lengths.tobytes() + (offsets * dtype.itemsize).tobytes() + boundaries.tobytes()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


class Shard:
    """A memory-mapped shard, fully checked against its index when opened.

    Attributes:
        tokens: (num_tokens,) all tokens in file order; reading touches only the pages that are needed
        lengths: (S,) int32, tokens of each sequence
        offsets: (S,) int64, bytes into the `.bin` file
        boundaries: (num_documents + 1,) int64, sequence indices

    Raises DataError if a file is missing, empty, truncated, of another format or version, or contradicts the other.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self.dtype, self.lengths, self.offsets, self.boundaries = _read_index(idx_path(self.prefix))
        path = bin_path(self.prefix)
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        found = file_size(path)
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes, but its index says {expected}: it is {_short_or_foreign(found, expected)}; "
                "copy it again or prepare the data again"
            )
        self.tokens: NDArray[Any] = np.memmap(path, dtype=self.dtype, mode="r")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.boundaries) - 1

    def sequence(self, index: int) -> NDArray[Any]:
        """(length,) tokens of sequence `index`, as a view into the file."""
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def document(self, index: int) -> NDArray[Any]:
        """(length,) tokens of all sequences of document `index`."""
        first, last = int(self.boundaries[index]), int(self.boundaries[index + 1])
        parts = [self.sequence(i) for i in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def document_lengths(self) -> NDArray[np.int64]:
        """(num_documents,) tokens of each document."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])  # of sequences, in tokens
        lengths: NDArray[np.int64] = np.diff(ends[self.boundaries])
        return lengths


def _read_index(path: Path) -> tuple[np.dtype, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Type, lengths, offsets and boundaries of an index file. Raises DataError."""
    size = file_size(path)
    raw = path.read_bytes()
    again = "copy it again or prepare the data again"
    if size < HEADER.size:
        raise DataError(f"{path} is truncated: {size} bytes, but its header alone has {HEADER.size}; {again}")
    magic, version, code, sequences, boundaries = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise DataError(f"{path} starts with {magic!r}, but a Megatron index starts with {MAGIC!r}; give another file")
    if version != VERSION:
        raise DataError(f"{path} has version {version} of the index format, but {VERSION} is expected; {again}")
    if code in FLOAT_TYPES:
        raise DataError(f"{path} says that the shard holds {FLOAT_TYPES[code]} numbers, but tokens are integers")
    if code not in TOKEN_TYPES:
        raise DataError(f"{path} has type code {code}; known are {', '.join(map(str, TOKEN_TYPES))}; {again}")
    if sequences == 0 or boundaries < 2:
        raise DataError(f"{path} lists no documents: the shard is empty; prepare the data again")
    expected = idx_size(sequences, boundaries - 1)
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but its header says {expected} ({sequences} sequences, {boundaries - 1} "
            f"documents): it is {_short_or_foreign(size, expected)}; {again}"
        )
    dtype = TOKEN_TYPES[code]
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    offsets = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", boundaries, HEADER.size + 12 * sequences)
    if lengths.min() < 0:
        raise DataError(f"{path} is damaged: sequence {int(lengths.argmin())} has length {lengths.min()}; {again}")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1]):
        wrong = 0 if offsets[0] else 1 + int((offsets[1:] != ends[:-1]).argmax())
        right = int(ends[wrong - 1]) if wrong else 0
        raise DataError(f"{path} is damaged: sequence {wrong} starts at byte {offsets[wrong]}, not at {right}; {again}")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(
            f"{path} is damaged: its document boundaries must rise from 0 to {sequences}, but go from {documents[0]} "
            f"to {documents[-1]}{' and fall in between' if (np.diff(documents) < 0).any() else ''}; {again}"
        )
    if documents.min() < 0 or documents.max() > sequences:  # their differences can be too large for 64 bits
        raise DataError(f"{path} is damaged: its documents begin at sequences that it does not have; {again}")
    if ends[-1] == 0:
        raise DataError(f"{path} lists documents without any token: the shard is empty; prepare the data again")
    return dtype, lengths, offsets, documents


def file_size(path: Path) -> int:
    """Bytes of a shard's file. Raises DataError if there is none or it is empty."""
    if (found := kind_of(path)) != "a file":
        raise DataError(
            f"{path} {f'is {found}' if found else 'does not exist'}; copy the missing file or prepare the data again"
        )
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty; copy it again or prepare the data again")
    return size


def _short_or_foreign(found: int, expected: int) -> str:
    return "truncated" if found < expected else "longer than it should be, so it belongs to other data"
