"""Seconds of a forward pass in serving, from the figures that the roofline of training uses.

A pass computes `new_tokens` of each sequence, with `cached` ones before them: a prompt, or one further token. As in
`kraken_train.planning.roofline`, a part takes as long as its arithmetic or its bytes, whichever is longer. Not counted
are the launches of kernels, which CUDA graphs hide. The next token is the most likely one.

Shapes: B sequences, T new tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kraken_train.model.architecture import ATTENTION, Matrix, ModelConfig
from kraken_train.model.head_dims import attention_work
from kraken_train.planning.cluster import Cluster, known
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import FP32
from kraken_train.planning.roofline import Product, widths


@dataclass(frozen=True)
class Load:
    """What a pass computes."""

    sequences: int
    new_tokens: int  # of each sequence
    cached: int = 0  # tokens of each sequence before these


@dataclass(frozen=True)
class PassTime:
    """Seconds on each device."""

    computed: float
    exposed: float  # communication for which the devices wait
    hidden: float  # communication during computation, not part of the total

    @property
    def total(self) -> float:
        return self.computed + self.exposed


def predict_pass(config: ModelConfig, ranks: int, load: Load, cluster: Cluster, precision: str) -> PassTime:
    """Of a model that `ranks` devices share, its heads, FFNs and vocabulary evenly."""
    layout = serving_layout(ranks, load, precision)
    tokens = load.sequences * load.new_tokens
    parts = serving_part_seconds(config, ranks, load, cluster, precision)
    # The head is computed for the last token of each sequence.
    head = Matrix(config.embedding_width, layout.vocabulary_rows(config.vocab_size))
    computed = config.num_layers * sum(parts.values())
    computed += seconds_of((*config.first_matrices(ranks), *config.last_matrices(ranks)), tokens, cluster, layout)
    computed += seconds_of([head], load.sequences, cluster, layout)
    if ranks == 1:
        return PassTime(computed, 0.0, 0.0)
    link = cluster.interconnect(ranks, 1)
    exposed, hidden = link.all_gather_seconds(winner_bytes(load, ranks), ranks), 0.0
    for reduced in config.all_reduces:
        one = link.all_reduce_seconds(tokens * reduced.width * layout.width, ranks)
        behind = 0.0 if reduced.behind is None else min(one, parts[reduced.behind])
        exposed += reduced.count / 2 * (one - behind)  # the other half belongs to the backward pass
        hidden += reduced.count / 2 * behind
    return PassTime(computed, exposed, hidden)


def winner_bytes(load: Load, ranks: int) -> int:
    """What is gathered of the logits: of each sequence the largest on each device, and its id, as 4 bytes each."""
    return load.sequences * ranks * 2 * FP32


def serving_part_seconds(
    config: ModelConfig, ranks: int, load: Load, cluster: Cluster, precision: str
) -> dict[str, float]:
    """Each part of a layer on one device."""
    layout, tokens = serving_layout(ranks, load, precision), load.sequences * load.new_tokens
    parts = {}
    for name, part in config.layer_parts(ranks).items():
        element_wise = widths(config, layout)[name][0] * layout.width * tokens / cluster.bandwidth
        parts[name] = seconds_of(part.matrices, tokens, cluster, layout) + element_wise
    parts[ATTENTION] += score_seconds(config, layout, load, cluster)
    return parts


def serving_layout(ranks: int, load: Load, precision: str) -> TrainingLayout:
    return TrainingLayout(ranks, 1, load.sequences, 1, vocab_parallel=True, precision=precision)


def seconds_of(matrices: Sequence[Matrix], rows: int, cluster: Cluster, layout: TrainingLayout) -> float:
    """Of `rows` tokens times each matrix."""
    return sum(
        Product(rows, matrix.in_features, matrix.out_features, matrix.count).seconds(cluster, layout)
        for matrix in matrices
    )


def score_seconds(config: ModelConfig, layout: TrainingLayout, load: Load, cluster: Cluster) -> float:
    """A layer's scores and weighted sums on one device: their arithmetic, or reading the keys and values."""
    ranks = layout.sub_layer_parallel_size
    width = attention_work(config, cluster.wide_head_fraction) / ranks
    seen = load.cached + load.new_tokens / 2  # of a new token, on average
    rate = cluster.peak_flops(layout.precision) * known("attention_fraction", cluster.attention_fraction)
    flops = 4.0 * load.sequences * load.new_tokens * seen * width
    read = load.sequences * (load.cached + load.new_tokens) * config.cache_width / ranks * layout.width
    return max(flops / rate, read / cluster.bandwidth)
