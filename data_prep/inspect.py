"""What a prepared folder holds, and how long its documents are: python -m data_prep.inspect DATA [--output PNG]

Reads the manifest, the indices and a probe of each shard; `python -m data_prep.verify DATA` reads every byte. Memory
grows by about 30 bytes per document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_prep.indexed import Shard
from data_prep.manifest import Manifest, SplitEntry, verify_quick
from kraken_train.common.cli import user_errors
from kraken_train.common.errors import DataError
from kraken_train.common.help import make_parser
from kraken_train.common.ticks import label_log_axis

PICTURE = "document_lengths.png"
LABEL_WIDTH = 11
BAR_WIDTH = 40
BINS_PER_DOUBLING = 4

Lengths = dict[str, NDArray[np.int64]]  # split -> (documents,) tokens of each


def inspect(data_dir: Path, output: Path) -> None:
    """Print what is in `data_dir` and draw its documents' lengths to `output`. Raises DataError if it is damaged."""
    manifest = verify_quick(data_dir)
    print_lines([("data", str(data_dir)), *describe(manifest)])
    lengths = {name: document_lengths(data_dir, split) for name, split in manifest.splits.items()}
    for name, split in manifest.splits.items():
        print()
        print_lines(describe_split(name, split, lengths[name]))
    print("\ndocuments by length in tokens")
    print("\n".join(text_histogram(np.concatenate(list(lengths.values())))))
    draw_histogram(lengths, output)
    print(f"\nwrote {output}")
    print("checked: sizes, indices, tokenizer and a probe of the tokens; data_prep.verify checks every byte")


def document_lengths(data_dir: Path, split: SplitEntry) -> NDArray[np.int64]:
    """(documents,) tokens of each document, with the token that ends it."""
    return np.concatenate([Shard(data_dir / entry.name).document_lengths() for entry in split.shards])


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """What the manifest records, as (label, text)."""
    tokenizer, source = manifest.tokenizer, dict(manifest.source)
    request = {key: value for key, value in manifest.request.items() if key not in ("source", "tokenizer")}
    return [
        ("fingerprint", manifest.fingerprint),
        ("source", f"{source.pop('kind', '?')}, {source.pop('location', '?')}"),
        ("", settings(source)),
        ("tokenizer", f"{tokenizer.kind}, {manifest.vocab_size:,} tokens, {tokenizer.end_of_document} ends a document"),
        ("", settings(manifest.request.get("tokenizer", {}))),
        ("settings", settings(request)),
        ("tokens are", manifest.dtype),
        ("left out", ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()) or "nothing"),
        ("round trips", describe_round_trips(manifest.round_trips)),
        ("in all", amounts(manifest)),
    ]


def describe_round_trips(record: Mapping[str, Any]) -> str:
    """Of documents that were decoded again when they were prepared; empty if none was."""
    if not record.get("checked"):
        return ""
    text = f"{record['checked']:,} documents decoded again, {record['failed']:,} came back changed"
    return text + (f": {record['example']}" if record.get("example") else "")


def settings(values: Mapping[str, Any], prefix: str = "") -> str:
    """{"a": 1, "b": {"c": 2}, "d": [{"e": 3}]} -> "a=1, b.c=2, d.1.e=3"."""
    words = []
    for name, value in values.items():
        inner = value
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            inner = {str(number): item for number, item in enumerate(value, start=1)}
        nested = isinstance(inner, Mapping) and inner
        words.append(settings(inner, f"{prefix}{name}.") if nested else f"{prefix}{name}={value}")
    return ", ".join(words)


def amounts(part: Manifest | SplitEntry) -> str:
    """Data that were not made from text here have no known number of bytes."""
    text = f"{part.documents:,} documents, {part.tokens:,} tokens"
    return text + (f", {part.text_bytes / part.tokens:.3f} bytes per token" if part.text_bytes else "")


def describe_split(name: str, split: SplitEntry, lengths: NDArray[np.int64]) -> list[tuple[str, str]]:
    return [
        (name, amounts(split)),
        (
            "lengths",
            f"shortest {lengths.min():,}, median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, "
            f"longest {lengths.max():,} tokens",
        ),
        *((shard.name, f"{shard.documents:,} documents, {shard.tokens:,} tokens") for shard in split.shards),
    ]


def print_lines(lines: Sequence[tuple[str, str]]) -> None:
    width = max(LABEL_WIDTH, *(len(label) for label, _ in lines))
    for label, text in lines:
        if text:
            print(f"{label:{width}}  {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def text_histogram(lengths: NDArray[np.int64]) -> list[str]:
    """A line per doubling of the length: from 2^k to 2^(k + 1) - 1 tokens. A document without tokens counts as 1."""
    doublings = np.frexp(np.maximum(lengths, 1))[1] - 1  # floor(log2), exactly
    counts = np.bincount(doublings)
    first, width = int(doublings.min()), len(f"{2 ** len(counts):,}")
    return [
        f"{2**k:>{width},} to {2 ** (k + 1) - 1:<{width},}  {count:>{len(f'{counts.max():,}')},}  "
        f"{'#' * math.ceil(BAR_WIDTH * int(count) / int(counts.max()))}".rstrip()
        for k, count in enumerate(counts)
        if k >= first
    ]


def draw_histogram(lengths: Lengths, output: Path) -> None:
    """Shares of each split's documents, and of its tokens, by the length of their document on a logarithmic scale.

    Raises DataError if the picture cannot be written.
    """
    edges = bin_edges(max(1, min(v.min() for v in lengths.values())), max(v.max() for v in lengths.values()))
    figure = Figure(figsize=(9, 6.5), layout="constrained")  # not of pyplot, so no display is looked for
    documents, tokens = figure.subplots(2, 1, sharex=True)
    for index, (name, values) in enumerate(lengths.items()):
        color = f"C{index}"
        draw_shares(documents, values, np.ones(len(values)), edges, color, f"{name}, {len(values):,} documents")
        draw_shares(tokens, values, values, edges, color, f"{name}, {values.sum():,} tokens")
        documents.axvline(float(np.median(values)), color=color, linestyle=":", linewidth=1)
    for axes, title in ((documents, "% of the documents (dotted: median)"), (tokens, "% of the tokens")):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    tokens.set_xscale("log", base=2)
    label_log_axis(tokens.xaxis, base=2, text="{:,.0f}".format)
    tokens.set_xlabel("tokens of the document")
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{output} cannot be written: {error}; name a .png with --output") from error


def bin_edges(shortest: int, longest: int) -> NDArray[np.float64]:
    """Edges of bins that are equally wide on a logarithmic scale, each halfway between two integers."""
    first, last = int(shortest).bit_length() - 1, int(longest).bit_length()
    powers = np.linspace(first, last, 1 + BINS_PER_DOUBLING * (last - first))
    return np.unique(np.floor(2**powers)) - 0.5  # short lengths have bins of one integer each


def draw_shares(
    axes: Axes, lengths: NDArray[np.int64], weights: NDArray[Any], edges: NDArray[Any], color: str, label: str
) -> None:
    counts, _ = np.histogram(np.maximum(lengths, 1), edges, weights=weights)
    axes.stairs(100 * counts / counts.sum(), edges, color=color, fill=False, label=label)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="folder that data_prep.prepare has written")
    parser.add_argument("--output", type=Path, help=f"PNG to write; by default DATA/{PICTURE}")
    options = parser.parse_args(arguments)
    with user_errors(options.data_dir):
        inspect(options.data_dir, options.output or options.data_dir / PICTURE)


if __name__ == "__main__":
    main()
