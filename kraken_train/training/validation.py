"""The validation loss of a model that is being trained."""

from __future__ import annotations

from kraken_train.config import TrainConfig
from kraken_train.data.dataset import TrainingData
from kraken_train.evaluation.perplexity import token_losses
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime


def validation_loss(
    model: LanguageModel, data: TrainingData, config: TrainConfig, mesh: ParallelMesh, runtime: Runtime
) -> float:
    """Mean loss in nats per token over the first `validation.samples` windows of the validation data.

    A collective: the model copies share the batches.
    """
    nats, tokens = 0.0, 0
    windows = data.validation_windows(model.context_length, config.micro_batch_size, config.validation.samples)
    for index, batch in enumerate(windows):
        if index % mesh.data_size == mesh.data_rank:
            batch_nats, batch_tokens = token_losses(model, batch)
            nats += batch_nats
            tokens += batch_tokens
    # Each rank of a model copy counts the windows of its copy, which leaves the mean as it is.
    all_nats, all_tokens = runtime.sum([nats, float(tokens)])
    return all_nats / all_tokens
