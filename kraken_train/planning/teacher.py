"""The time and the communication that the teacher of a distillation adds to each micro-batch: those of a forward pass.

The devices of a model copy share the teacher as they share the model. Its memory is counted in `planning.memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kraken_train.model.architecture import ATTENTION, ModelConfig
from kraken_train.planning.cluster import Cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import FP32
from kraken_train.planning.roofline import Product, attention_seconds, products, widths
from kraken_train.planning.traffic import COPY, Collective, loss_chunks

# Reads and writes of (tokens, vocabulary) by the divergence: both logits for its sums; both again, and the result, for
# the gradient; and to add that to the gradient of the cross-entropy.
DIVERGENCE = 8


def teacher_traffic(teacher: ModelConfig, layout: TrainingLayout) -> Iterator[Collective]:
    """Collectives among the devices of a copy. `teacher.context_length` is that of the samples."""
    ranks, steps = layout.sub_layer_parallel_size, layout.accumulation_steps
    if ranks == 1:
        return
    tokens = layout.micro_batch_size * teacher.context_length
    for reduced in teacher.all_reduces:
        if forward := reduced.count // 2 * steps:
            size = tokens * reduced.width * layout.width
            yield Collective("forward pass of the teacher", "all-reduce", COPY, size, forward, reduced.behind)
    if layout.vocab_parallel:
        size = tokens * teacher.embedding_width * layout.width
        yield Collective("embedding of the teacher", "all-reduce", COPY, size, steps)
        chunks = loss_chunks(teacher, layout)
        numbers = 3 * FP32 * ranks * -(-tokens // chunks)
        yield Collective("divergence from the teacher", "all-gather", COPY, numbers, chunks * steps)


def teacher_seconds(teacher: ModelConfig, layout: TrainingLayout, cluster: Cluster) -> float:
    """Of an optimizer step on each device, with the communication that nothing hides."""
    tokens = layout.micro_batch_size * teacher.context_length

    def of(some: Sequence[Product]) -> float:
        return sum(product.seconds(cluster, layout) for product in some)

    parts, once = products(teacher, layout)
    passes = {name: forward for name, (forward, _) in widths(teacher, layout).items()}
    of_part = {
        name: of(some) + passes[name] * layout.width * tokens / cluster.bandwidth for name, some in parts.items()
    }
    of_part[ATTENTION] += attention_seconds(teacher, layout, cluster)[0]
    logits = tokens * layout.vocabulary_rows(teacher.vocab_size)
    divergence = DIVERGENCE * layout.width * logits / cluster.bandwidth
    computed = teacher.num_layers * sum(of_part.values()) + of(once) + divergence
    exposed = 0.0
    for collective in teacher_traffic(teacher, layout):
        behind = 0.0 if collective.behind is None else of_part[collective.behind]
        exposed += collective.count * max(0.0, collective.seconds(layout, cluster) - behind)
    return layout.accumulation_steps * computed + exposed
