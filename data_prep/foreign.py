"""Make prepared data of tokens that another program has written, without copying them:

    python -m data_prep.foreign source=FOLDER format=nanogpt tokenizer=gpt2 output_dir=DATA

`format=nanogpt`: `train.bin` and perhaps `val.bin`, uint16 tokens and nothing else; a document ends with the
tokenizer's end-of-document token. `format=megatron`: `NAME.bin` with `NAME.idx`, as Megatron-LM, GPT-NeoX and NeMo
write them; a NAME that begins with "val" belongs to the validation split.

The tokens' files are linked: hard where the file system can (then no program may change them in place), else by a
symbolic link (then they must stay where they are), else copied. Every token is read once, to check that the
tokenizer has it. The size of the original text is not known, so there are no bits per byte for such data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import LONGEST_SEQUENCE, Shard, bin_path, file_size, idx_path, index_bytes
from data_prep.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    probe_sha256,
)
from data_prep.output import attempt, finished_result
from data_prep.tokenizer_settings import TokenizerSettings
from data_prep.tokenizers import Tokenizer, build_tokenizer
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.common.files import file_sha256, real_path
from kraken_train.common.free_text import FilePath
from kraken_train.common.validation import require_choice

FORMATS = ("nanogpt", "megatron")
NANOGPT_DTYPE = np.dtype("<u2")
TOKENS_AT_ONCE = 1 << 23
SAMPLE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """See conf/foreign.yaml."""

    # nanogpt: folder with train.bin and perhaps val.bin; megatron: folder of .bin/.idx pairs, or one of them
    source: FilePath
    format: str  # nanogpt | megatron
    output_dir: FilePath  # folder to create
    tokenizer: TokenizerSettings

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        require_choice("format", self.format, FORMATS)
        if self.tokenizer.kind == "sentencepiece":
            raise ConfigError(
                "tokenizer=sentencepiece would train a new one, but the tokens exist already; name the one that made "
                "them: tokenizer=gpt2, or huggingface or sentencepiece_model with tokenizer.path=FILE"
            )


@dataclass(frozen=True)
class ForeignShard:
    """One file of tokens of another program."""

    path: Path
    dtype: np.dtype
    lengths: NDArray[np.int64] | None  # tokens of each document; None: they end with the end-of-document token


def accept(config: ForeignConfig) -> Manifest:
    """Make the folder that `config` asks for, unless it is there already. Raises ConfigError or DataError."""
    source = real_path(config.source)
    splits = find_nanogpt(source) if config.format == "nanogpt" else find_megatron(source)
    tokenizer = build_tokenizer(config.tokenizer, lambda: iter(()))
    dtype = require_one_dtype(splits)
    request = {
        "source": {
            "kind": config.format,
            "files": {shard.path.name: file_size(shard.path) for shards in splits.values() for shard in shards},
        },
        "tokenizer": asdict(config.tokenizer),
        "append_end_of_document": False,  # documents end as their writer ended them
    }
    output = real_path(config.output_dir)
    finished = finished_result(output, request, {})
    if finished:
        print(f"{output} already holds the result of this very request (fingerprint {finished.fingerprint})")
        return finished
    with attempt(output, request, resume=True) as work:  # True: leaves another command's unfinished work alone
        folder = work.folder
        (folder / TOKENIZER_FOLDER).mkdir()
        tokenizer.save(folder / TOKENIZER_FOLDER)
        files = {file.name: file_sha256(file) for file in sorted((folder / TOKENIZER_FOLDER).iterdir())}
        manifest = Manifest(
            tokenizer=TokenizerEntry(tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_document, files),
            dtype=dtype.name,
            splits={
                split: SplitEntry(
                    [take(shard, folder, f"{split}_{i:05d}", tokenizer) for i, shard in enumerate(shards)], text_bytes=0
                )
                for split, shards in splits.items()
            },
            source={"kind": config.format, "location": str(source)},
            request=request,
        )
        manifest.save(folder)
    if "validation" not in splits:
        print("note: there is no validation split")
    print(f"prepared {output}, fingerprint {manifest.fingerprint}")
    return manifest


# ---------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------


def find_nanogpt(source: Path) -> dict[str, list[ForeignShard]]:
    """train.bin and val.bin of a folder. Raises DataError."""
    require_foreign_folder(source)
    if not (source / "train.bin").is_file():
        raise DataError(f"source={source} holds no train.bin, which format=nanogpt needs; name the folder that has it")
    splits = {}
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        path = source / name
        if os.path.lexists(path):
            if file_size(path) % NANOGPT_DTYPE.itemsize:
                raise DataError(
                    f"{path} has {file_size(path)} bytes, an odd number, so it is not of uint16 tokens; "
                    "copy it again or write it again"
                )
            splits[split] = [ForeignShard(path, NANOGPT_DTYPE, None)]
    return splits


def find_megatron(source: Path) -> dict[str, list[ForeignShard]]:
    """The pairs of a folder in the order of their names, or the one pair `source`[.bin|.idx]. Raises DataError."""
    if source.is_dir():
        require_foreign_folder(source)
        prefixes = sorted(path.with_suffix("") for path in source.glob("*.idx"))
        alone = sorted({path.with_suffix("") for path in source.glob("*.bin")} - set(prefixes))
        if prefixes and alone:
            raise DataError(
                f"{bin_path(alone[0])} has no index {idx_path(alone[0]).name}, so its documents cannot be found "
                f"({len(alone)} such in source={source}); copy the index, or move the file elsewhere"
            )
        if not prefixes:
            raise DataError(
                f"source={source} holds no .idx file, which format=megatron needs; name a folder of .bin/.idx pairs"
            )
    else:
        prefixes = [source.with_suffix("") if source.suffix in (".bin", ".idx") else source]
    splits: dict[str, list[ForeignShard]] = {"train": [], "validation": []}
    for prefix in prefixes:
        shard = Shard(prefix)
        split = "validation" if len(prefixes) > 1 and prefix.name.startswith("val") else "train"
        splits[split].append(ForeignShard(bin_path(prefix), shard.dtype, shard.document_lengths()))
    if not splits["train"]:
        raise DataError(f"source={source} holds only validation data (names that begin with val); rename some files")
    return {split: shards for split, shards in splits.items() if shards}


def require_foreign_folder(source: Path) -> None:
    if not source.is_dir():
        raise DataError(f"source={source} is no folder; name the one that holds the files")
    if (source / MANIFEST_NAME).exists():
        raise DataError(f"source={source} holds {MANIFEST_NAME}, so it is prepared data already; use it as data_dir")


def require_one_dtype(splits: dict[str, list[ForeignShard]]) -> np.dtype:
    first, *others = [shard for shards in splits.values() for shard in shards]
    for shard in others:
        if shard.dtype != first.dtype:
            raise DataError(
                f"{first.path} holds {first.dtype.name} tokens and {shard.path} {shard.dtype.name}; make a folder of "
                "each, and train on both with data_dir={FOLDER: WEIGHT, FOLDER: WEIGHT}"
            )
    return first.dtype


# ---------------------------------------------------------------------------------------------------------------
# Linking
# ---------------------------------------------------------------------------------------------------------------


def take(shard: ForeignShard, folder: Path, name: str, tokenizer: Tokenizer) -> ShardEntry:
    """Link the tokens and write their index. Raises DataError for a token that the tokenizer has not."""
    tokens: NDArray[Any] = np.memmap(shard.path, shard.dtype, mode="r")
    bin_sha256, ends = scan(tokens, shard.path, tokenizer, find_ends=shard.lengths is None)
    lengths = np.diff(ends, prepend=0) if shard.lengths is None else shard.lengths
    if shard.lengths is None and tokens[-1] != tokenizer.end_of_document:
        lengths = np.append(lengths, len(tokens) - lengths.sum())
        unfinished = "its last document is" if len(ends) else "there is no other, so all of it is one document"
        print(f"note: {shard.path} does not end with the token {tokenizer.end_of_document}; {unfinished} without")
    if lengths.max() > LONGEST_SEQUENCE:
        raise DataError(
            f"{shard.path} has a document of {lengths.max()} tokens, more than the format's {LONGEST_SEQUENCE}; name "
            f"the tokenizer whose end-of-document token it uses (that of {tokenizer.kind} is "
            f"{tokenizer.end_of_document})"
        )
    index = index_bytes(lengths, shard.dtype)
    idx_path(folder / name).write_bytes(index)
    way = link(shard.path.resolve(), bin_path(folder / name))
    print(f"{shard.path}: {len(lengths):,} documents, {len(tokens):,} tokens, {way} as {name}", flush=True)
    print(f"  begins: {tokenizer.decode(tokens[:SAMPLE_TOKENS].tolist())!r}")
    return ShardEntry(
        name=name,
        documents=len(lengths),
        tokens=len(tokens),
        bin_bytes=tokens.nbytes,
        bin_sha256=bin_sha256,
        idx_sha256=hashlib.sha256(index).hexdigest(),
        bin_probe_sha256=probe_sha256(bin_path(folder / name)),
    )


def scan(tokens: NDArray[Any], path: Path, tokenizer: Tokenizer, find_ends: bool) -> tuple[str, NDArray[np.int64]]:
    """SHA-256 of the tokens, and the positions after each end of a document. Raises DataError for a foreign token."""
    checksum = hashlib.sha256()
    ends = [np.empty(0, np.int64)]
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        block = np.asarray(tokens[start : start + TOKENS_AT_ONCE])
        checksum.update(block.data)
        for at in (int(block.argmin()), int(block.argmax())):
            if not 0 <= block[at] < tokenizer.vocab_size:
                raise DataError(
                    f"{path} holds the token {block[at]} at position {start + at}, but the {tokenizer.kind} tokenizer "
                    f"has only those from 0 to {tokenizer.vocab_size - 1}; name the tokenizer that made them"
                )
        if find_ends:
            ends.append(np.flatnonzero(block == tokenizer.end_of_document) + start + 1)
    return checksum.hexdigest(), np.concatenate(ends)


def link(source: Path, target: Path) -> str:
    """Make `target` the same file as `source`, in the cheapest way that the file systems allow; says which."""
    ways: tuple[tuple[str, Callable[[Path, Path], object]], ...] = (
        ("linked", os.link),
        (f"linked symbolically (keep {source})", os.symlink),
    )
    for way, make in ways:
        try:
            make(source, target)
            return way
        except OSError:
            target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    return "copied"


def main() -> None:
    run_entry(accept, ForeignConfig, "foreign")


if __name__ == "__main__":
    main()
