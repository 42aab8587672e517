"""The fastest layout of a training on a cluster among all that fit into memory, with the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import divisors
from kraken_train.model.config import ModelConfig
from kraken_train.planning.cluster import Cluster
from kraken_train.planning.fake_trace import trace_teacher
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import Memory, predict_memory
from kraken_train.planning.prediction import Prediction, predict
from kraken_train.settings.parallel import ParallelConfig

ENOUGH_TOKENS = 65_536  # of a micro-batch; a larger one would not use a device better
ALIKE = 0.01  # relative; of layouts with speeds so close the simplest is best
GB = 1e9


@dataclass(frozen=True)
class Constraints:
    """Settings that the user has fixed; None: the search chooses."""

    sub_layer_parallel_size: int | None = None
    micro_batch_size: int | None = None
    zero_stage: int | None = None
    activation_checkpointing: bool | None = None
    vocab_parallel: bool | None = None
    precision: str = "bf16"
    optim: str = "adamw"
    teacher: ModelConfig | None = None  # of a distillation


@dataclass(frozen=True)
class Plan:
    """Predictions of all layouts that fit, the best first; `refused` has the reasons against the others."""

    ranked: tuple[Prediction, ...]
    refused: tuple[str, ...]

    @property
    def best(self) -> Prediction:
        return self.ranked[0]


def search(
    config: ModelConfig, cluster: Cluster, nodes: int, global_batch_size: int, constraints: Constraints | None = None
) -> Plan:
    """Raises ConfigError where nothing fits, or the devices can share neither the model nor the batch."""
    constraints = constraints or Constraints()
    devices = nodes * int(cluster.devices_per_node or 1)
    refused: list[str] = []
    found: list[Prediction] = []
    too_large: list[tuple[TrainingLayout, Memory]] = []
    for size in sizes(config, devices, global_batch_size, constraints, refused):
        copies = devices // size
        batches = micro_batches(config, global_batch_size // copies, constraints)
        for layout in variants(config, size, copies, constraints):
            if saves_memory_in_vain(layout, found, batches, constraints):
                continue
            largest = largest_that_fits(config, layout, batches, global_batch_size // copies, cluster)
            if isinstance(largest, TrainingLayout):
                found.append(predict(config, largest, cluster))
            else:
                too_large.append(largest)
    refused += [
        f"{describe(layout)} needs {memory.total / GB:.1f} GB even with micro-batches of {layout.micro_batch_size}"
        for layout, memory in too_large
    ]
    if too_large and not found:
        raise ConfigError(describe_too_large(config, cluster, too_large))
    if not found:
        raise ConfigError(f"no way to use {devices} devices: {'; '.join(refused)}")
    return Plan(tuple(ranked(found)), tuple(refused))


def sizes(
    config: ModelConfig, devices: int, global_batch_size: int, constraints: Constraints, refused: list[str]
) -> Iterator[int]:
    """Numbers of devices that can share a model copy; the reasons against others are appended to `refused`."""
    name, units = config.parallel_units
    fixed = constraints.sub_layer_parallel_size
    if fixed is not None and units % fixed:
        raise ConfigError(f"sub_layer_parallel_size={fixed} does not divide {name}={units}; use "
                          f"{' or '.join(divisors(units))}")  # fmt: skip
    if fixed is not None and constraints.teacher is not None and constraints.teacher.parallel_units[1] % fixed:
        of_teacher, total = constraints.teacher.parallel_units
        raise ConfigError(f"sub_layer_parallel_size={fixed} does not divide {of_teacher}={total} of the teacher; use "
                          f"{' or '.join(divisors(math.gcd(units, total)))}")  # fmt: skip
    for size in range(1, devices + 1) if fixed is None else [fixed]:
        if units % size:
            if size in (2, 4, 8, 16) and devices % size == 0:  # which users would expect
                refused.append(f"P={size} does not divide {name}={units}")
        elif (teacher := constraints.teacher) is not None and teacher.parallel_units[1] % size:
            of_teacher, total = teacher.parallel_units
            refused.append(f"P={size} does not divide {of_teacher}={total} of the teacher")
        elif devices % size:
            refused.append(f"P={size} does not divide the {devices} devices")
        elif global_batch_size % (devices // size):
            refused.append(f"P={size} leaves {devices // size} copies, which do not divide "
                           f"global_batch_size={global_batch_size}")  # fmt: skip
        elif constraints.vocab_parallel and not sharing(size).can_share_vocabulary(config.vocab_size):
            refused.append(f"P={size} is too much for the {config.vocab_size} rows of model.vocab_size, which "
                           "vocab_parallel=true divides")  # fmt: skip
        else:
            yield size


def micro_batches(config: ModelConfig, of_copy: int, constraints: Constraints) -> list[int]:
    """Divisors of a copy's share of the batch, from the smallest. Raises ConfigError."""
    fixed = constraints.micro_batch_size
    if fixed is not None:
        if of_copy % fixed:
            raise ConfigError(
                f"micro_batch_size={fixed} does not divide the {of_copy} samples of a copy and step; use "
                f"{' or '.join(divisors(of_copy)[:12])}"
            )
        return [fixed]
    enough = max(1, ENOUGH_TOKENS // config.context_length)
    return [size for size in map(int, divisors(of_copy)) if size <= enough]


def sharing(size: int) -> ParallelConfig:
    """The settings of training for copies of so many devices."""
    return ParallelConfig(size, vocab_parallel=None, reduce_dtype=None, verify_every=0)


def variants(config: ModelConfig, size: int, copies: int, constraints: Constraints) -> Iterator[TrainingLayout]:
    """The layouts for so many devices and copies, the simplest first."""
    shared = sharing(size).shares_vocabulary(config.vocab_size)  # the default of training comes first
    for checkpointing in (
        (False, True) if constraints.activation_checkpointing is None else (constraints.activation_checkpointing,)
    ):
        for stage in (1, 2) if constraints.zero_stage is None else (constraints.zero_stage,):
            for sharded in (
                ((True, False) if shared else (False,))
                if constraints.vocab_parallel is None
                else (constraints.vocab_parallel,)
            ):
                if stage == 2 and copies == 1 and constraints.zero_stage is None:
                    continue
                yield TrainingLayout(
                    size,
                    copies,
                    1,
                    1,
                    stage,
                    checkpointing,
                    sharded,
                    constraints.precision,
                    constraints.optim,
                    constraints.teacher,
                )


def saves_memory_in_vain(
    layout: TrainingLayout, found: Sequence[Prediction], batches: list[int], constraints: Constraints
) -> bool:
    """Whether a simpler layout already fits the largest micro-batch, so that this one only saves memory."""
    return any(
        prediction.layout.sub_layer_parallel_size == layout.sub_layer_parallel_size
        and prediction.layout.micro_batch_size == batches[-1]
        and prediction.layout.vocab_parallel == layout.vocab_parallel
        and (
            (layout.activation_checkpointing and constraints.activation_checkpointing is None)
            or (layout.zero_stage == 2 and constraints.zero_stage is None)
        )
        for prediction in found
    )


def largest_that_fits(
    config: ModelConfig, layout: TrainingLayout, batches: list[int], of_copy: int, cluster: Cluster
) -> TrainingLayout | tuple[TrainingLayout, Memory]:
    """The layout with the largest of `batches` that fits; if none fits, that with the smallest and its memory."""

    def sized(batch: int) -> TrainingLayout:
        return replace(layout, micro_batch_size=batch, accumulation_steps=of_copy // batch)

    def memory(batch: int) -> Memory:
        return predict_memory(config, sized(batch))

    if memory(batches[-1]).total <= cluster.usable_bytes:
        return sized(batches[-1])
    least = memory(batches[0])
    if least.total > cluster.usable_bytes:
        return sized(batches[0]), least
    fits, fails = 0, len(batches) - 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if memory(batches[middle]).total <= cluster.usable_bytes:
            fits = middle
        else:
            fails = middle
    return sized(batches[fits])


def ranked(found: Sequence[Prediction]) -> list[Prediction]:
    """The simplest of the fastest layouts first, then the others by speed."""
    by_speed = sorted(found, key=lambda prediction: -prediction.tokens_per_second)
    alike = [p for p in by_speed if p.tokens_per_second > (1 - ALIKE) * by_speed[0].tokens_per_second]
    best = min(alike, key=lambda prediction: complexity(prediction.layout))
    return [best, *(prediction for prediction in by_speed if prediction is not best)]


def complexity(layout: TrainingLayout) -> tuple[int, bool, int, bool]:
    """The default of training is a shared vocabulary."""
    return (
        layout.sub_layer_parallel_size, layout.activation_checkpointing, layout.zero_stage, not layout.vocab_parallel,
    )  # fmt: skip


def describe(layout: TrainingLayout) -> str:
    parts = [
        f"P={layout.sub_layer_parallel_size} x {layout.data_parallel_size} copies",
        f"ZeRO-{layout.zero_stage}",
        "checkpointing" if layout.activation_checkpointing else "",
        "sharded vocabulary" if layout.vocab_parallel else "",
    ]
    return ", ".join(part for part in parts if part)


def describe_too_large(config: ModelConfig, cluster: Cluster, too_large: list[tuple[TrainingLayout, Memory]]) -> str:
    """An error message: which part of the memory is too large, and what would fit."""
    layout, memory = min(too_large, key=lambda pair: pair[1].total)
    part, size = max(memory.parts.items(), key=lambda item: item[1])
    message = (
        f"nothing fits into the {cluster.usable_bytes / GB:.1f} GB that a device of cluster={cluster.name} has for "
        f"tensors: the least is {describe(layout)}, micro_batch_size={layout.micro_batch_size} with "
        f"{memory.total / GB:.1f} GB, of which {size / GB:.1f} GB are {part}"
    )
    ways = []
    for times in (2, 4, 8, 16, 32, 64):
        more = replace(layout, data_parallel_size=layout.data_parallel_size * times)
        if predict_memory(config, more).total <= cluster.usable_bytes:
            ways.append(f"{times} times as many devices")
            break
    smallest = replace(layout, activation_checkpointing=True, zero_stage=2, accumulation_steps=1, micro_batch_size=1)
    if smallest != layout and predict_memory(config, smallest).total <= cluster.usable_bytes:
        ways.append("micro_batch_size=1 zero_stage=2 activation_checkpointing=true")
    return f"{message}; use {' or '.join(ways) or 'a smaller model, or devices with more memory'}"


def reasons(plan: Plan, cluster: Cluster, config: ModelConfig) -> list[str]:
    """Sentences that explain the best layout."""
    best = plan.best
    layout, time = best.layout, best.time
    sentences = []
    size, per_node = layout.sub_layer_parallel_size, int(cluster.devices_per_node or 1)
    if size > per_node:
        sentences.append(
            f"warning: a copy of {size} devices spans several nodes of {per_node} and communicates over "
            f"{cluster.inter_node}"
        )
    if size > 1:
        exposed, behind = 1e3 * time.exchange, 1e3 * time.hidden
        sentences.append(f"P={size}: {behind:.1f} ms of communication hide behind computation, {exposed:.1f} ms do not")
    else:
        sentences.append("P=1: each device has the whole model, so a micro-batch needs no communication")
    others = [p for p in plan.ranked[1:] if p.layout.sub_layer_parallel_size != size]
    if others:
        sentences.append(f"P={others[0].layout.sub_layer_parallel_size} {why_slower(others[0], best)}")
    sentences.append(describe_micro_batch(best, config))
    if layout.teacher is not None and time.teacher is not None:
        weights, _ = trace_teacher(layout.teacher, config.context_length, layout)
        sentences.append(
            f"the teacher takes {weights / GB:.2f} GB of the weights, and {time.teacher / time.total:.0%} of the step "
            "for its forward pass and the divergence"
        )
    if layout.activation_checkpointing:
        sentences.append(f"checkpointing costs {time.recomputation / time.total:.0%} of the step and makes room for it")
    return sentences


def describe_micro_batch(best: Prediction, config: ModelConfig) -> str:
    layout, memory = best.layout, best.memory
    besides = memory.weights + memory.optimizer + memory.gradients
    of_copy = layout.micro_batch_size * layout.accumulation_steps
    if layout.accumulation_steps == 1:
        why = "is all of a copy's share of the batch"
    elif layout.micro_batch_size * 2 * config.context_length > ENOUGH_TOKENS:
        why = "fills a device"
    else:
        why = f"is the largest divisor of a copy's {of_copy} samples that fits"
    passes = memory.activations + memory.working
    return (
        f"micro_batch_size={layout.micro_batch_size} {why}: {passes / GB:.1f} GB beside {besides / GB:.1f} GB of "
        f"weights, gradients and optimizer state; {best.usable_bytes / GB:.1f} GB are usable"
    )


def why_slower(other: Prediction, best: Prediction) -> str:
    """How much longer than the best layout it takes, and which part of the step most of that is."""
    slower = other.time.total - best.time.total
    differences = {name: seconds - best.time.parts[name] for name, seconds in other.time.parts.items()}
    name, most = max(differences.items(), key=lambda item: item[1])
    if slower < ALIKE * best.time.total:
        return "is as fast, and less simple"
    return f"takes {1e3 * slower:.1f} ms longer, most of it {name} ({1e3 * most:+.1f} ms)"
