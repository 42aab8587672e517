"""From shards to batches, in an order that depends only on the data, the context length and the seed.

A split is one long stream of tokens. A sample is `context_length + 1` consecutive tokens (the last one is only
predicted), and samples start every `context_length` tokens. The position of a run is one number: the count of
consumed samples. Ranks, micro-batches and accumulation only decide which rank reads which samples.

A run may read several prepared folders, whose shares of the samples are then exact (`kraken_train.data.blend`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import Shard, bin_path
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, TokenizerEntry, verify_quick
from kraken_train.common.errors import DataError
from kraken_train.data.blend import Blend
from kraken_train.data.open_files import allow_open_files
from kraken_train.data.shuffle import ShuffledOrder

LOOKED_AT = 1000  # documents, to see whether they end with the end-of-document token
BLOCK = 4096  # samples whose places are computed together, which costs hardly more than one alone


class TrainingData:
    """The prepared folders of a run, opened and checked, with the share of the samples that each gives.

    `opened` are the manifests of folders that were checked before. Raises DataError if a folder is damaged, or if the
    tokens of two do not mean the same.
    """

    def __init__(self, shares: Mapping[Path, int], opened: Mapping[Path, Manifest] = MappingProxyType({})) -> None:
        self.manifests = {folder: opened.get(folder) or verify_quick(folder) for folder in shares}
        self.shares = dict(shares)
        self.folder = next(iter(shares))  # the first one: the tokenizer is that of all
        for folder, manifest in self.manifests.items():
            self.require_same_tokenizer("data_dir", folder, manifest)

    def _tokenizer(self, folder: Path) -> TokenizerEntry:
        return self.manifests[folder].tokenizer

    @property
    def vocab_size(self) -> int:
        return self.manifests[self.folder].vocab_size

    @property
    def end_of_document(self) -> int:
        return self._tokenizer(self.folder).end_of_document

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / TOKENIZER_FOLDER

    @property
    def tokenizer_files(self) -> dict[str, str]:
        """Name in `tokenizer_dir` -> SHA-256."""
        return self._tokenizer(self.folder).files

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the run reads: content and shares, but no paths. One folder has its own."""
        content = [(self.manifests[folder].fingerprint, share) for folder, share in self.shares.items()]
        if len(content) == 1:
            return content[0][0]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def require_same_tokenizer(self, setting: str, folder: Path, manifest: Manifest) -> None:
        """Raises DataError unless a token id means the same in this folder, which `setting` names."""
        require_same_tokenizer(self.folder, self._tokenizer(self.folder), setting, folder, manifest.tokenizer)

    def samples(self, context_length: int, seed: int) -> Samples:
        """Those of the training splits, in the order of the run. Raises DataError if one is too short."""
        streams = [open_split(folder, "train", manifest) for folder, manifest in self.manifests.items()]
        return Samples(streams, context_length, seed, list(self.shares.values()))

    def require_ends_of_documents(self) -> None:
        """Raises DataError if documents of one folder do not end with the end-of-document token, by the first ones."""
        for folder, manifest in self.manifests.items():
            shard = Shard(folder / manifest.splits["train"].shards[0].name)
            ends = np.cumsum(shard.document_lengths()[:LOOKED_AT])
            if not (shard.tokens[ends[ends > 0] - 1] == self.end_of_document).any():
                raise DataError(
                    f"data_dir={folder} has no end-of-document token ({self.end_of_document}) at the end of its "
                    "documents, by which attention_within_documents=true tells them apart; prepare the data with "
                    "append_end_of_document=true, or use attention_within_documents=false"
                )

    def repetitions(self) -> list[str]:
        """A note for each folder whose training split is that of an earlier one, as a link or a copy is."""
        first: dict[tuple[str, ...], Path] = {}
        notes = []
        for folder, manifest in self.manifests.items():
            content = tuple(shard.bin_sha256 for shard in manifest.splits["train"].shards)
            if (other := first.setdefault(content, folder)) is not folder:
                notes.append(
                    f"data_dir: {folder} holds the same training tokens as {other}, so the run reads them with the "
                    "weights of both, in an order for each; name the data once if that is not meant"
                )
        return notes

    def describe(self) -> str:
        tokens = sum(manifest.splits["train"].tokens for manifest in self.manifests.values())
        if len(self.shares) == 1:
            return f"{tokens:,} training tokens"
        whole = sum(self.shares.values())
        parts = [f"{share / whole:.4g} from {folder}" for folder, share in self.shares.items()]
        return f"{tokens:,} training tokens ({', '.join(parts)})"


def require_same_tokenizer(
    first: Path, expected: TokenizerEntry, setting: str, folder: Path, found: TokenizerEntry
) -> None:
    """Raises DataError unless a token id means the same in both folders.

    A tokenizer that one folder has trained and the other was given by file differs only in the file that says so.
    """
    description = "kraken_tokenizer.json"
    files = {name for name in {*expected.files, *found.files} if expected.files.get(name) != found.files.get(name)}
    differing = [
        f"{name} {getattr(expected, name)} and {getattr(found, name)}"
        for name in ("vocab_size", "end_of_document")
        if getattr(expected, name) != getattr(found, name)
    ] + [f"file {name}" for name in sorted(files - {description})]
    if differing:
        other = folder if setting == "data_dir" else f"{setting}={folder}"
        raise DataError(
            f"data_dir={first} and {other} were prepared with different tokenizers ({differing[0]}); prepare both "
            f"with one, such as that in {first / TOKENIZER_FOLDER}"
        )


