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
    if rounded := describe_rounding(config, plan, position):
        yield f"note: {rounded}"
    head_sizes = head_size_note(model)
    if head_sizes is not None and position.step == 0:
        yield f"note: {head_sizes}"
    size = mesh.model_rank.size
    if size > 1 and config.parallel.vocab_parallel is None and not config.parallel.shares_vocabulary(model.vocab_size):
        yield (
            f"note: the {model.vocab_size} rows of the vocabulary are too few for {size} ranks, so each holds all of "
            "them (parallel.vocab_parallel)"
        )
    if runtime.local_world_size % size:
        yield (
            f"note: parallel.sub_layer_parallel_size={size} does not divide the {runtime.local_world_size} "
            "ranks of a machine, so some model copies exchange over the network"
        )
    if config.validation.enabled and not data.has_validation:
        yield "no validation: the data were prepared without a validation split"


def describe_sizes(config: TrainConfig, plan: StepPlan, position: Position, copies: int) -> str:
    """The steps from `position` on: samples, tokens and micro-batches."""
    end, tokens = plan.end(position).step, plan.ramp.context_length
    stretches = [
        (samples, (end if count is None else min(end, begin.step + count)) - begin.step)
        for begin, samples, count in plan.ramp.stretches(position)
        if begin.step < max(end, position.step + 1)
    ]
    sizes = ", then ".join(f"{samples}{f' in {steps} steps' * (len(stretches) > 1)}" for samples, steps in stretches)
    micro_batches = " or ".join(str(samples // (config.micro_batch_size * copies)) for samples, _ in stretches)
    return f"{sizes} x {tokens} tokens ({micro_batches} micro-batches of {config.micro_batch_size} per copy)"


def describe_rounding(config: TrainConfig, plan: StepPlan, position: Position) -> str | None:
    """Which tokens after `position` are no whole number of steps, and what they are rounded up to; None: none."""
    ramp = plan.ramp
    marks = {} if config.max_tokens is None else {str(config.length): config.max_tokens}
    marks |= {f"the batch of {samples} from {format_tokens(begin)}": begin for begin, samples in ramp.sizes.items()}
    rounded = [f"{name}: {at.tokens:,} ({at.step:,} steps)" for name, tokens in marks.items()
               if tokens > position.tokens and (at := ramp.reaching(tokens, position)).tokens != tokens]  # fmt: skip
    if not rounded:
        return None
    return f"tokens that are no whole number of steps are rounded up: {'; '.join(rounded)}"
