"""Documents, what gives them, and what happens to records that are none."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from kraken_train.errors import DataError

PLACES_SHOWN = 3


@dataclass(frozen=True)
class Document:
    text: str
    place: str  # file and line, for messages


class Source(Protocol):
    """Can be read any number of times and gives the same documents in the same order."""

    kind: str
    location: str

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, as JSON values: equal identities give equal documents."""
        ...

    def documents(self, bad_records: BadRecords) -> Iterator[Document]:
        """All documents with text; the others are reported to `bad_records`. Raises DataError."""
        ...


class BadRecords:
    """Decides what happens to a record that is no document: `policy` "fail" raises, "skip" counts it."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()  # reason -> records
        self.places: defaultdict[str, list[str]] = defaultdict(list)  # reason -> the first few places

    def reject(self, place: str, reason: str, detail: str = "") -> None:
        """A broken record: DataError or one more in the count of `reason`, as the policy says."""
        if self.policy == "fail":
            raise DataError(
                f"{place}: {reason}{f' ({detail})' if detail else ''}; "
                "repair it, or leave out all such records with on_bad_record=skip"
            )
        self._count(place, reason)

    def empty(self, place: str) -> None:
        """A record without text is never an error."""
        self._count(place, "empty")

    def _count(self, place: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.places[reason]) < PLACES_SHOWN:
            self.places[reason].append(place)

    def summary(self) -> list[str]:
        """One line per reason."""
        return [
            f"skipped {count:,} {'record' if count == 1 else 'records'}: {reason} "
            f"({', '.join(self.places[reason])}{', ...' if count > PLACES_SHOWN else ''})"
            for reason, count in self.counts.most_common()
        ]


def check_text(text: object, place: str, bad_records: BadRecords) -> Document | None:
    """`text` as a document, or None (and reported) if it is no Unicode string or has no visible character."""
    if not isinstance(text, str):
        bad_records.reject(place, "the text is not a string", f"it is {type(text).__name__}")
        return None
    if not text or text.isspace():
        bad_records.empty(place)
        return None
    if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
        bad_records.reject(place, "the text is not valid Unicode", f"lone surrogate {surrogate.group()!a}")
        return None
    return Document(text, place)
