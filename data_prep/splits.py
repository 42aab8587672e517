"""From documents to the shards of the train and the validation split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from data_prep.documents import Document
from data_prep.indexed import ShardWriter, WrittenShard, bin_path, token_dtype
from data_prep.manifest import SPLITS, ShardEntry, SplitEntry, probe_sha256
from data_prep.progress import Progress
from data_prep.tokenizers import Tokenizer
from kraken_train.errors import DataError

BATCH_DOCUMENTS = 1024
BATCH_BYTES = 4_000_000


def position(text: bytes) -> float:
    """A number in [0, 1) that depends on the text alone; texts below `validation_fraction` are for validation.

    So the split does not change with the order of the documents, and equal texts are always on the same side.
    """
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"split").digest(), "big") / 2**64


def write_splits(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    validation_fraction: float,
    shard_tokens: int,
) -> dict[str, SplitEntry]:
    """Tokenize all documents into shards in `folder`.

    Raises DataError if there is no document, or if a split that was asked for would be empty.
    """
    positions = Positions()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("tokenizing"))
        splits = {name: stack.enter_context(SplitWriter(folder, name, tokenizer, shard_tokens)) for name in SPLITS}
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document, _ in batch])
            for (_, raw), ids in zip(batch, encoded, strict=True):
                place = position(raw)
                positions.add(place)
                splits["validation" if place < validation_fraction else "train"].append(ids, len(raw))
            progress.add(len(batch), sum(len(raw) for _, raw in batch), sum(map(len, encoded)) + len(batch))
        positions.require_both_splits(validation_fraction)
    return {name: split.entry() for name, split in splits.items() if split.shards}


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[Document, bytes]]]:
    """Documents with their UTF-8 bytes, as many at once as keep a tokenizer's threads busy."""
    batch: list[tuple[Document, bytes]] = []
    size = 0
    for document in documents:
        raw = document.text.encode()
        batch.append((document, raw))
        size += len(raw)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class SplitWriter:
    """Writes the documents of one split to shards `NAME_00000`, `NAME_00001`, ... A context manager."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder = folder
        self.name = name
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end_of_document = tokenizer.end_of_document
        self.shard_tokens = shard_tokens
        self.shards: list[ShardEntry] = []
        self.text_bytes = 0
        self._writer: ShardWriter | None = None

    def append(self, ids: Iterable[int], text_bytes: int) -> None:
        """Append one document and the token that ends it."""
        document = [*ids, self.end_of_document]
        if self._writer and self._writer.tokens + len(document) > self.shard_tokens:
            self._finish_shard()
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"{self.name}_{len(self.shards):05d}", self.dtype)
        self._writer.append(document)
        self.text_bytes += text_bytes

    def entry(self) -> SplitEntry:
        return SplitEntry(self.shards, self.text_bytes)

    def _finish_shard(self) -> None:
        if self._writer:
            self.shards.append(_shard_entry(self._writer.prefix, self._writer.close()))
            self._writer = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_shard()
        elif self._writer:
            self._writer.abort()


def _shard_entry(prefix: Path, written: WrittenShard) -> ShardEntry:
    return ShardEntry(
        name=prefix.name,
        documents=written.documents,
        tokens=written.tokens,
        bin_bytes=written.bin_bytes,
        bin_sha256=written.bin_sha256,
        idx_sha256=written.idx_sha256,
        bin_probe_sha256=probe_sha256(bin_path(prefix)),
    )


class Positions:
    """Remembers the lowest and the highest position, so that an error can name fractions that would work."""

    def __init__(self) -> None:
        self.count = 0
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, place: float) -> None:
        self.count += 1
        self.lowest = min(self.lowest, place)
        self.highest = max(self.highest, place)

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
