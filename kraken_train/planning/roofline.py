"""Seconds of an optimizer step, from what each part computes, moves through memory and communicates.

A part takes as long as its arithmetic at the device's achievable rate or its bytes at the memory's, whichever is
longer. Counted is the compiled model (`engine.compile=true`), in which element-wise operations between two products
are one pass over memory.

Shapes of a product: m rows (tokens) x k inner x n columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kraken_train.model.architecture import ATTENTION, Matrix, ModelConfig
from kraken_train.model.head_dims import attention_work
from kraken_train.planning.cluster import Cluster, known
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import FP32, shards
from kraken_train.planning.muon import NS_STEPS, owned_shapes
from kraken_train.planning.traffic import COPY, Collective, loss_chunks

LOSS = 6  # bytes per logit: read for its sum, read and written as gradient, in bf16
UPDATE = 28  # bytes per weight of a fused AdamW: master, moments and gradient in, the first three out
# Bytes per weight of Muon, besides its products: clipping and skipping 16, momentum 24, to and from the stacked bf16
# matrices 16, weight decay and update 20.
MUON_UPDATE = 76


@dataclass(frozen=True)
class Product:
    """`batch` products of m x k and k x n."""

    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n

    def bytes(self, width: int) -> int:
        return width * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)

    def seconds(self, cluster: Cluster, layout: TrainingLayout) -> float:
        rate = cluster.peak_flops(layout.precision) * cluster.matrix_fraction
        rate *= alignment(cluster, (self.k, self.n), layout.width)
        return max(self.flops / rate, self.bytes(layout.width) / cluster.bandwidth)


def alignment(cluster: Cluster, row_lengths: Sequence[int], width: int) -> float:
    """The fraction of the rate that remains where rows are not aligned to what matrix units read at once."""
    sizes = [length * width for length in row_lengths]
    if all(size % 128 == 0 for size in sizes):
        return 1.0
    return cluster.rows_of_16_bytes if all(size % 16 == 0 for size in sizes) else cluster.other_rows


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on each device."""

    matrices: float
    attention: float
    element_wise: float
    loss: float  # of the head, besides its matrix products
    recomputation: float
    exchange: float  # exposed communication within a model copy
    reduction: float  # of gradients over the copies, and all-gathers of weights
    update: float
    hidden: float  # communication during computation, not part of the total
    teacher: float | None = None  # its forward pass and the divergence; None: there is no teacher

    @property
    def parts(self) -> dict[str, float]:
        names = ("matrices", "attention", "element_wise", "loss", "recomputation", "exchange", "reduction", "update")
        parts = {name.replace("_", "-"): getattr(self, name) for name in names}
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def predict_time(
    config: ModelConfig, layout: TrainingLayout, cluster: Cluster, traffic: Sequence[Collective]
) -> StepTime:
    """Without a teacher; `traffic` is that of `predict_traffic`."""
    steps, layers = layout.accumulation_steps, config.num_layers
    parts, once = products(config, layout)
    # Backward, each product becomes two of the same size.
    matrices = 3 * sum(product.seconds(cluster, layout) for product in once)
    matrices += 3 * layers * sum(product.seconds(cluster, layout) for some in parts.values() for product in some)
    attend = attention_seconds(config, layout, cluster)
    passes = pass_seconds(config, layout, cluster)
    of_parts = part_seconds(config, layout, cluster)
    recomputed = sum(forward for forward, _ in of_parts.values()) if layout.activation_checkpointing else 0.0

    def beside(part: str) -> tuple[float, float]:
        """Computation of a part that hides a sum, forward and backward."""
        forward, backward = of_parts[part]
        return forward, backward + (forward if layout.activation_checkpointing else 0.0)

    exchange, hidden, reduction = 0.0, 0.0, 0.0
    for collective in traffic:
        one = collective.seconds(layout, cluster)
        if collective.group != COPY:
            reduction += collective.count * one
        elif collective.behind is None:
            exchange += collective.count * one
        else:  # as many forward as backward
            exposed = sum(max(0.0, one - computed) for computed in beside(collective.behind))
            exchange += collective.count / 2 * exposed
            hidden += collective.count / 2 * (2 * one - exposed)
    return StepTime(
        matrices=steps * matrices,
        attention=steps * layers * sum(attend),
        element_wise=steps * layers * sum(seconds for both in passes.values() for seconds in both),
        loss=steps * loss_bytes(config, layout) / cluster.bandwidth,
        recomputation=steps * layers * recomputed,
        exchange=exchange,
        reduction=reduction,
        update=update_bytes(config, layout) / cluster.bandwidth + orthogonalization_seconds(config, layout, cluster),
        hidden=hidden,
    )


