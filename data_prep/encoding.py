"""From a block of records to tokens: the work of a worker. The result depends only on the block and the settings."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import BadRecords, Block, Document, TextRules, find_documents
from data_prep.tokenizers import Tokenizer
from data_prep.word_cache import CachedTokenizer
from kraken_train.common.errors import DataError

BATCH_DOCUMENTS = 1024
BATCH_BYTES = 1 << 20
CHECKED_ONE_IN = 200  # documents, chosen by their hash
LONGEST_CHECKED = 100_000  # characters
DIFFERENCE_SHOWN = 20  # characters


@dataclass
class RoundTrips:
    """How many documents were encoded and decoded again, and how many of them did not come back as text.

    Other ids than those of the whole text end the preparation.
    """

    checked: int = 0
    failed: int = 0
    example: str | None = None  # the first that did not: its place and where it differs

    def add(self, other: RoundTrips) -> None:
        self.checked += other.checked
        self.failed += other.failed
        self.example = self.example or other.example


@dataclass(frozen=True)
class EncodedBlock:
    """The documents of a block. What was wrong with its other records is counted, or ends it in `failure`."""

    tokens: NDArray[Any]  # (sum of lengths,) of all documents
    lengths: NDArray[np.int64]  # (documents,) tokens of each, its end included
    text_bytes: NDArray[np.int64]  # (documents,) UTF-8 bytes of each
    hashes: NDArray[np.uint64]  # (documents,) `text_hash` of each
    skipped: dict[str, int]  # reason -> records
    skipped_places: dict[str, list[str]]
    failure: str | None  # what is wrong with the record after the last document, if that is fatal
    round_trips: RoundTrips
    seconds: float = field(compare=False)  # of the processor, for all of it
    tokenizer_seconds: float = field(compare=False)


def text_hash(text: bytes) -> int:
    """64 bits that decide a document's split and recognise duplicates."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"split").digest(), "big")


class BlockEncoder:
    """Turns blocks into tokens; one for each process."""

    def __init__(self, tokenizer: Tokenizer, rules: TextRules, append_end_of_document: bool = True) -> None:
        self.tokenizer = tokenizer
        self.rules = rules
        self.append_end_of_document = append_end_of_document
        self._words = CachedTokenizer(tokenizer)

    def encode(self, block: Block, limit: int | None = None, check_all: bool = False) -> EncodedBlock:
        """The documents of `block`; with a `limit`, of the records up to the document of that number.

        With `check_all` each document is encoded and decoded again, not only a sample.
        """
        started = time.process_time()
        bad_records = BadRecords(self.rules)
        round_trips = RoundTrips()
        parts: list[NDArray[Any]] = []
        sizes: list[int] = []
        hashes: list[int] = []
        failure = None
        tokenizer_seconds = 0.0
        documents = islice(find_documents(block, bad_records), limit)
        finished = False
        while not finished:
            batch: list[tuple[Document, bytes]] = []
            try:
                for document in _batch(documents):
                    batch.append((document, document.text.encode()))
                finished = not batch
            except DataError as error:
                failure, finished = str(error), True
            before = time.process_time()
            encoded = self._words.encode_batch([document.text for document, _ in batch])
            tokenizer_seconds += time.process_time() - before
            for (document, raw), ids in zip(batch, encoded, strict=True):
                key = text_hash(raw)
                if check_all or key % CHECKED_ONE_IN == 0:
                    self._check(document, ids, round_trips)
                hashes.append(key)
                sizes.append(len(raw))
                parts.append(self._ended(ids))
        return EncodedBlock(
            tokens=np.concatenate(parts) if parts else np.empty(0, self._words.dtype),
            lengths=np.array([len(part) for part in parts], dtype=np.int64),
            text_bytes=np.array(sizes, dtype=np.int64),
            hashes=np.array(hashes, dtype=np.uint64),
            skipped=dict(bad_records.counts),
            skipped_places=dict(bad_records.places),
            failure=failure,
            round_trips=round_trips,
            seconds=time.process_time() - started,
            tokenizer_seconds=tokenizer_seconds,
        )

    def _ended(self, ids: NDArray[Any]) -> NDArray[Any]:
        return np.append(ids, ids.dtype.type(self.tokenizer.end_of_document)) if self.append_end_of_document else ids

    def _check(self, document: Document, ids: NDArray[Any], round_trips: RoundTrips) -> None:
        if len(document.text) > LONGEST_CHECKED:
            return
        round_trips.checked += 1
        again = [int(token) for token in self.tokenizer.encode_batch([document.text])[0]]
        if again != ids.tolist():
            raise RuntimeError(
                f"{document.place}: {difference_of_ids(ids.tolist(), again, self.tokenizer)}; this is a fault of this "
                "program, please report it with the document"
            )
        decoded = self.tokenizer.decode(again)
        if decoded == document.text:
            return
        expected = self.tokenizer.normalized(document.text)
        if decoded != expected:
            round_trips.failed += 1
            round_trips.example = round_trips.example or f"{document.place}: {difference(expected, decoded)}"


def _batch(documents: Iterator[Document]) -> Iterator[Document]:
    """The next of `documents`, as many as one call of a tokenizer takes."""
    size = 0
    for document in islice(documents, BATCH_DOCUMENTS):
        yield document
        size += len(document.text)
        if size >= BATCH_BYTES:
            return


def difference(expected: str, found: str) -> str:
    """Where two texts begin to differ, as `'...abc' became '...xyz'`."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(map(len, (expected, found)))
    )
    shown = slice(max(0, at - DIFFERENCE_SHOWN // 2), at + DIFFERENCE_SHOWN)
    return f"{expected[shown]!r} became {found[shown]!r} at character {at}"


def difference_of_ids(found: Sequence[int], expected: Sequence[int], tokenizer: Tokenizer) -> str:
    """Where the ids of a document begin to differ from those that the tokenizer gives."""
    pairs = enumerate(zip_longest(found, expected))
    at, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    before = tokenizer.decode(list(expected[max(0, at - DIFFERENCE_SHOWN) : at]))[-DIFFERENCE_SHOWN:]
    return (
        f"token {at}, after {before!r}, is {'missing' if here is None else here}, but the tokenizer gives "
        f"{'none' if there is None else there}"
    )
