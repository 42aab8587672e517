"""Prepare data: text from a source -> tokens -> shards with a manifest.

    python -m data_prep.prepare source=FILE_FOLDER_OR_NAME tokenizer=sentencepiece output_dir=DATA

Settings are in conf/prepare.yaml and conf/tokenizer/. The result is a folder

    manifest.json               what the folder holds, with checksums
    train_00000.bin/.idx, ...   token shards (data_prep/indexed.py)
    validation_00000.bin/.idx, ...
    tokenizer/                  the tokenizer's files
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.documents import BadRecords, Source
from data_prep.hub import HubSource
from data_prep.indexed import token_dtype
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, TokenizerEntry
from data_prep.output import finished_result, partial_folder
from data_prep.progress import Progress
from data_prep.sources import SourceSettings, open_source
from data_prep.splits import write_splits
from data_prep.tokenizers import Tokenizer, TokenizerSettings, build_tokenizer
from kraken_train.cli import run_entry
from kraken_train.errors import ConfigError
from kraken_train.files import file_sha256
from kraken_train.rules import require_choice, require_positive

PATH_KEYS = ("source", "output_dir", "tokenizer.path")
TEXT_KEYS = ("text_field", "dataset_config", "dataset_split", "tokenizer.end_of_document")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceSettings):
    """conf/prepare.yaml, which says what each setting means."""

    output_dir: str
    tokenizer: TokenizerSettings
    validation_fraction: float = 0.005
    max_documents: int | None = None
    shard_tokens: int = 500_000_000
    on_bad_record: str = "fail"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give output_dir=FOLDER")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction={self.validation_fraction} must be at least 0 and below 1")
        if self.max_documents is not None:
            require_positive("max_documents", self.max_documents)
        require_positive("shard_tokens", self.shard_tokens)
        require_choice("on_bad_record", self.on_bad_record, ("fail", "skip"))


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data that `config` asks for, unless they are there already. Raises ConfigError or DataError."""
    started = time.monotonic()
    source = open_source(config)
    output = Path(config.output_dir).expanduser().resolve()
    request = describe_request(config, source)
    finished = finished_result(output, request)
    if finished:
        print(f"{output} already holds the result of this very request (fingerprint {finished.fingerprint})")
        return finished
    for file in getattr(source, "ignored", [])[:3]:
        print(f"note: {file} is of no kind that is read, so it is left out")
    if source.kind == HubSource.kind:
        print(
            f"{source.location} is no file or folder here; asking the Hugging Face Hub for a dataset of that name",
            flush=True,
        )

    bad_records = BadRecords(config.on_bad_record)
    with partial_folder(output) as folder:
        tokenizer = make_tokenizer(config, source, folder / TOKENIZER_FOLDER)
        documents = islice(source.documents(bad_records), config.max_documents)
        splits = write_splits(folder, documents, tokenizer, config.validation_fraction, config.shard_tokens)
        manifest = Manifest(
            tokenizer=describe_tokenizer(tokenizer, folder / TOKENIZER_FOLDER),
            dtype=token_dtype(tokenizer.vocab_size).name,
            splits=splits,
            source=source.identity(),
            request=request,
            skipped=dict(bad_records.counts),
        )
        manifest.save(folder)
    print_summary(manifest, bad_records, output, time.monotonic() - started)
    return manifest


def describe_request(config: PrepareConfig, source: Source) -> dict[str, Any]:
    """All that the result depends on: with an equal request there is nothing to do again."""
    tokenizer = dataclasses.asdict(config.tokenizer)
    if config.tokenizer.path and (path := Path(config.tokenizer.path).expanduser()).exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        tokenizer["files"] = {file.name: file_sha256(file) for file in files if file.is_file()}
    return {
        "source": source.identity(),
        "tokenizer": tokenizer,
        "validation_fraction": config.validation_fraction,
        "max_documents": config.max_documents,
        "shard_tokens": config.shard_tokens,
        "on_bad_record": config.on_bad_record,
    }


def make_tokenizer(config: PrepareConfig, source: Source, folder: Path) -> Tokenizer:
    """The tokenizer, trained on the source if it is of that kind, and saved to `folder`."""

    def texts() -> Iterator[str]:
        with Progress("reading text to train the tokenizer") as progress:
            # Records left out are counted later, when all of the source is read.
            documents = source.documents(BadRecords(config.on_bad_record))
            for document in islice(documents, config.max_documents):
                progress.add(1, len(document.text.encode()))
                yield document.text

    tokenizer = build_tokenizer(config.tokenizer, texts)
    folder.mkdir()
    tokenizer.save(folder)
    return tokenizer


def describe_tokenizer(tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
    files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    return TokenizerEntry(tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_document, files)


def print_summary(manifest: Manifest, bad_records: BadRecords, output: Path, seconds: float) -> None:
    for line in bad_records.summary():
        print(line)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shard(s)")
    print(
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token, vocabulary {manifest.vocab_size} "
        f"({manifest.tokenizer.kind}), {manifest.dtype}"
    )
    print(f"fingerprint {manifest.fingerprint}")
    print(f"prepared {output} in {seconds:.0f} s")


def main(config: PrepareConfig) -> None:
    prepare(config)


if __name__ == "__main__":
    run_entry(main, PrepareConfig, "prepare", PATH_KEYS, TEXT_KEYS)
