"""Read all of a prepared folder and compare it with its manifest: python -m data_prep.verify DATA

Training only probes the tokens when it starts. This command reads every byte, for example after a copy. The content of
a split that it prints depends only on the documents: it is equal for equal documents, however they are divided among
shards.

A sample of each shard's documents is decoded and encoded again, and the ids are compared. Not all tokenizers allow this
comparison (recovery.py); the number of documents that could not be compared is printed. Different ids are an error in
data that data_prep.prepare has encoded, and a note for data of another program, which may follow other rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import difference_of_ids
from data_prep.foreign import FORMATS as FOREIGN_FORMATS
from data_prep.indexed import Shard, bin_path
from data_prep.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    SplitEntry,
    require_same_content,
    verify_quick,
)
from data_prep.recovery import Recovery
from data_prep.tokenizers import Tokenizer, load_tokenizer
from kraken_train.common.cli import user_errors
from kraken_train.common.errors import DataError
from kraken_train.common.files import read_file
from kraken_train.common.help import make_parser
from kraken_train.common.parsing import parse_mapping

BLOCK_BYTES = 1 << 24  # read at once; a multiple of every token's size
SAMPLE_CHARACTERS = 200
COMPARED_DOCUMENTS = 100  # of each shard, about; their ids are compared
LONGEST_COMPARED = 1 << 20  # tokens
AGAIN = "prepare the data again"


def verify(data_dir: Path) -> Manifest:
    """Print a line per shard and per split, and how a few documents begin. Raises DataError for the first problem."""
    manifest = verify_quick(data_dir)  # sizes, indices and the tokenizer's files
    verify_totals(data_dir, manifest)
    tokenizer = load_tokenizer(data_dir / TOKENIZER_FOLDER)
    for name in ("vocab_size", "end_of_document"):
        listed, found = getattr(manifest.tokenizer, name), getattr(tokenizer, name)
        if listed != found:
            raise DataError(f"{data_dir}: the manifest has {name}={listed}, but the tokenizer {found}; {AGAIN}")
    for name, split in manifest.splits.items():
        content = Content(manifest.dtype)
        for entry in split.shards:
            verify_shard(data_dir, entry, manifest, content)
            print(f"{entry.name}: {entry.documents:,} documents, {entry.tokens:,} tokens, good", flush=True)
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, content {content.hexdigest()}")
    print(compare_ids(data_dir, manifest, tokenizer))
    for name, split in manifest.splits.items():
        for number, document in sample_documents(data_dir, split):
            print(f"{name} document {number:,} begins: {beginning(document, tokenizer)!r}")
    return manifest


def verify_totals(data_dir: Path, manifest: Manifest) -> None:
    """Raises DataError unless the totals that the manifest states are the sums of its shards."""
    path = data_dir / MANIFEST_NAME
    totals = parse_mapping(read_file(path)).get("totals", {})
    if not isinstance(totals, dict):
        raise DataError(f"{path} is damaged: its totals are none; copy it again or prepare the data again")
    for name, stated in totals.items():
        if stated != getattr(manifest, name, stated):
            raise DataError(
                f"{path} states {stated} {name} in total, but its splits have {getattr(manifest, name)}; "
                "copy it again or prepare the data again"
            )


class Content:
    """Digest of a stream of documents that does not depend on how it is divided among shards."""

    def __init__(self, dtype: str) -> None:
        self._tokens = hashlib.sha256(dtype.encode())
        self._lengths = hashlib.sha256()

    def add_tokens(self, raw: bytes) -> None:
        self._tokens.update(raw)

    def add_lengths(self, lengths: NDArray[Any]) -> None:
        self._lengths.update(lengths.astype("<i8").tobytes())

    def hexdigest(self) -> str:
        return hashlib.sha256(self._tokens.digest() + self._lengths.digest()).hexdigest()[:32]


def verify_shard(data_dir: Path, entry: ShardEntry, manifest: Manifest, content: Content) -> None:
    """Read all of a shard, and add it to `content`.

    Raises DataError unless its tokens are those that were written, ids of the vocabulary, and in documents that each
    end with the end-of-document token, if that was appended.
    """
    prefix = data_dir / entry.name
    path = bin_path(prefix)
    shard = Shard(prefix)  # checks the index: lengths, offsets and boundaries agree with each other and with the .bin
    found = (shard.num_documents, shard.num_tokens, shard.dtype.name)
    if found != (entry.documents, entry.tokens, manifest.dtype):
        raise DataError(
            f"{prefix} has {found[0]} documents and {found[1]} tokens of {found[2]}, but the manifest lists "
            f"{entry.documents} and {entry.tokens} of {manifest.dtype}; {AGAIN}"
        )
    checksum = hashlib.sha256()
    lowest = highest = 0
    with path.open("rb") as file:
        while raw := file.read(BLOCK_BYTES):
            checksum.update(raw)
            content.add_tokens(raw)
            tokens = np.frombuffer(raw, shard.dtype)
            lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
    require_same_content(path, checksum.hexdigest(), entry.bin_sha256)
    for token in (lowest, highest):
        if not 0 <= token < manifest.vocab_size:
            raise DataError(
                f"{path} holds the token {token}, but the tokenizer has only those from 0 to "
                f"{manifest.vocab_size - 1}; {AGAIN}"
            )
    lengths = shard.document_lengths()
    content.add_lengths(lengths)
    if manifest.request.get("append_end_of_document", True):
        verify_ends(path, shard, lengths, manifest.tokenizer.end_of_document)


def verify_ends(path: Path, shard: Shard, lengths: NDArray[Any], end_of_document: int) -> None:
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(f"{path}: document {empty[0]} is empty, without the token that ends it; {AGAIN}")
    unfinished = np.flatnonzero(shard.tokens[np.cumsum(lengths) - 1] != end_of_document)
    if len(unfinished):
        document = int(unfinished[0])
        raise DataError(
            f"{path}: document {document} ends with the token {shard.document(document)[-1]} and not with "
            f"{end_of_document}, which ends documents; its index belongs to other data; {AGAIN}"
        )


def compare_ids(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> str:
    """Encode a sample of all shards' documents again; returns what came of it.

    Raises DataError for the first document with other ids than the tokenizer gives, if it was prepared here.
    """
    recovery = Recovery(tokenizer)
    compared = unknown = differing = 0
    example = ""
    for entry in (entry for split in manifest.splits.values() for entry in split.shards):
        shard = Shard(data_dir / entry.name)
        for number in range(0, entry.documents, max(1, entry.documents // COMPARED_DOCUMENTS)):
            ids = shard.document(number)[: LONGEST_COMPARED + 2].tolist()
            ids = ids[:-1] if ids and ids[-1] == tokenizer.end_of_document else ids
            text = recovery.text_of(ids) if len(ids) <= LONGEST_COMPARED else None
            if text is None:
                unknown += 1
                continue
            compared += 1
            again = [int(token) for token in tokenizer.encode_batch([text])[0]]
            if again == ids:
                continue
            differing += 1
            example = example or f"{entry.name}: document {number}: {difference_of_ids(ids, again, tokenizer)}"
            if manifest.source.get("kind") not in FOREIGN_FORMATS:
                raise DataError(f"{data_dir / example}; {AGAIN}")
    result = (
        f"{differing:,} have other ids than the tokenizer gives: {example}" if differing else "all have the same ids"
    )
    rest = f"; {unknown:,} more were too long or do not say what text they were" if unknown else ""
    return f"of {compared:,} documents encoded again, {result}{rest}"


def sample_documents(data_dir: Path, split: SplitEntry) -> Iterator[tuple[int, NDArray[Any]]]:
    """(number, tokens) of the split's first document, the one in the middle and the last."""
    for number in sorted({0, split.documents // 2, split.documents - 1}):
        first = 0
        for entry in split.shards:
            if number < first + entry.documents:
                yield number, Shard(data_dir / entry.name).document(number - first)
                break
            first += entry.documents


def beginning(document: NDArray[Any], tokenizer: Tokenizer) -> str:
    ids = [int(i) for i in document[: 4 * SAMPLE_CHARACTERS]]
    return tokenizer.decode([i for i in ids if i != tokenizer.end_of_document])[:SAMPLE_CHARACTERS]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    data_dir = parser.parse_args(arguments).data_dir
    with user_errors(data_dir):
        manifest = verify(data_dir)
        print(f"{data_dir}: all {manifest.tokens:,} tokens are good, fingerprint {manifest.fingerprint}")


if __name__ == "__main__":
    main()
