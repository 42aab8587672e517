"""`manifest.json`: what a prepared data set consists of, and quick checks that the files beside it are those.

It is written last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from data_prep.indexed import TOKEN_TYPES, bin_path, file_size, idx_path, idx_size
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.common.files import file_sha256, is_plain_name, kind_of, read_file, replace_synced
from kraken_train.common.parsing import find_wrong_type, parse_json
from kraken_train.common.settings import from_dict

FORMAT = "kraken-data"
VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")
PROBE_BLOCKS, PROBE_BLOCK_BYTES = 64, 4096
DTYPES = {dtype.name for dtype in TOKEN_TYPES.values()}
REQUEST: dict[str, type | UnionType] = {"slice": str | None, "tokenizer": dict}  # those entries that are used
ROUND_TRIPS: dict[str, type | UnionType] = {"checked": int, "failed": int, "example": str | None}


@dataclass(frozen=True)
class TokenizerEntry:
    kind: str
    vocab_size: int
    end_of_document: int  # the token that ends each document
    files: dict[str, str]  # name in the folder `tokenizer` -> SHA-256


@dataclass(frozen=True)
class ShardEntry:
    name: str  # NAME.bin and NAME.idx
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str
    bin_probe_sha256: str  # see `probe_sha256`


@dataclass(frozen=True)
class SplitEntry:
    shards: list[ShardEntry]
    text_bytes: int  # UTF-8 bytes of the documents, so that a loss can be given in bits per byte

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    tokenizer: TokenizerEntry
    dtype: str  # NumPy name of the tokens' type
    splits: dict[str, SplitEntry]  # "train", and "validation" unless its fraction was 0
    source: dict[str, Any]  # kind, location and settings, for people
    request: dict[str, Any]  # what was asked for; a repeated command compares it
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> number of records left out
    skipped_places: dict[str, list[str]] = field(default_factory=dict)  # reason -> file and line of the first few
    round_trips: dict[str, Any] = field(default_factory=dict)  # documents that were decoded again, see encoding.py

    def require_possible(self) -> None:
        """Raises ValueError for what no prepared folder has, such as the name of a file elsewhere."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}")
        if not 0 <= self.tokenizer.end_of_document < self.vocab_size < 2**31:
            raise ValueError(f"vocab_size={self.vocab_size}, end_of_document={self.tokenizer.end_of_document}")
        for name in [*self.tokenizer.files, *(shard.name for split in self.splits.values() for shard in split.shards)]:
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is no name of a file in this folder")
        for split in self.splits.values():
            for shard in split.shards:
                if shard.documents < 1 or shard.tokens < 0:
                    raise ValueError(f"{shard.name} has impossible numbers of documents or tokens")
        if wrong := find_wrong_type(self.request, REQUEST) or find_wrong_type(self.round_trips, ROUND_TRIPS):
            raise ValueError(f"its entry {wrong} is of the wrong type")
        if unknown := next((name for name in self.round_trips if name not in ROUND_TRIPS), None):
            raise ValueError(f"its entry round_trips.{unknown} is not known")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def text_bytes(self) -> int:
        return sum(split.text_bytes for split in self.splits.values())

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content: tokenizer and shards, but no paths or times. Equal data have equal ones."""
        content = {
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "dtype": self.dtype,
            "splits": {
                name: [(s.bin_sha256, s.idx_sha256) for s in split.shards] for name, split in self.splits.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def save(self, data_dir: Path) -> None:
        """Write `manifest.json` atomically."""
        totals = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}
        record = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "totals": totals}
        replace_synced(data_dir / MANIFEST_NAME, json.dumps(record | dataclasses.asdict(self), indent=1) + "\n")


def load_manifest(data_dir: Path) -> Manifest:
    """The manifest of a prepared folder. Raises DataError if there is none or it cannot be understood."""
    path = data_dir / MANIFEST_NAME
    if data_dir.is_file():
        raise DataError(f"{data_dir} is a file, not a folder of prepared data; prepare it with source={data_dir}")
    if not data_dir.is_dir() and (found := kind_of(data_dir)):
        raise DataError(f"{data_dir} is {found}, not a folder of prepared data; name the right folder")
    if not data_dir.is_dir():
        raise DataError(
            f"{data_dir} does not exist; prepare data with python -m data_prep.prepare output_dir={data_dir}"
        )
    if not path.is_file():
        raise DataError(f"{data_dir} holds no {MANIFEST_NAME}, so it is no prepared data; name the right folder")
    try:
        record = parse_json(read_file(path))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again or prepare the data again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of prepared data: its format is not {FORMAT}; name the right folder")
    version = record.get("version")
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{path} has the version {version!r}; expected {VERSION}; prepare the data again")
    if version > VERSION:
        raise DataError(
            f"{path} has version {version} of the format, and this program knows up to {VERSION}; "
            "update the program, or prepare the data again with this one"
        )
    try:
        manifest = _parse(record)
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again or prepare the data again") from error
    if record.get("fingerprint") != manifest.fingerprint:
        raise DataError(
            f"{path} was changed: its fingerprint {record.get('fingerprint')} is not that of its content, "
            f"{manifest.fingerprint}; copy it again or prepare the data again"
        )
    try:
        manifest.require_possible()
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); copy it again or prepare the data again") from error
    return manifest


def _parse(record: Mapping[str, Any]) -> Manifest:
    def split(entry: Mapping[str, Any]) -> SplitEntry:
        return SplitEntry([from_dict(shard, ShardEntry) for shard in entry["shards"]], int(entry["text_bytes"]))

    splits = {name: split(entry) for name, entry in record["splits"].items()}
    if "train" not in splits or not set(splits) <= set(SPLITS) or not all(s.shards for s in splits.values()):
        raise ValueError(f"its splits are {sorted(splits)}")
    optional = {name: record[name] for name in ("skipped_places", "round_trips") if name in record}
    needed = {name: record[name] for name in ("dtype", "source", "request", "skipped")}
    tokenizer = from_dict(record["tokenizer"], TokenizerEntry)
    return from_dict({"tokenizer": tokenizer, "splits": splits, **needed, **optional}, Manifest)


# ---------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------


def verify_quick(data_dir: Path) -> Manifest:
    """Check that the folder holds the files that its manifest lists, and return the manifest.

    Compares sizes, whole index and tokenizer files, and a probe of each `.bin`: about a megabyte per shard, however
    large it is. Raises DataError for a missing, empty, truncated or foreign file.
    """
    manifest = load_manifest(data_dir)
    for split in manifest.splits.values():
        for shard in split.shards:
            _verify_shard(data_dir, shard)
    for name, sha256 in manifest.tokenizer.files.items():
        path = data_dir / TOKENIZER_FOLDER / name
        file_size(path)
        require_same_content(path, file_sha256(path), sha256)
    return manifest


def _verify_shard(data_dir: Path, shard: ShardEntry) -> None:
    prefix = data_dir / shard.name
    for path, expected in (
        (bin_path(prefix), shard.bin_bytes),
        (idx_path(prefix), idx_size(shard.documents, shard.documents)),
    ):
        found = file_size(path)
        if found != expected:
            state = "truncated" if found < expected else "a file of other data"
            raise DataError(
                f"{path} has {found} bytes, but {data_dir / MANIFEST_NAME} lists it with {expected}: it is {state}; "
                "copy it again or prepare the data again"
            )
    require_same_content(idx_path(prefix), file_sha256(idx_path(prefix)), shard.idx_sha256)
    require_same_content(bin_path(prefix), probe_sha256(bin_path(prefix)), shard.bin_probe_sha256)


def require_same_content(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{path} has other content than {MANIFEST_NAME} lists (checksum {found[:12]}, expected {expected[:12]}): "
            "it belongs to other data or is damaged; copy it again or prepare the data again"
        )


def probe_sha256(path: Path) -> str:
    """SHA-256 over 64 evenly spaced blocks of 4 KiB, the first and the last included, or over all of a small file."""
    size = path.stat().st_size
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= PROBE_BLOCKS * PROBE_BLOCK_BYTES:
            checksum.update(file.read())
        else:
            for block in range(PROBE_BLOCKS):
                file.seek((size - PROBE_BLOCK_BYTES) * block // (PROBE_BLOCKS - 1))
                checksum.update(file.read(PROBE_BLOCK_BYTES))
    return checksum.hexdigest()
