"""Prepare data: text from a source -> tokens -> shards with a manifest.

    python -m data_prep.prepare source=FILE_FOLDER_OR_NAME tokenizer=sentencepiece output_dir=DATA
    python -m data_prep.prepare data=openwebtext tokenizer=gpt2 output_dir=DATA

Settings are in conf/prepare.yaml, conf/data/ and conf/tokenizer/. The result is a folder

    manifest.json               what the folder holds, with checksums
    train_00000.bin/.idx, ...   token shards (data_prep/indexed.py)
    validation_00000.bin/.idx, ...
    tokenizer/                  the tokenizer's files

The source is read as blocks of about a megabyte (documents.py). Worker processes turn them into tokens (workers.py,
encoding.py), which are written in the source's order (shard_builder.py). So the result depends neither on the number of
workers nor on interruptions: the same command continues from the last finished piece.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.documents import WHOLE, BadRecords, Part, Source, TextRules
from data_prep.encoding import BlockEncoder
from data_prep.hub import HubSource
from data_prep.indexed import token_dtype
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, TokenizerEntry
from data_prep.output import Attempt, attempt, finished_result
from data_prep.progress import Progress
from data_prep.shard_builder import AssemblyRules, ShardBuilder, assemble
from data_prep.sources import SourceSettings, open_source
from data_prep.tokenizer_settings import TokenizerSettings
from data_prep.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from data_prep.workers import EncoderSettings, encode_blocks
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.common.files import file_sha256, real_path
from kraken_train.common.free_text import FilePath, Text
from kraken_train.common.validation import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceSettings):
    """conf/prepare.yaml, which says what each setting means."""

    output_dir: FilePath  # folder to create
    tokenizer: TokenizerSettings
    validation_fraction: float = 0.005  # of all documents, chosen by a hash of their text; 0: no validation split
    max_documents: int | None = None  # documents to use, from the first; null: all
    shard_tokens: int = 500_000_000  # tokens per shard, at least one document
    # fail | skip: broken lines, invalid UTF-8, missing fields, texts above max_document_bytes
    on_bad_record: str = "fail"
    on_short_document: str = "skip"  # fail | skip: texts without a visible character or below min_length
    normalization: str = "none"  # none | NFC | NFKC, before everything that follows
    min_length: int = 1  # characters of a document, at least
    drop_duplicates: bool = False  # keep only the first of equal texts
    append_end_of_document: bool = True  # end each document with the tokenizer's end-of-document token
    # PART/PARTS, as in 3/16: prepare one part of the source, for data_prep.merge; null: all of it
    slice: Text | None = None
    num_workers: int | None = None  # processes that tokenize; null: one per usable core; 0: none, this process does it
    resume: bool = True  # continue from what an interrupted attempt has finished; false: start anew

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
        require_at_least("dataset_retries", self.dataset_retries, 0)
        if self.num_workers is not None:
            require_at_least("num_workers", self.num_workers, 0)
        self.text_rules.validate()
        if self.part == WHOLE:
            return
        for name in ("max_documents", "drop_duplicates"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name}={str(getattr(self, name)).lower()} needs all of the source, so it cannot be combined with "
                    f"slice={self.slice}; leave out one of them"
                )

    @property
    def text_rules(self) -> TextRules:
        return TextRules(**{field.name: getattr(self, field.name) for field in fields(TextRules)})

    @property
    def part(self) -> Part:
        return Part.parse(self.slice) if self.slice else WHOLE

    @property
    def assembly_rules(self) -> AssemblyRules:
        return AssemblyRules(**{field.name: getattr(self, field.name) for field in fields(AssemblyRules)})


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data that `config` asks for, unless they are there already. Raises ConfigError or DataError."""
    started = time.monotonic()
    source = open_source(config)
    output = real_path(config.output_dir)
    request = describe_request(config, source)
    finished = finished_result(output, request, default_settings())
    if finished:
        print(f"{output} already holds the result of this very request (fingerprint {finished.fingerprint})")
        return finished
    for note in getattr(source, "left_out", []):
        print(f"note: {note}", flush=True)
    if source.kind == HubSource.kind:
        print(
            f"{source.location} is no file or folder here; asking the Hugging Face Hub for a dataset of that name",
            flush=True,
        )
    with attempt(output, request, config.resume) as current:
        tokenizer = make_tokenizer(config, source, current)
        dtype = token_dtype(tokenizer.vocab_size)
        with ShardBuilder(current, dtype, config.assembly_rules, config.text_rules, started) as assembly:
            if current.journal:
                print(f"continuing after the {assembly.documents:,} documents of an earlier attempt", flush=True)
            tokenize(config, source, tokenizer, assembly)
            splits = assembly.finish(needs_both_splits=config.part == WHOLE)
        if "train" not in splits:
            raise DataError(f"slice={config.slice} gets no document for training; divide the source into fewer parts")
        manifest = Manifest(
            tokenizer=describe_tokenizer(tokenizer, current.folder / TOKENIZER_FOLDER),
            dtype=dtype.name,
            splits=splits,
            source=source.identity(),
            request=request,
            skipped=dict(assembly.bad_records.counts),
            skipped_places=dict(assembly.bad_records.places),
            round_trips=dataclasses.asdict(assembly.round_trips),
        )
        manifest.save(current.folder)
        assembly.remove_leftovers()
    print_summary(manifest, assembly, output, time.monotonic() - started)
    return manifest


