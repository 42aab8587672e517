"""What a start prints before its first step: model, ranks, data, and settings that deserve a note."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kraken_train.common.token_counts import format_tokens
from kraken_train.config import TrainConfig
from kraken_train.data.phases import RunData
from kraken_train.data.validation_set import ValidationSet
from kraken_train.model.config import ModelConfig
from kraken_train.model.head_dims import head_size_note
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.recipe.batch_ramp import Position
from kraken_train.recipe.phases import DECAY
from kraken_train.recipe.step_plan import StepPlan
from kraken_train.training.teacher import TeacherExport


def summary_lines(
    config: TrainConfig,
    model: ModelConfig,
    data: RunData,
    validation_sets: Sequence[ValidationSet],
    mesh: ParallelMesh,
    runtime: Runtime,
    position: Position,
    hosts: Sequence[str],
    teacher: TeacherExport | None = None,
) -> Iterator[str]:
    """One line about the training from `position` on, then one for each note. `hosts` are those of the ranks."""
    plan = config.step_plan(model.context_length)
    end, phase = plan.end(position), plan.phase_at(position)
    yield (
        f"{model.architecture}, {model.num_parameters:,} parameters, "
        f"{mesh.data_size} x {mesh.model_rank.size} {runtime.device.type} ranks (model copies x "
        f"ranks of a copy), {config.precision}, "
        f"ZeRO-{config.engine.zero_stage}; {data.phases[phase].describe()}; {end.step - position.step} steps to go of "
        f"{describe_sizes(config, plan, position, mesh.data_size)}"
        f"{f', to {end.tokens:,} tokens ({config.length})' if config.length.tokens is not None else ''}"
    )
    yield from phase_lines(config, plan, data, position)
    if teacher is not None:
        yield (
            f"teacher: {teacher.config.architecture}, {teacher.config.num_parameters:,} parameters, of "
            f"{teacher.export.folder}; weight {config.distill.weight}, temperature {config.distill.temperature}"
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
    if spread := describe_spread(hosts, size):
        yield f"note: {spread}"
    sources = [str(chosen.folder) for chosen in validation_sets if chosen.is_source]
    if config.phases and config.validation.enabled and sources:
        yield f"validation_loss is measured on the data of phases[0] in all phases: {', '.join(sources)}"
    if config.deterministic:
        yield "deterministic: the same command on the same ranks and devices gives the same bits"
    if config.validation.enabled and not validation_sets:
        yield "no validation: the data were prepared without a validation split"


def phase_lines(config: TrainConfig, plan: StepPlan, data: RunData, position: Position) -> Iterator[str]:
    """A line for each phase that is not over."""
    for number, phase in enumerate(config.phases or ()):
        begin, end = plan.phase_begins[number], plan.ramp.reaching(phase.until, position)
        steps = end.step - plan.ramp.reaching(begin, position).step
        if number < plan.phase_at(position):
            continue
        decay = ", learning rate decaying to 0" if phase.schedule == DECAY else ""
        yield f"phases[{number}]: {steps} steps, to step {end.step}: {data.phases[number].describe()}{decay}"


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


def describe_spread(hosts: Sequence[str], size: int) -> str | None:
    """Which model copies of `size` ranks are on several machines, given that of each rank; None: none.

    No division tells that: Slurm may place neighbouring ranks on different nodes, or start unequal numbers.
    """
    machines = [list(dict.fromkeys(hosts[first : first + size])) for first in range(0, len(hosts), size)]
    spread = [(copy, names) for copy, names in enumerate(machines) if len(names) > 1]
    if not spread:
        return None
    copy, names = spread[0]
    return (
        f"{len(spread)} of {len(machines)} model copies exchange over the network: the ranks {copy * size} to "
        f"{copy * size + size - 1} of copy {copy} are on {', '.join(names)}. Place the "
        f"parallel.sub_layer_parallel_size={size} ranks of a copy on one machine: a multiple of {size} ranks on each, "
        "in the order of ranks (srun --distribution=block)"
    )


def describe_rounding(config: TrainConfig, plan: StepPlan, position: Position) -> str | None:
    """Which tokens after `position` are no whole number of steps, and what they are rounded up to; None: none."""
    ramp = plan.ramp
    marks = {f"phases[{number}].until={format_tokens(phase.until)}": phase.until
             for number, phase in enumerate(config.phases or ())}  # fmt: skip
    if config.max_tokens is not None and not config.phases:
        marks = {str(config.length): config.max_tokens}
    marks |= {f"the batch of {samples} from {format_tokens(begin)}": begin for begin, samples in ramp.sizes.items()}
    rounded = [f"{name}: {at.tokens:,} ({at.step:,} steps)" for name, tokens in marks.items()
               if tokens > position.tokens and (at := ramp.reaching(tokens, position)).tokens != tokens]  # fmt: skip
    if not rounded:
        return None
    return f"tokens that are no whole number of steps are rounded up: {'; '.join(rounded)}"
