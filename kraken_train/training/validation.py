"""The validation of a model that is being trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kraken_train.data.validation_set import ValidationSet
from kraken_train.evaluation.perplexity import perplexity, token_losses
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.training.metrics_logger import Record


def validate(
    model: LanguageModel,
    sets: Sequence[ValidationSet],
    batch_size: int,
    mesh: ParallelMesh,
    runtime: Runtime,
    progress: Callable[[], None],
) -> Record:
    """Mean losses in nats per token, with perplexities and bits per byte: `validation_loss` is that of all sources.

    Further sets, and sources where there are several, have their own, such as `validation_loss/books`. A collective:
    the model copies share the batches. `progress` is called after each set.
    """
    totals = [[0.0, 0.0] for _ in range(1 + len(sets))]  # nats and tokens, here: of all sources, then of each set
    index = 0
    for chosen, total in zip(sets, totals[1:], strict=True):
        for batch in chosen.windows(model.context_length, batch_size):
            if index % mesh.data_size == mesh.data_rank:
                measured = token_losses(model, batch)
                for counted in (total, totals[0]) if chosen.is_source else (total,):
                    counted[0] += measured[0]
                    counted[1] += measured[1]
            index += 1
        progress()
    # Each rank of a model copy counts the windows of its copy, which leaves the means as they are.
    sums = runtime.sum([number for total in totals for number in total])
    nats, tokens = sums[::2], sums[1::2]
    record: Record = {}
    if tokens[0]:
        text_bytes = sum(
            n * chosen.bytes_per_token for n, chosen in zip(tokens[1:], sets, strict=True) if chosen.is_source
        )
        record |= metrics("", nats[0], tokens[0], text_bytes)
    only_source = sum(chosen.is_source for chosen in sets) == 1
    for chosen, set_nats, set_tokens in zip(sets, nats[1:], tokens[1:], strict=True):
        if set_tokens and not (chosen.is_source and only_source):  # a source with a small share may have no window
            record |= metrics(f"/{chosen.name}", set_nats, set_tokens, set_tokens * chosen.bytes_per_token)
    return record


def metrics(suffix: str, nats: float, tokens: float, text_bytes: float) -> Record:
    loss = nats / tokens
    record: Record = {f"validation_loss{suffix}": loss, f"validation_perplexity{suffix}": perplexity(loss)}
    if text_bytes:
        record[f"validation_bits_per_byte{suffix}"] = nats / text_bytes / math.log(2)
    return record
