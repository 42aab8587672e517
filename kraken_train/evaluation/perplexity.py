"""Loss and perplexity over windows of tokens, independent of the batch size and the number of ranks.

There are two modes of reading a split of prepared data:

    stream      one long sequence, cut as in training; a document has the documents before it in its context
    documents   each document on its own, without other documents in its context

A sequence longer than the context is read in windows that start every `stride` tokens. Each token is predicted once, in
the first window that reaches it; from the second window on it has at least `context_length - stride` tokens before it.
The last window of a document starts earlier, so that it is full. With a stride of `context_length`, documents are read
as lm-evaluation-harness reads them (`loglikelihood_rolling`).

Batch size and number of ranks change a token's loss only by the rounding of the model's float32 or float64; sums are
exact (`math.fsum`), so they add no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.indexed import Shard
from data_prep.manifest import Manifest
from kraken_train.common.errors import DataError
from kraken_train.data.dataset import TokenStream, open_split
from kraken_train.model.cross_entropy import IGNORED
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.ranks import Runtime

MODES = ("stream", "documents")


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token
    perplexity: float
    tokens: int  # number of predicted tokens
    bits_per_byte: float | None = None  # of the documents' UTF-8 text; None if its size is unknown


class Sequences(NamedTuple):
    """The sequences to evaluate; in each, every token except the first is predicted."""

    stream: TokenStream
    spans: Sequence[tuple[int, int]]  # [first, last) of each sequence in the stream
    reach_back: bool = False  # the last window of a long sequence starts earlier, so that it is full


class Window(NamedTuple):
    """Tokens [start, stop) of a stream, of which the last `scored` are predicted in this window."""

    start: int
    stop: int
    scored: int


# ---------------------------------------------------------------------------------------------------------------
# Sequences and windows
# ---------------------------------------------------------------------------------------------------------------


def read_sequences(data_dir: Path, split: str, manifest: Manifest, mode: str) -> Sequences:
    """The sequences of a split in `mode`. Raises DataError if there is nothing to predict."""
    stream = open_split(data_dir, split, manifest)
    if mode == "stream":
        spans = [(0, len(stream))]
    else:
        lengths = [Shard(data_dir / shard.name).document_lengths() for shard in manifest.splits[split].shards]
        stream, spans = document_sequences(stream, np.concatenate(lengths), manifest.tokenizer.end_of_document)
    if not any(last - first > 1 for first, last in spans):
        raise DataError(f"{stream.name} have {len(stream)} tokens in {split}, none of them to predict; use more data")
    return Sequences(stream, spans, reach_back=mode == "documents")


def document_sequences(
    stream: TokenStream, lengths: NDArray[np.int64], end_of_document: int
) -> tuple[TokenStream, list[tuple[int, int]]]:
    """(stream, spans) of the documents in `stream`, which have these lengths.

    If all of them end with `end_of_document`, as in training, each span begins with that token of the document before,
    so that all text is predicted, and ends before its own one, which is not text. If some do not, the spans are the
    documents, and the first token of each is not predicted.
    """
    ends = np.cumsum(lengths)
    full = lengths > 0
    last_tokens = stream.read_rows((ends[full] - 1).tolist(), 1)
    if (last_tokens != end_of_document).any():
        return stream, list(zip((ends - lengths)[full].tolist(), ends[full].tolist(), strict=True))
    # The first document needs one such token before the stream; each other one follows that of the document before.
    prefix = np.array([end_of_document], np.int64)
    spans = list(zip((ends - lengths)[full].tolist(), ends[full].tolist(), strict=True))
    return TokenStream([prefix, *stream.shards], stream.name), spans


def strided(first: int, last: int, context_length: int, stride: int, reach_back: bool = False) -> Iterator[Window]:
    """The windows of the sequence [first, last), each of at most `context_length + 1` tokens."""
    start, scored_until = first, first + 1
    while scored_until < last:
        stop = min(start + context_length + 1, last)
        earliest = max(first, stop - context_length - 1)
        yield Window(earliest if reach_back else start, stop, stop - scored_until)
        start, scored_until = start + stride, stop


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------


def evaluate(
    model: LanguageModel,
    sequences: Sequences,
    stride: int,
    batch_size: int,
    text_bytes: int | None = None,
    runtime: Runtime | None = None,
) -> Evaluation:
    """The mean over all predicted tokens; `text_bytes` is the size of the text that they encode.

    A collective: the ranks of `runtime`, each with the whole model, share the batches and get the same result.
    """
    runtime = runtime or Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)
    windows = [
        w for span in sequences.spans for w in strided(*span, model.context_length, stride, sequences.reach_back)
    ]
    tokens = sum(window.scored for window in windows)
    # Longest first: less padding, and an out-of-memory error comes early.
    windows.sort(key=lambda window: window.start - window.stop)
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    own = [window_losses(model, sequences.stream, batch) for batch in batches[runtime.rank :: runtime.world_size]]
    total = math.fsum(loss for batches in runtime.gather(own) for losses in batches for loss in losses)
    loss = total / tokens
    bits_per_byte = total / math.log(2) / text_bytes if text_bytes else None
    return Evaluation(loss, perplexity(loss), tokens, bits_per_byte)


@torch.no_grad()
def window_losses(model: LanguageModel, stream: TokenStream, windows: Sequence[Window]) -> list[float]:
    """For each window the sum of the cross-entropies of its predicted tokens, in nats, correctly rounded."""
    length = max(window.stop - window.start for window in windows)
    ids = np.zeros((len(windows), length), np.int64)
    targets = np.full((len(windows), length - 1), IGNORED)
    for row, row_targets, window in zip(ids, targets, windows, strict=True):
        tokens = stream.read(window.start, window.stop)
        row[: len(tokens)] = tokens  # the padding after them does not matter, because attention is causal
        row_targets[len(tokens) - 1 - window.scored : len(tokens) - 1] = tokens[-window.scored :]
    device = model.token_embedding.weight.device
    losses = model.token_losses(torch.from_numpy(ids[:, :-1]).to(device), torch.from_numpy(targets).to(device))
    return [math.fsum(row) for row in losses.double().tolist()]


@torch.no_grad()
def token_losses(model: LanguageModel, windows: NDArray[np.int64]) -> tuple[float, int]:
    """(sum of cross-entropies in nats, number of targets) of windows (B, T + 1), summed in float64."""
    ids = torch.from_numpy(windows).to(model.token_embedding.weight.device)
    losses = model.token_losses(ids[:, :-1], ids[:, 1:])
    return float(losses.double().sum()), losses.numel()


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that is too large for a float."""
    return math.inf if loss > 700 else math.exp(loss)
