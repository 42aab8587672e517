"""Documents from a dataset of the Hugging Face Hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from data_prep.documents import BLOCK_BYTES, START, WHOLE, Cursor, DocumentsOfBlocks, Part
from data_prep.records import Values
from kraken_train.common.errors import DataError

MOST_ROWS = 4096  # in a block
LONGEST_PAUSE = 60  # seconds, before a row is tried again


class HubSource(DocumentsOfBlocks):
    """A dataset of the Hugging Face Hub: streamed, or downloaded as a whole before the first row is read.

    With HF_HUB_OFFLINE=1 it is the copy in the local cache. A block's cursor is the number of rows before its end.
    """

    kind = "huggingface"

    def __init__(
        self, name: str, text_field: str, config: str | None, split: str, streaming: bool = True,
        revision: str | None = None, retries: int = 0,
    ) -> None:  # fmt: skip
        self.location = name
        self.text_field = text_field
        self.config = config
        self.split = split
        self.streaming = streaming
        self.revision = revision
        self.retries = retries
        self.fraction = 0.0

    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "location": self.location,
            "text_field": self.text_field,
            "dataset_config": self.config,
            "dataset_split": self.split,
        } | ({"dataset_revision": self.revision} if self.revision else {})

    def blocks(self, start: Cursor = START, part: Part = WHOLE) -> Iterator[tuple[Cursor, Values]]:
        rows, total = self._open()
        begin, end = (0, None) if part == WHOLE else part.bounds(self._require(total))
        number = max(begin, start[1])
        expected = (end or total or 0) - begin
        values: list[tuple[str, object]] = []
        size = 0
        for row in self._rows(rows, number):
            if number == end:
                break
            number += 1
            text = row[self.text_field]
            values.append((f"{self.location} row {number}", text))
            size += len(text.encode(errors="replace")) if isinstance(text, str) else 0
            if size >= BLOCK_BYTES or len(values) == MOST_ROWS:
                self.fraction = (number - begin) / expected if expected else 0.0
                yield (0, number), Values(values, size)
                values, size = [], 0
        if values:
            yield (0, number), Values(values, size)
        self.fraction = 1.0

    def _rows(self, dataset: Any, start: int) -> Iterator[dict[str, Any]]:
        """Rows from number `start` (counted from 0) on, read again from where it fails. Raises DataError."""
        number = start
        rows = None
        failures = 0  # since the latest row
        while True:
            try:
                rows = rows or iter(dataset.skip(number) if number else dataset)
                row = next(rows, None)
            except Exception as error:  # the library raises its own, those of its file systems and of HTTP clients
                failures += 1
                failed = f"reading row {number + 1} from the Hugging Face Hub failed ({_reason(error)})"
                if failures > self.retries:
                    raise DataError(
                        f"source={self.location}: {failed}, {failures} times; check dataset_config, dataset_split and "
                        "the network; dataset_retries allows more"
                    ) from error
                rows = None
                seconds = min(2 ** (failures - 1), LONGEST_PAUSE)
                print(f"note: {failed}; it is tried again in {seconds} s ({failures} of {self.retries})", flush=True)
                time.sleep(seconds)
                continue
            if row is None:
                return
            number += 1
            failures = 0
            if self.text_field not in row:
                raise DataError(
                    f"source={self.location}: the dataset has no column {self.text_field}; its columns are "
                    f"{', '.join(row)}; choose one with text_field=COLUMN"
                )
            yield row

    def _open(self) -> tuple[Any, int | None]:
        """The dataset and, if it is known, its number of rows. Raises DataError."""
        try:
            import datasets  # noqa: PLC0415 (takes seconds)

            datasets.disable_progress_bars()
            streaming = self.streaming and not datasets.config.HF_HUB_OFFLINE
            dataset = datasets.load_dataset(
                self.location, self.config, split=self.split, streaming=streaming, revision=self.revision
            )
        except Exception as error:
            raise DataError(
                f"source={self.location}: there is no such file or folder here, and no such dataset could be opened "
                f"on the Hugging Face Hub ({_reason(error)}); if a file is meant, its path is mistyped; otherwise "
                "check the dataset's name, dataset_config, dataset_split and the network"
            ) from error
        if not streaming and hasattr(dataset, "__len__"):
            return dataset, len(dataset)
        splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
        rows = splits[self.split].num_examples if self.split in splits else None
        return dataset, rows or None

    def _require(self, total: int | None) -> int:
        if total is None:
            raise DataError(
                f"source={self.location}: its number of rows is not known while it is streamed, so slice=PART/PARTS "
                "cannot divide it; download it with dataset_streaming=false"
            )
        return total


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
