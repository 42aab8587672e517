"""From shards to batches, in an order that depends on nothing but the data, the context length and the seed.

A split is one long stream of tokens. A sample is `context_length + 1` consecutive tokens (the last one is only
predicted), and samples start every `context_length` tokens. The position of a run is one number: the count of
consumed samples. Ranks, micro-batches and accumulation only decide who reads which of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import Shard
from data_prep.manifest import Manifest, verify_quick
from kraken_train.errors import ConfigError, DataError


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
    return TokenStream([Shard(Path(data_dir) / entry.name).tokens for entry in manifest.splits[split].shards])


class TokenStream:
    """The tokens of several shards as one sequence; only what is asked for is read."""

    def __init__(self, shards: Sequence[NDArray]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])  # position of each shard, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) tokens from position `start` on, across shard borders."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, np.int64)
        filled = 0
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while filled < len(tokens):
            offset = start + filled - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return tokens


class SampleOrder:
    """Which sample of the data is the k-th of the run: one permutation of all samples per epoch.

    The permutation comes from NumPy's legacy generator, whose stream is frozen for good (NEP 19), so a run resumes
    in the same order under any later NumPy.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} must be from 0 to {2**32 - 1}")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __getitem__(self, k: int) -> int:
        """Index into the data of sample `k` of the run; k >= 0 may exceed one epoch."""
        epoch, position = divmod(k, self.num_samples)
        return int(self._of_epoch(epoch)[position])

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            permutation = np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, permutation
        return self._permutation


class Samples:
    """The samples of a split in the order of a run. Raises DataError if the split is shorter than one sample."""

    def __init__(self, stream: TokenStream, context_length: int, seed: int) -> None:
        if len(stream) < context_length + 1:
            raise DataError(
                f"the data have {len(stream)} tokens, but one sample takes {context_length + 1} "
                f"(context_length={context_length} and one to predict); use more data or a context_length below "
                f"{len(stream)}"
            )
        self.stream = stream
        self.context_length = context_length
        self.order = SampleOrder((len(stream) - 1) // context_length, seed)

    def __len__(self) -> int:
        """Samples per epoch."""
        return self.order.num_samples

    def batch(self, indices_of_run: Sequence[int] | range) -> NDArray[np.int64]:
        """(len(indices_of_run), context_length + 1) tokens: samples of the run by number, across epochs too."""
        batch = np.empty((len(indices_of_run), self.context_length + 1), np.int64)
        for row, k in enumerate(indices_of_run):
            start = self.order[k] * self.context_length
            batch[row] = self.stream.read(start, start + self.context_length + 1)
        return batch


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
        yield np.stack([stream.read(start, start + context_length + 1) for start in starts])
    if targets % context_length:
        yield stream.read(whole * context_length, len(stream))[None]
