"""What a start prints before its first step: model, ranks, data, and settings that deserve a note."""

from __future__ import annotations

from collections.abc import Iterator

from kraken_train.common.token_counts import format_tokens
from kraken_train.config import TrainConfig
from kraken_train.data.dataset import TrainingData
from kraken_train.model.config import ModelConfig
from kraken_train.model.head_dims import head_size_note
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.recipe.batch_ramp import Position
from kraken_train.recipe.step_plan import StepPlan


def summary_lines(
    config: TrainConfig,
    model: ModelConfig,
    data: TrainingData,
    mesh: ParallelMesh,
    runtime: Runtime,
    position: Position,
) -> Iterator[str]:
    """One line about the training from `position` on, then one for each note."""
    plan = config.step_plan(model.context_length)
    end = plan.end(position)
    yield (
        f"{model.architecture}, {model.num_parameters:,} parameters, "
        f"{mesh.data_size} x {mesh.model_rank.size} {runtime.device.type} ranks (model copies x "
        f"ranks of a copy), {config.precision}, "
        f"ZeRO-{config.engine.zero_stage}; {data.describe()}; {end.step - position.step} steps to go of "
        f"{describe_sizes(config, plan, position, mesh.data_size)}"
        f"{f', to {end.tokens:,} tokens ({config.length})' if config.max_tokens is not None else ''}"
    )
    for note in data.repetitions():
        yield f"note: {note}"
    if plan.ends_within_warmup:
        yield (
            f"note: the run of {config.length} ends within its warm-up of {config.schedule.warmup}, before the peak "
            "learning rate"
        )
    if (rounded := describe_rounding(config, plan)) and position.step < end.step:
        yield f"note: {rounded}"
    head_sizes = head_size_note(model)
    if head_sizes is not None and position.step == 0:
        yield f"note: {head_sizes}"
    size = mesh.model_rank.size
    if runtime.local_world_size % size:
        yield (
            f"note: parallel.sub_layer_parallel_size={size} does not divide the {runtime.local_world_size} "
            "ranks of a machine, so some model copies exchange over the network"
        )
    if config.validation.enabled and not data.has_validation:
        yield "no validation: the data were prepared without a validation split"


def describe_sizes(config: TrainConfig, plan: StepPlan, position: Position, copies: int) -> str:
    """The steps from `position` on: samples, tokens and micro-batches."""
    end, stretches = plan.end(position), []
    for begin, samples, count in plan.ramp.stretches(position):
        if begin.step < end.step or not stretches:
            steps = end.step - begin.step if count is None else min(count, end.step - begin.step)
            stretches.append((steps, samples, samples // (config.micro_batch_size * copies)))
    if len(stretches) == 1:
        ((_, samples, micro_batches),) = stretches
        sizes = str(samples)
    else:
        sizes = f"({', then '.join(f'{samples} in {steps} steps' for steps, samples, _ in stretches)})"
        micro_batches = " or ".join(str(count) for _, _, count in stretches)
    tokens = plan.ramp.context_length
    return f"{sizes} x {tokens} tokens ({micro_batches} micro-batches of {config.micro_batch_size} per copy)"


def describe_rounding(config: TrainConfig, plan: StepPlan) -> str | None:
    """Which tokens are no whole number of steps, and what they are rounded up to; None: none."""
    ramp = plan.ramp
    marks = {} if config.max_tokens is None else {str(config.length): config.max_tokens}
    marks |= {f"the batch of {samples} from {format_tokens(begin)}": begin for begin, samples in ramp.sizes.items()}
    rounded = [f"{name}: {at.tokens:,} ({at.step:,} steps)" for name, tokens in marks.items()
               if (at := ramp.reaching(tokens)).tokens != tokens]  # fmt: skip
    if not rounded:
        return None
    return f"tokens that are no whole number of steps are rounded up: {'; '.join(rounded)}"
