"""What a start prints before its first step: model, ranks, data, and settings that deserve a note."""

from __future__ import annotations

from collections.abc import Iterator

from kraken_train.config import TrainConfig
from kraken_train.data.dataset import TrainingData
from kraken_train.model.config import ModelConfig
from kraken_train.model.head_dims import head_size_note
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime


def summary_lines(
    config: TrainConfig, model: ModelConfig, data: TrainingData, mesh: ParallelMesh, runtime: Runtime, step: int
) -> Iterator[str]:
    """One line about the training from `step` on, then one for each note."""
    yield (
        f"{model.architecture}, {model.num_parameters:,} parameters, "
        f"{mesh.data_size} x {mesh.model_rank.size} {runtime.device.type} ranks (model copies x "
        f"ranks of a copy), {config.precision}, "
        f"ZeRO-{config.engine.zero_stage}; {data.describe()}; {config.max_steps - step} steps to go of "
        f"{config.global_batch_size} x {model.context_length} tokens "
        f"({config.gradient_accumulation_steps(mesh.data_size)} micro-batches of {config.micro_batch_size} per copy)"
    )
    for note in data.repetitions():
        yield f"note: {note}"
    if config.max_steps < config.schedule.warmup_steps:
        yield (
            f"note: the run of max_steps={config.max_steps} ends within its warm-up of "
            f"schedule.warmup_steps={config.schedule.warmup_steps}, before the peak learning rate"
        )
    head_sizes = head_size_note(model)
    if head_sizes is not None and step == 0:
        yield f"note: {head_sizes}"
    size = mesh.model_rank.size
    if runtime.local_world_size % size:
        yield (
            f"note: parallel.sub_layer_parallel_size={size} does not divide the {runtime.local_world_size} "
            "ranks of a machine, so some model copies exchange over the network"
        )
    if config.validation.every and not data.has_validation:
        yield "no validation: the data were prepared without a validation split"