def describe_request(config: PrepareConfig, source: Source) -> dict[str, Any]:
    """All that the result depends on: with an equal request there is nothing to do again."""
    tokenizer = dataclasses.asdict(config.tokenizer)
    if config.tokenizer.path and (path := real_path(config.tokenizer.path)).exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        tokenizer["files"] = {file.name: file_sha256(file) for file in files if file.is_file()}
    settings = {name: getattr(config, name) for name in default_settings()}
    return {"source": source.identity(), "tokenizer": tokenizer} | settings


def default_settings() -> dict[str, Any]:
    """The settings that say what is made of the source's text, with their defaults."""
    elsewhere = {field.name for field in fields(SourceSettings)} | {"output_dir", "tokenizer", "num_workers", "resume"}
    ours = {field.name: field.default for field in fields(PrepareConfig) if field.name not in elsewhere}
    return ours | {"max_document_bytes": PrepareConfig.max_document_bytes}


def make_tokenizer(config: PrepareConfig, source: Source, current: Attempt) -> Tokenizer:
    """The tokenizer, trained on the source if it is of that kind, and saved in the attempt's folder."""
    folder = current.folder / TOKENIZER_FOLDER
    if current.journal:
        return load_tokenizer(folder)

    def texts() -> Iterator[str]:
        with Progress("reading text to train the tokenizer") as progress:
            # Records left out are counted later, when all of the source is read.
            documents = source.documents(BadRecords(config.text_rules))
            for document in islice(documents, config.max_documents):
                progress.add(1, len(document.text.encode()))
                yield document.text

    tokenizer = build_tokenizer(config.tokenizer, texts)
    folder.mkdir()
    tokenizer.save(folder)
    return tokenizer


def tokenize(config: PrepareConfig, source: Source, tokenizer: Tokenizer, assembly: ShardBuilder) -> None:
    """Add to `assembly` what it does not have yet."""
    if assembly.complete:
        return
    settings = EncoderSettings(
        assembly.attempt.folder / TOKENIZER_FOLDER, config.text_rules, config.append_end_of_document
    )
    num_workers = len(os.sched_getaffinity(0)) if config.num_workers is None else config.num_workers

    def fraction() -> float:
        return max(source.fraction, assembly.documents / (config.max_documents or float("inf")))

    blocks = source.blocks(assembly.cursor, config.part)
    encoder = BlockEncoder(tokenizer, config.text_rules, config.append_end_of_document)
    with Progress("tokenizing", fraction) as progress:
        assemble(assembly, encode_blocks(blocks, settings, num_workers), encoder, progress)


def describe_tokenizer(tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
    files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    return TokenizerEntry(tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_document, files)


def print_summary(manifest: Manifest, assembly: ShardBuilder, output: Path, seconds: float) -> None:
    for line in assembly.bad_records.summary():
        print(line)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shard(s)")
    print(
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token, vocabulary {manifest.vocab_size} "
        f"({manifest.tokenizer.kind}), {manifest.dtype}"
    )
    trips = assembly.round_trips
    failed = f"{trips.failed:,} did not come back as they were: {trips.example}" if trips.failed else "all came back"
    print(f"of {trips.checked:,} documents encoded again, all have the same ids; decoded again, {failed}")
    if assembly.encoder_seconds:
        share = 100 * assembly.tokenizer_seconds / assembly.encoder_seconds
        print(f"{assembly.encoder_seconds:.1f} s of processor time from text to tokens, {share:.0f}% in the tokenizer")
    print(f"fingerprint {manifest.fingerprint}")
    print(f"prepared {output} in {seconds:.0f} s")


def main() -> None:
    run_entry(prepare, PrepareConfig, "prepare")


if __name__ == "__main__":
    main()
