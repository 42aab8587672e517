"""From documents to the shards of the train and the validation split."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import ShardWriter, bin_path
from data_prep.manifest import ShardEntry, SplitEntry, probe_sha256
from kraken_train.common.errors import DataError

POSITIONS = 2.0**64


def positions(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1] that depend on the texts alone; texts below `validation_fraction` are for validation.

    So the split does not change with the order of the documents, and equal texts are always on the same side.
    """
    return hashes / POSITIONS


class SplitWriter:
    """Writes the documents of one split to shards `NAME_00000`, `NAME_00001`, ..., and can continue after a crash.

    `sync` brings all to the disk and returns a state. A writer made with that state removes what was written later.
    The tokens of a shard that is not full are in its temporary file, and the documents' lengths in `.NAME.lengths`.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.shards: list[ShardEntry] = []
        self.text_bytes = 0
        self._writer: _KeptShardWriter | None = None
        lengths: NDArray[np.int32] = np.empty(0, "<i4")
        path = lengths_path(folder, name)
        if state:
            self.shards = [ShardEntry(**entry) for entry in state["shards"]]
            self.text_bytes = state["text_bytes"]
            finished = sum(shard.documents for shard in self.shards)
            if finished < state["documents"]:
                lengths = np.fromfile(path, "<i4", state["documents"])[finished:]
        self._lengths = open(path, "r+b" if path.exists() else "wb")  # noqa: SIM115 (closed by close)
        self._lengths.truncate(state["documents"] * lengths.itemsize if state else 0)
        self._lengths.seek(0, os.SEEK_END)
        self._remove_later_shards(len(self.shards), growing=len(lengths) > 0)
        if len(lengths):
            self._writer = _KeptShardWriter(self._prefix(), dtype, lengths.tolist())

    def append(self, tokens: NDArray[Any], lengths: NDArray[np.int64], text_bytes: int) -> None:
        """Append documents, whose (sum of lengths,) tokens follow one another."""
        self.text_bytes += text_bytes
        self._lengths.write(lengths.astype("<i4").tobytes())
        ends = np.cumsum(lengths)
        done = start = 0  # documents, tokens
        while done < len(lengths):
            if self._writer is None:
                self._writer = _KeptShardWriter(self._prefix(), self.dtype)
            room = start + self.shard_tokens - self._writer.tokens
            stop = int(np.searchsorted(ends, room, side="right"))
            if stop == done and self._writer.documents == 0:
                stop += 1  # a shard has at least one document
            if stop > done:
                self._writer.append_many(tokens[start : ends[stop - 1]], lengths[done:stop])
                done, start = stop, int(ends[stop - 1])
            if done < len(lengths):
                self._finish_shard()

    def sync(self) -> dict[str, Any]:
        """Wait until the disk has all, and return what a later writer needs to continue from here."""
        if self._writer:
            self._writer.sync()
        self._lengths.flush()
        os.fsync(self._lengths.fileno())
        return {
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "documents": sum(shard.documents for shard in self.shards)
            + (self._writer.documents if self._writer else 0),
            "text_bytes": self.text_bytes,
        }

    def finish(self) -> SplitEntry:
        """Close the last shard."""
        self._finish_shard()
        return SplitEntry(self.shards, self.text_bytes)

    def close(self) -> None:
        """Leave the files as they are."""
        with suppress(OSError):  # a full disk refuses the last flush as well
            self._lengths.close()
        if self._writer:
            self._writer.abort()

    def _prefix(self) -> Path:
        return self.folder / f"{self.name}_{len(self.shards):05d}"

    def _finish_shard(self) -> None:
        if self._writer:
            self.shards.append(_close(self._writer))
            self._writer = None

    def _remove_later_shards(self, finished: int, growing: bool) -> None:
        """Keep the first shards, and of the one that grows the tokens, under their temporary name."""
        names = {f"{self.name}_{number:05d}" for number in range(finished)}
        grown = bin_path(self._prefix())
        temporary = grown.with_name(f".{grown.name}.tmp")
        if growing and grown.exists():  # it was finished after the last `sync`
            os.replace(grown, temporary)
        for path in (*self.folder.glob(f"{self.name}_*"), *self.folder.glob(f".{self.name}_*.tmp")):
            if path.stem not in names and not (growing and path == temporary):
                path.unlink()


def lengths_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lengths"


class _KeptShardWriter(ShardWriter):
    """Leaves its temporary files when it is given up, for the next attempt."""

    def abort(self) -> None:
        with suppress(OSError):
            self._bin.close()


def _close(writer: ShardWriter) -> ShardEntry:
    written = writer.close()
    return ShardEntry(
        name=writer.prefix.name,
        documents=written.documents,
        tokens=written.tokens,
        bin_bytes=written.bin_bytes,
        bin_sha256=written.bin_sha256,
        idx_sha256=written.idx_sha256,
        bin_probe_sha256=probe_sha256(bin_path(writer.prefix)),
    )


@dataclass
class Positions:
    """Remembers the lowest and the highest position, so that an error can name fractions that would work."""

    count: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, places: NDArray[np.float64] | Sequence[float]) -> None:
        if len(places):
            self.count += len(places)
            self.lowest = min(self.lowest, float(min(places)))
            self.highest = max(self.highest, float(max(places)))

    def require_both_splits(self, fraction: float) -> None:
        """Raises DataError if the train split is empty, or the validation split though `fraction` is above 0."""
        if self.count == 0:
            raise DataError(
                "the source holds no document with text, so there is nothing to prepare; use another source"
            )
        if self.highest >= fraction and (fraction == 0 or self.lowest < fraction):
            return
        empty = "validation" if self.lowest >= fraction else "train"
        what = (
            f"validation_fraction={fraction:g} leaves the {empty} split empty: the source has {self.count:,} documents"
        )
        if self.lowest == self.highest:
            raise DataError(
                f"{what}, all with the same text; use more text, or validation_fraction=0 for no validation"
            )
        works = _rounded_between(self.lowest, self.highest)
        raise DataError(f"{what}; validation_fraction={works} would work, or use more text")


def _rounded_between(low: float, high: float) -> str:
    """The shortest decimal number above `low` and at most `high`."""
    for digits in range(1, 17):
        number = math.floor(low * 10**digits + 1) / 10**digits
        if low < number <= high:
            return f"{number:.{digits}f}"
    return repr(high)