def part_seconds(config: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Each part of a layer on one device, forward and backward, where activations are kept."""
    found = {}
    for name, (forward, backward) in pass_seconds(config, layout, cluster).items():
        matrices = sum(product.seconds(cluster, layout) for product in products(config, layout)[0][name])
        scores = attention_seconds(config, layout, cluster) if name == ATTENTION else (0.0, 0.0)
        found[name] = (matrices + scores[0] + forward, 2 * matrices + scores[1] + backward)
    return found


def products(config: ModelConfig, layout: TrainingLayout) -> tuple[dict[str, list[Product]], list[Product]]:
    """Forward on one device: those of each part of a layer, and those that a model has once."""
    ranks, tokens = layout.sub_layer_parallel_size, layout.micro_batch_size * config.context_length

    def with_tokens(matrices: Sequence[Matrix]) -> list[Product]:
        return [Product(tokens, matrix.in_features, matrix.out_features, matrix.count) for matrix in matrices]

    parts = {name: with_tokens(part.matrices) for name, part in config.layer_parts(ranks).items()}
    head = Matrix(config.embedding_width, layout.vocabulary_rows(config.vocab_size))
    return parts, with_tokens([*config.first_matrices(ranks), *config.last_matrices(ranks), head])


def attention_seconds(config: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> tuple[float, float]:
    """Of a layer's scores and weighted sums on one device, forward and backward.

    Fused attention computes its scores again in the backward pass: 5 products for 2.
    """
    width = attention_work(config, cluster.wide_head_fraction) / layout.sub_layer_parallel_size
    flops = 2.0 * layout.micro_batch_size * config.context_length**2 * width  # the causal half of two products
    fraction = known("attention_fraction", cluster.attention_fraction)
    rate = cluster.peak_flops(layout.precision) * fraction
    return flops / rate, 2.5 * flops / rate


def pass_seconds(config: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Of the element-wise operations of a layer on one device, by part: forward and backward."""
    one = layout.micro_batch_size * config.context_length * layout.width / cluster.bandwidth
    return {name: (one * forward, one * backward) for name, (forward, backward) in widths(config, layout).items()}


def widths(config: ModelConfig, layout: TrainingLayout) -> dict[str, tuple[float, float]]:
    """Values per token that the element-wise operations of a layer move, by part: forward and backward."""
    return {
        name: (
            sum(passes.forward * width for passes, width in part.element_wise),
            sum(passes.backward * width for passes, width in part.element_wise),
        )
        for name, part in config.layer_parts(layout.sub_layer_parallel_size).items()
    }


def loss_bytes(config: ModelConfig, layout: TrainingLayout) -> float:
    """Bytes moved in a micro-batch for the logits, and for the weight's gradient, to which each chunk adds in fp32."""
    tokens = layout.micro_batch_size * config.context_length
    rows = layout.vocabulary_rows(config.vocab_size)
    weight = rows * config.embedding_width
    chunks = loss_chunks(config, layout)
    return LOSS / 2 * layout.width * tokens * rows + weight * (chunks * (2 * layout.width + 2 * FP32) + 4 * FP32)


def update_bytes(config: ModelConfig, layout: TrainingLayout) -> float:
    """Bytes moved in a step: gradients of each micro-batch converted and added, their mean and norm, the update."""
    own = shards(config, layout)
    added = layout.accumulation_steps * own.elements * (layout.width + 4 * FP32)
    averaged = (FP32 + (2 * FP32 if layout.data_parallel_size > 1 else 0)) * own.elements  # cleared; divided
    by_muon = sum(elements for _, elements, _, _ in own.by_muon)
    updated = UPDATE * (sum(own.parts) - by_muon) + MUON_UPDATE * by_muon
    return added + averaged + updated + sum(own.parts) * (FP32 + layout.width)


def orthogonalization_seconds(config: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> float:
    """Of Muon's iterations in bf16: (r, c) times its transpose, the square of that, and that times (r, c)."""
    in_bf16, seconds = replace(layout, precision="bf16"), 0.0
    for group in shards(config, layout).by_muon:
        for shape, count in Counter(owned_shapes(*group)).items():
            rows, columns = sorted(shape)
            products = (
                Product(rows, columns, rows, count), Product(rows, rows, rows, count),
                Product(rows, rows, columns, count),
            )  # fmt: skip
            seconds += NS_STEPS * sum(product.seconds(cluster, in_bf16) for product in products)
    return seconds
