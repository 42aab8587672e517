"""The communication of an optimizer step: its collectives, their number and their bytes.

Among the devices of a model copy, for each micro-batch of B x T tokens: the all-reduces that the architecture declares
(`ModelConfig.all_reduces`). Among the copies: the sum of the fp32 gradients and the updated
weights. Left out are collectives of a few numbers (loss, norm), and sums of gradients over a single copy, which
transfer nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.cross_entropy import LOGITS_AT_ONCE
from kraken_train.planning.cluster import Cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import FP32, shards
from kraken_train.planning.muon import moved_bytes

COPY, DATA = "model copy", "data"  # groups: the devices of a copy; the devices of all copies that hold the same part


@dataclass(frozen=True)
class Collective:
    """`count` collectives of `size` bytes each in an optimizer step."""

    purpose: str
    # all-reduce | all-gather or reduce-scatter (of `size` bytes in all) | broadcast | all-to-all (`size` bytes to this
    # device)
    kind: str
    group: str
    size: int
    count: int
    behind: str | None = None  # the part of a layer that is computed meanwhile; None: the devices wait

    @property
    def hides(self) -> bool:
        return self.behind is not None

    @property
    def bytes(self) -> int:
        return self.size * self.count

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("purpose", "kind", "group", "size", "count", "hides", "bytes")
        return {name: getattr(self, name) for name in names}

    def seconds(self, layout: TrainingLayout, cluster: Cluster) -> float:
        """The time of one of them, in seconds."""
        if self.group == COPY:
            ranks, stride = layout.sub_layer_parallel_size, 1
        else:
            ranks, stride = layout.data_parallel_size, layout.sub_layer_parallel_size
        link = cluster.interconnect(ranks, stride)
        if self.kind == "all-reduce":
            return link.all_reduce_seconds(self.size, ranks)
        if self.kind in ("all-gather", "reduce-scatter"):
            return link.all_gather_seconds(self.size, ranks)
        return link.seconds(self.size)  # a broadcast sends all bytes over each link, an all-to-all no more over any


def predict_traffic(config: ModelConfig, layout: TrainingLayout) -> list[Collective]:
    return [*within_copy(config, layout), *among_copies(config, layout), *for_muon(config, layout)]


def within_copy(config: ModelConfig, layout: TrainingLayout) -> Iterator[Collective]:
    """Collectives among the devices of a copy: in each micro-batch, the broadcasts once a step."""
    ranks, steps = layout.sub_layer_parallel_size, layout.accumulation_steps
    if ranks == 1:
        return
    tokens = layout.micro_batch_size * config.context_length
    for reduced in config.all_reduces:
        if reduced.count:
            size = tokens * reduced.width * layout.width
            yield Collective(reduced.purpose, "all-reduce", COPY, size, reduced.count * steps, reduced.behind)
    if config.copied_gains:
        gains = layout.width * config.copied_gains
        yield Collective("gradients of the gains of norms", "all-reduce", COPY, gains, steps)
    if layout.vocab_parallel:
        size = tokens * config.embedding_width * layout.width
        yield Collective("embedding, and gradient of the head", "all-reduce", COPY, size, 2 * steps)
        chunks = loss_chunks(config, layout)
        numbers = 2 * FP32 * ranks * -(-tokens // chunks)
        yield Collective("loss", "all-gather", COPY, numbers, chunks * steps)
    own = shards(config, layout)
    for part, shared in zip(own.parts, own.shared, strict=True):
        if shared:
            yield Collective("equal gradients of what all devices hold", "broadcast", COPY, FP32 * part, 1)


def loss_chunks(config: ModelConfig, layout: TrainingLayout) -> int:
    """Chunks in which the head computes logits, see `kraken_train.model.cross_entropy`."""
    rows = layout.vocabulary_rows(config.vocab_size)
    tokens = layout.micro_batch_size * config.context_length
    return -(-tokens // max(1, LOGITS_AT_ONCE // rows))


def among_copies(config: ModelConfig, layout: TrainingLayout) -> Iterator[Collective]:
    """Collectives among devices of different copies."""
    if layout.data_parallel_size == 1:
        return
    own = shards(config, layout)
    if layout.keeps_accumulator:
        for size in own.padded:
            yield Collective("sum of the gradients", "reduce-scatter", DATA, FP32 * size, 1)
    else:
        # At stage 2 every micro-batch is reduced, at stage 1 the sum of them.
        steps = layout.accumulation_steps if layout.zero_stage > 1 else 1
        buckets = -(-own.elements // own.bucket)  # about: a gradient that does not fit any more begins a new one
        yield Collective("sum of the gradients", "all-reduce", DATA, FP32 * own.elements // buckets, buckets * steps)
    for size in own.padded:
        yield Collective("updated weights", "all-gather", DATA, layout.width * size, 1)


def for_muon(config: ModelConfig, layout: TrainingLayout) -> Iterator[Collective]:
    """Matrices that lie on several devices come together on one; what was computed goes back."""
    for group in shards(config, layout).by_muon:
        among = COPY if layout.sub_layer_parallel_size > 1 and any(part.axis is not None for part in group[0]) else DATA
        purposes = ("momentum, to whole matrices", "updates of whole matrices")
        for purpose, size in zip(purposes, moved_bytes(*group), strict=True):
            if size:
                yield Collective(purpose, "all-to-all", among, size, 1)
