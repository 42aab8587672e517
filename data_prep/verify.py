"""Read all of a prepared folder and compare it with its manifest: python -m data_prep.verify DATA

Training only probes the tokens when it starts. This reads every byte, for example after copying a data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.indexed import Shard, bin_path
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, ShardEntry, require_same_content, verify_quick
from data_prep.tokenizers import Tokenizer, load_tokenizer
from kraken_train.cli import exit_with_message
from kraken_train.errors import DataError, KrakenError
from kraken_train.files import file_sha256

TOKENS_AT_ONCE = 1 << 24
SAMPLE_CHARACTERS = 200


def verify(data_dir: Path) -> Manifest:
    """Print a line per shard and the start of one document. Raises DataError for the first problem."""
    manifest = verify_quick(data_dir)  # sizes, indices and the tokenizer's files
    tokenizer = load_tokenizer(data_dir / TOKENIZER_FOLDER)
    for name in ("vocab_size", "end_of_document"):
        listed, found = getattr(manifest.tokenizer, name), getattr(tokenizer, name)
        if listed != found:
            raise DataError(f"{data_dir}: the manifest has {name}={listed}, but the tokenizer {found}; prepare again")
    for split in manifest.splits.values():
        for entry in split.shards:
            verify_shard(data_dir, entry, manifest)
            print(f"{entry.name}: {entry.documents:,} documents, {entry.tokens:,} tokens, good", flush=True)
    first = manifest.splits["train"].shards[0]
    print(f"{first.name} begins: {sample_text(Shard(data_dir / first.name), tokenizer)!r}")
    return manifest


def verify_shard(data_dir: Path, entry: ShardEntry, manifest: Manifest) -> None:
    """Raises DataError unless the shard's tokens are those that were written, and ids of the vocabulary."""
    prefix = data_dir / entry.name
    require_same_content(bin_path(prefix), file_sha256(bin_path(prefix)), entry.bin_sha256)
    shard = Shard(prefix)
    found = (shard.num_documents, shard.num_tokens, shard.dtype.name)
    if found != (entry.documents, entry.tokens, manifest.dtype):
        raise DataError(
            f"{prefix} has {found[0]} documents and {found[1]} tokens of {found[2]}, but the manifest lists "
            f"{entry.documents} and {entry.tokens} of {manifest.dtype}; prepare the data again"
        )
    for start in range(0, shard.num_tokens, TOKENS_AT_ONCE):
        tokens = shard.tokens[start : start + TOKENS_AT_ONCE]
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < manifest.vocab_size:
                raise DataError(
                    f"{bin_path(prefix)} holds the token {token}, but the tokenizer has only those from 0 to "
                    f"{manifest.vocab_size - 1}; prepare the data again"
                )


def sample_text(shard: Shard, tokenizer: Tokenizer) -> str:
    ids = [int(i) for i in shard.document(0)[: 4 * SAMPLE_CHARACTERS]]
    return tokenizer.decode([i for i in ids if i != tokenizer.end_of_document])[:SAMPLE_CHARACTERS]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check every byte of a data set.")
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    data_dir = parser.parse_args(arguments).data_dir
    try:
        manifest = verify(data_dir)
    except KrakenError as error:
        exit_with_message(str(error))
    except OSError as error:
        exit_with_message(f"{error.filename or data_dir} cannot be read: {error.strerror}")
    else:
        print(f"{data_dir}: all {manifest.tokens:,} tokens are good, fingerprint {manifest.fingerprint}")


if __name__ == "__main__":
    main()
