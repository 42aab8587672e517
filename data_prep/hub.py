"""Documents from a dataset of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.documents import BadRecords, Document, check_text
from kraken_train.errors import DataError


class HubSource:
    """A dataset of the Hugging Face Hub, streamed; with HF_HUB_OFFLINE=1 the copy in the local cache."""

    kind = "huggingface"

    def __init__(self, name: str, text_field: str, config: str | None, split: str) -> None:
        self.location = name
        self.text_field = text_field
        self.config = config
        self.split = split

    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "location": self.location,
            "text_field": self.text_field,
            "dataset_config": self.config,
            "dataset_split": self.split,
        }

    def documents(self, bad_records: BadRecords) -> Iterator[Document]:
        field, number = self.text_field, 0
        rows = self._rows()
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the library raises its own, those of its file systems and of HTTP clients
                raise DataError(
                    f"source={self.location}: reading row {number + 1} from the Hugging Face Hub failed "
                    f"({_reason(error)}); check dataset_config, dataset_split and the network"
                ) from error
            if row is None:
                return
            number += 1
            if field not in row:
                raise DataError(
                    f"source={self.location}: the dataset has no column {field}; its columns are "
                    f"{', '.join(row)}; choose one with text_field=COLUMN"
                )
            document = check_text(row[field], f"{self.location} row {number}", bad_records)
            if document:
                yield document

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            import datasets  # noqa: PLC0415 (takes seconds)

            datasets.disable_progress_bars()
            return iter(
                datasets.load_dataset(
                    self.location,
                    self.config,
                    split=self.split,
                    streaming=not datasets.config.HF_HUB_OFFLINE,
                )
            )
        except Exception as error:
            raise DataError(
                f"source={self.location}: there is no such file or folder here, and no such dataset could be opened "
                f"on the Hugging Face Hub ({_reason(error)}); if a file is meant, its path is mistyped; otherwise "
                "check the dataset's name, dataset_config, dataset_split and the network"
            ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
