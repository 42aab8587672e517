"""Documents, the blocks of a source that contain them, and the handling of records that are not documents.

A source is divided into blocks. The division is the same for every reader and from every start position. A block is
cheap to make and to send to another process; `Block.records` and `find_documents` find the documents in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kraken_train.common.errors import ConfigError, DataError
from kraken_train.common.validation import require_at_least, require_choice, require_positive

PLACES_SHOWN = 3
BLOCK_BYTES = 1 << 20  # about this much text is in a block, or one record
DEFAULT_MAX_DOCUMENT_BYTES = 4_000_000
NORMALIZATIONS = ("none", "NFC", "NFKC")
Cursor = tuple[int, int]  # of a block: number of its file (0 where there are none), and its number in there
START: Cursor = (0, 0)


@dataclass(frozen=True)
class Document:
    text: str
    place: str  # file and line, for messages


@dataclass(frozen=True)
class TextRules:
    """Which records are documents, and what happens to the others (conf/prepare.yaml)."""

    on_bad_record: str = "fail"
    on_short_document: str = "skip"
    normalization: str = "none"
    min_length: int = 1  # characters
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES  # of UTF-8

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        require_choice("on_bad_record", self.on_bad_record, ("fail", "skip"))
        require_choice("on_short_document", self.on_short_document, ("fail", "skip"))
        require_choice("normalization", self.normalization, NORMALIZATIONS)
        require_at_least("min_length", self.min_length, 1)
        require_positive("max_document_bytes", self.max_document_bytes)


class Block(Protocol):
    """Consecutive records of a source; can be pickled."""

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        """Place and value of each record; what cannot be read as one is reported to `bad_records`."""
        ...

    @property
    def size(self) -> int:
        """Bytes that it takes in memory."""
        ...


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` of a source: `slice=index/count`. A record belongs to the part where it begins."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `3/16`. Raises ConfigError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"slice={text} must be PART/PARTS, as in slice=3/16, with PART from 1 to PARTS")
        return cls(int(match[1]), int(match[2]))

    def bounds(self, total: int) -> tuple[int, int]:
        return total * (self.index - 1) // self.count, total * self.index // self.count


WHOLE = Part(1, 1)


class Source(Protocol):
    """Can be read any number of times and gives the same blocks in the same order."""

    kind: str
    location: str
    fraction: float  # of the part, how much the latest iteration has given; an estimate

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, as JSON values: equal identities give equal documents."""
        ...

    def blocks(self, start: Cursor = START, part: Part = WHOLE) -> Iterator[tuple[Cursor, Block]]:
        """The blocks of `part` that come after the one at `start`, each with the cursor to continue behind it.

        Raises DataError for what cannot be read at all.
        """
        ...

    def documents(self, bad_records: BadRecords) -> Iterator[Document]:
        """All documents; the other records are reported to `bad_records`. Raises DataError."""
        ...


class DocumentsOfBlocks:
    """A source's `documents`, for those that define `blocks`."""

    def documents(self: Source, bad_records: BadRecords) -> Iterator[Document]:
        for _, block in self.blocks():
            yield from find_documents(block, bad_records)


class BadRecords:
    """Raises DataError for a record that is not a document, or counts it, by the rules."""

    def __init__(self, rules: TextRules | str) -> None:
        self.rules = TextRules(on_bad_record=rules) if isinstance(rules, str) else rules
        self.counts: Counter[str] = Counter()  # reason -> records
        self.places: defaultdict[str, list[str]] = defaultdict(list)  # reason -> the first few places

    def reject(self, place: str, reason: str, detail: str = "") -> None:
        """A broken record: DataError or one more in the count of `reason`, as `on_bad_record` says."""
        if self.rules.on_bad_record == "fail":
            raise DataError(
                f"{place}: {reason}{f' ({detail})' if detail else ''}; "
                "repair it, or leave out all such records with on_bad_record=skip"
            )
        self._count(place, reason)

    def too_short(self, place: str, reason: str) -> None:
        """A record with no text or little: DataError or one more in the count, as `on_short_document` says."""
        if self.rules.on_short_document == "fail":
            raise DataError(
                f"{place}: {reason}; repair it, or leave out all such documents with on_short_document=skip"
            )
        self._count(place, reason)

    def _count(self, place: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.places[reason]) < PLACES_SHOWN:
            self.places[reason].append(place)

    def add(self, counts: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> None:
        """Add the counts of another process, for the records that follow."""
        self.counts.update(counts)
        for reason, more in places.items():
            self.places[reason] += more[: PLACES_SHOWN - len(self.places[reason])]

    def summary(self) -> list[str]:
        """One line per reason."""
        return [
            f"skipped {count:,} {'record' if count == 1 else 'records'}: {reason} "
            f"({', '.join(self.places[reason])}{', ...' if count > PLACES_SHOWN else ''})"
            for reason, count in self.counts.most_common()
        ]


def find_documents(block: Block, bad_records: BadRecords) -> Iterator[Document]:
    """The documents in `block`, normalised."""
    for place, value in block.records(bad_records):
        if document := check_text(value, place, bad_records):
            yield document


def check_text(text: object, place: str, bad_records: BadRecords) -> Document | None:
    """`text`, normalised, as a document, or None (and reported) if it breaks one of the rules."""
    rules = bad_records.rules
    if not isinstance(text, str):
        bad_records.reject(place, "the text is not a string", f"it is {type(text).__name__}")
        return None
    if not text or text.isspace():
        bad_records.too_short(place, "empty")
        return None
    if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
        bad_records.reject(place, "the text is not valid Unicode", f"lone surrogate {surrogate.group()!a}")
        return None
    if 4 * len(text) > rules.max_document_bytes and (size := len(text.encode())) > rules.max_document_bytes:
        bad_records.reject(
            place, too_long(rules.max_document_bytes), f"it has {size:,} bytes; a larger limit takes more memory"
        )
        return None
    if rules.normalization != "none":
        text = unicodedata.normalize(rules.normalization, text)  # type: ignore[arg-type]
    if len(text) < rules.min_length:
        bad_records.too_short(place, f"shorter than min_length={rules.min_length}")
        return None
    return Document(text, place)


def too_long(max_document_bytes: int) -> str:
    return f"the document is longer than max_document_bytes={max_document_bytes}"


@dataclass(frozen=True)
class RejectedRecord:
    """In place of a record that is too large to be passed on, or that cannot be found."""

    place: str
    reason: str
    detail: str = ""
    size: int = field(default=0)

    def records(self, bad_records: BadRecords) -> Iterator[tuple[str, object]]:
        bad_records.reject(self.place, self.reason, self.detail)
        return iter(())
