"""Where documents come from: files and folders, Hugging Face datasets, and Python's own documentation.

    open_source(settings) -> Source,  Source.documents(bad_records) -> Document, Document, ...

Readers are in data_prep/files.py, data_prep/hub.py and data_prep/embedded.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.documents import DEFAULT_MAX_DOCUMENT_BYTES, Source
from data_prep.embedded import EmbeddedSource
from data_prep.files import SUFFIXES, FilesSource
from data_prep.hub import HubSource
from kraken_train.common.errors import DataError
from kraken_train.common.files import kind_of
from kraken_train.common.free_text import FilePath, Text

EMBEDDED = "embedded"
WHAT_SOURCES_ARE = (
    "a source is a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of such files, "
    "the name of a Hugging Face dataset (OWNER/NAME), or embedded"
)


@dataclass(frozen=True)
class SourceSettings:
    """The settings that say what to read (conf/prepare.yaml)."""

    source: FilePath  # .txt, .jsonl[.gz|.zst] or .parquet file, a folder of them, a Hugging Face dataset, or "embedded"
    text_field: Text = "text"  # field or column that holds the text
    dataset_config: Text | None = None  # configuration of a Hugging Face dataset; null: its default
    dataset_split: Text = "train"  # split of a Hugging Face dataset
    dataset_revision: Text | None = None  # branch, tag or commit of a Hugging Face dataset; null: its main branch
    dataset_streaming: bool = True  # read a Hugging Face dataset over the network; false: download all of it first
    # attempts to continue a Hugging Face dataset after a failure, with no row in between; 0: end at the first one
    dataset_retries: int = 5
    # longest text, in UTF-8 bytes; a worker may need 100 times as much memory
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES


def open_source(settings: SourceSettings) -> Source:
    """The source that `settings.source` names. Raises DataError if there is none of that name."""
    name = settings.source
    if name == EMBEDDED:
        return EmbeddedSource()
    path = Path(os.path.expanduser(name))
    if name and kind_of(path):
        return FilesSource(path, settings.text_field, settings.max_document_bytes)
    if not name or name.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise DataError(f"source={name}: {name or 'the empty name'} does not exist; {WHAT_SOURCES_ARE}")
    return HubSource(
        name,
        settings.text_field,
        settings.dataset_config,
        settings.dataset_split,
        settings.dataset_streaming,
        settings.dataset_revision,
        settings.dataset_retries,
    )