def open_split(data_dir: Path, split: str, manifest: Manifest | None = None) -> TokenStream:
    """The tokens of `split` ("train" or "validation") of a prepared folder.

    Verifies the folder first; pass the manifest that `verify_quick` returned to open a second split without doing
    so again. Raises DataError if the folder is damaged or has no such split.
    """
    manifest = manifest or verify_quick(data_dir)
    if split not in manifest.splits:
        raise DataError(
            f"{data_dir} has no split {split}, only {', '.join(manifest.splits)}; "
            "prepare the data with validation_fraction above 0"
        )
    # The indices are known by their checksums to be those that the manifest describes, so they need no second look.
    paths = [bin_path(Path(data_dir) / shard.name) for shard in manifest.splits[split].shards]
    allow_open_files(len(paths), f"the {split} shards of {data_dir}")
    return TokenStream([np.memmap(path, manifest.dtype, mode="r") for path in paths], f"the data in {data_dir}")


class TokenStream:
    """The tokens of several shards as one sequence; only what is asked for is read. `name` is for errors."""

    def __init__(self, shards: Sequence[NDArray[Any]], name: str = "the data") -> None:
        self.shards = [np.asarray(shard) for shard in shards]  # a memmap, but as an array, which is cut faster
        self.name = name
        self.starts = [0]  # position of each shard, and the end
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) tokens from position `start` on, across shard borders."""
        (row,) = self.read_rows([start], stop - start)
        tokens: NDArray[np.int64] = row
        return tokens

    def read_rows(self, starts: Sequence[int], length: int) -> NDArray[np.int64]:
        """(len(starts), length) tokens: row i from position `starts[i]` on, across shard borders."""
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts, strict=True):
            if not 0 <= start <= start + length <= len(self):
                raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
            shard = bisect_right(self.starts, start) - 1
            offset = start - self.starts[shard]
            filled = 0
            while filled < length:
                piece = self.shards[shard][offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                offset = 0
                shard += 1
        return rows


class Samples:
    """The samples of one or several streams in the order of a run, or of a phase of it.

    `shares` are whole numbers, see `Blend`. Of each stream, `numbers` tells its order from those of the run's other
    streams (None: 0, 1, ...), and `read` is how many samples of it the run has read before (None: none). Raises
    DataError if a stream is shorter than one sample.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        context_length: int,
        seed: int,
        shares: Sequence[int] = (1,),
        numbers: Sequence[int] | None = None,
        read: Sequence[int] | None = None,
    ) -> None:
        for stream in streams:
            require_one_sample(stream, context_length)
        self.context_length = context_length
        self.stream = TokenStream([shard for stream in streams for shard in stream.shards])
        self.begins = np.cumsum([0, *(len(stream) for stream in streams[:-1])])  # of each in the joint stream
        self.orders = [
            ShuffledOrder((len(stream) - 1) // context_length, seed, number)
            for stream, number in zip(streams, numbers or range(len(streams)), strict=True)
        ]
        self.read = np.array(read or [0] * len(streams), np.int64)
        self.blend = Blend(shares)
        self._block, self._block_starts = -1, [0]

    def batch(self, numbers: Sequence[int] | range) -> NDArray[np.int64]:
        """(len(numbers), context_length + 1) tokens: samples by their numbers in this order, across epochs too."""
        return self.stream.read_rows([self._start(k) for k in numbers], self.context_length + 1)

    def _start(self, k: int) -> int:
        """Position of sample `k` in the joint stream."""
        block, index = divmod(k, BLOCK)
        if block != self._block:
            starts = self.starts(np.arange(block * BLOCK, (block + 1) * BLOCK)).tolist()
            self._block, self._block_starts = block, starts
        return self._block_starts[index]

    def starts(self, k: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) samples by number -> (n,) their positions in the joint stream."""
        sets, reads = self.blend.locate(k)
        reads += self.read[sets]
        starts = self.begins[sets]
        for number, order in enumerate(self.orders):
            of_set = sets == number
            starts[of_set] += order.indices(reads[of_set]) * self.context_length
        return starts


def require_one_sample(stream: TokenStream, context_length: int) -> None:
    if len(stream) < context_length + 1:
        raise DataError(
            f"{stream.name} have {len(stream)} tokens, but one sample takes {context_length + 1} "
            f"(context_length={context_length} and one to predict); use more data or a context_length below "
            f"{len(stream)}"
        )


def sequential(stream: TokenStream, context_length: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Windows (b, context_length + 1) in the data's order, b <= batch_size; each token but the first is predicted once.

    What remains after the last whole window comes at the end as one shorter window (1, remainder + 1).
    Raises DataError if there are fewer than two tokens.
    """
    targets = len(stream) - 1
    if targets < 1:
        raise DataError(f"the data have {len(stream)} tokens, but evaluation needs at least 2; use more data")
    whole = targets // context_length
    for first in range(0, whole, batch_size):
        starts = range(first * context_length, min(first + batch_size, whole) * context_length, context_length)
        yield stream.read_rows(starts, context_length + 1)
    if targets % context_length:
        yield stream.read(whole * context_length, len(stream))[None]
