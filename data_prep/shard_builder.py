"""Writes encoded blocks to shards, in order, and records the progress.

The work of `.NAME.partial` is cut into pieces: what was written between two journals. A piece ends every
`PIECE_SECONDS`: all files are synced, then the journal is replaced, which names the last block (`cursor`) and holds all
counts and the state of both splits. After a crash, files are truncated to what the journal records, and reading
continues behind its cursor. What is written does not depend on where pieces end.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import PLACES_SHOWN, START, BadRecords, Block, Cursor, TextRules, find_documents
from data_prep.encoding import BlockEncoder, EncodedBlock, RoundTrips
from data_prep.hash_set import SeenHashes
from data_prep.manifest import SPLITS, SplitEntry
from data_prep.output import Attempt
from data_prep.progress import Progress
from data_prep.splits import Positions, SplitWriter, lengths_path, positions
from kraken_train.common.errors import DataError

PIECE_SECONDS = 10.0
HASHES_NAME = ".seen.hashes"  # u64 of each document, in order, if duplicates are dropped


@dataclass(frozen=True)
class AssemblyRules:
    """Settings of conf/prepare.yaml."""

    validation_fraction: float
    shard_tokens: int
    max_documents: int | None
    drop_duplicates: bool


class ShardBuilder:
    """Writes the shards of all splits. A context manager that closes its files.

    Attributes:
        cursor: behind the last block
        complete: whether all blocks are written
        encoder_seconds, tokenizer_seconds: of processors, since this process began
    """

    def __init__(
        self, attempt: Attempt, dtype: np.dtype, rules: AssemblyRules, text_rules: TextRules, started: float
    ) -> None:
        state = attempt.journal or {}
        splits = state.get("splits", {})
        self.attempt = attempt
        self.rules = rules
        self.cursor: Cursor = tuple(state.get("cursor", START))
        self.complete: bool = state.get("complete", False)
        self.bad_records = BadRecords(text_rules)
        self.bad_records.add(state.get("skipped", {}), state.get("skipped_places", {}))
        self.round_trips = RoundTrips(**state.get("round_trips", {}))
        self.positions = Positions(**state.get("positions", {}))
        self.encoder_seconds = self.tokenizer_seconds = 0.0
        self._recorded = started  # the tokenizer's training counts, so that it is not repeated
        self._hashes = None
        if rules.drop_duplicates and not self.complete:
            self._hashes = _HashFile(attempt.folder / HASHES_NAME, state.get("hashes", 0))
        self.splits = {
            name: SplitWriter(attempt.folder, name, dtype, rules.shard_tokens, splits.get(name)) for name in SPLITS
        }

    @property
    def documents(self) -> int:
        return self.positions.count

    def add(self, cursor: Cursor, block: Block, encoded: EncodedBlock, encoder: BlockEncoder) -> None:
        """Append the documents of the next block; `complete` says whether more are wanted.

        Raises DataError if one of its records is fatal.
        """
        kept = self._hashes.add(encoded.hashes) if self._hashes else np.ones(len(encoded.hashes), np.bool_)
        wanted = np.flatnonzero(kept)
        if self.rules.max_documents is not None and len(wanted) >= self.rules.max_documents - self.documents:
            # Nothing after the last document counts, neither documents nor broken records.
            last = int(wanted[self.rules.max_documents - self.documents - 1])
            encoded = encoder.encode(block, last + 1)
            kept = kept[: last + 1]
            self.complete = True
        if self.documents == 0 and len(kept) and not encoded.round_trips.checked:
            # A small source has none in the sample.
            self.round_trips.add(encoder.encode(block, limit=1, check_all=True).round_trips)
        self._write(encoded, kept)
        self._count_duplicates(block, kept)
        self.bad_records.add(encoded.skipped, encoded.skipped_places)
        self.round_trips.add(encoded.round_trips)
        self.encoder_seconds += encoded.seconds
        self.tokenizer_seconds += encoded.tokenizer_seconds
        if encoded.failure:
            raise DataError(encoded.failure)
        self.cursor = cursor
        if time.monotonic() - self._recorded >= PIECE_SECONDS:
            self.record()

    def _write(self, encoded: EncodedBlock, kept: NDArray[np.bool_]) -> None:
        places = positions(encoded.hashes)
        self.positions.add(places[kept])
        validation = places < self.rules.validation_fraction
        for name, chosen in (("train", kept & ~validation), ("validation", kept & validation)):
            if chosen.any():
                tokens = encoded.tokens[np.repeat(chosen, encoded.lengths)]
                self.splits[name].append(tokens, encoded.lengths[chosen], int(encoded.text_bytes[chosen].sum()))

    def _count_duplicates(self, block: Block, kept: NDArray[np.bool_]) -> None:
        duplicates = np.flatnonzero(~kept)
        if not len(duplicates):
            return
        missing = PLACES_SHOWN - len(self.bad_records.places["duplicate"])
        shown = set(duplicates[:missing].tolist()) if missing > 0 else set()
        places: list[str] = []
        if shown:
            quiet = BadRecords(
                dataclasses.replace(self.bad_records.rules, on_bad_record="skip", on_short_document="skip")
            )
            documents = islice(find_documents(block, quiet), max(shown) + 1)
            places = [document.place for number, document in enumerate(documents) if number in shown]
        self.bad_records.add({"duplicate": len(duplicates)}, {"duplicate": places})

    def record(self) -> None:
        """End a piece: what is written up to here survives whatever happens."""
        splits = {name: split.sync() for name, split in self.splits.items()}
        if self._hashes:
            self._hashes.sync()
        self.attempt.record(
            {
                "cursor": self.cursor,
                "complete": self.complete,
                "skipped": dict(self.bad_records.counts),
                "skipped_places": dict(self.bad_records.places),
                "round_trips": dataclasses.asdict(self.round_trips),
                "positions": dataclasses.asdict(self.positions),
                "hashes": self._hashes.count if self._hashes else 0,
                "splits": splits,
            }
        )
        self._recorded = time.monotonic()

    def finish(self, needs_both_splits: bool) -> dict[str, SplitEntry]:
        """Close all shards and remove what only a further attempt would need.

        Raises DataError if there is no document, or if a split that was asked for would be empty.
        """
        self.complete = True
        if needs_both_splits or self.documents == 0:
            self.positions.require_both_splits(self.rules.validation_fraction)
        entries = {name: split.finish() for name, split in self.splits.items()}
        self.record()
        return {name: entry for name, entry in entries.items() if entry.shards}

    def remove_leftovers(self) -> None:
        """Remove files that only a further attempt would need."""
        self.close()
        for path in (self.attempt.folder / HASHES_NAME, *(lengths_path(self.attempt.folder, name) for name in SPLITS)):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        for split in self.splits.values():
            split.close()
        if self._hashes:
            self._hashes.close()

    def __enter__(self) -> ShardBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _HashFile:
    """The hashes of all documents so far, in memory and on disk."""

    def __init__(self, path: Path, count: int) -> None:
        self.seen = SeenHashes()
        self.count = count
        known = np.fromfile(path, "<u8", count) if count else np.empty(0, "<u8")
        for start in range(0, count, 1 << 16):
            self.seen.add(known[start : start + (1 << 16)])
        self._file = open(path, "r+b" if count else "wb")  # noqa: SIM115 (closed by close)
        self._file.truncate(count * 8)
        self._file.seek(0, os.SEEK_END)

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) which of the (n,) hashes are new."""
        new = self.seen.add(hashes)
        self._file.write(hashes[new].astype("<u8").tobytes())
        self.count += int(new.sum())
        return new

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk refuses the last flush as well
            self._file.close()


def assemble(
    assembly: ShardBuilder,
    encoded: Iterable[tuple[Cursor, Block, EncodedBlock]],
    encoder: BlockEncoder,
    progress: Progress,
) -> None:
    """Add all blocks, or those up to the last document that is wanted."""
    for cursor, block, result in encoded:
        before = assembly.documents
        assembly.add(cursor, block, result, encoder)
        progress.add(assembly.documents - before, int(result.text_bytes.sum()), len(result.tokens))
        if assembly.complete:
            return
