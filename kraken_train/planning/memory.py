"""Bytes on each device at the moment of a step that needs most memory, by purpose.

The forward and backward passes are traced with fake tensors (`planning.fake_trace`). What is kept between them, and
what the reduction of the gradients and the update of the weights need in addition, is counted as DeepSpeed 0.19.8 does
it, with E parameters on this device, in groups, D copies of the model, w bytes per weight and buckets of b gradients
(`optim.reduce_bucket_elements`; b = E in small models):

| | bf16, ZeRO-1 (BF16_Optimizer) | bf16, ZeRO-2 | fp32 (both DeepSpeedZeroOptimizer) |
| --- | --- | --- | --- |
| weights | 2 E | 2 E | 4 E |
| fp32 masters and two moments (Muon: and its momentum) | 12 E / D (8 E / D) | 12 E / D | 12 E / D |
| gradients between micro-batches | 4 E | 4 E / D | 4 E and a bucket of 4 b; ZeRO-2: 4 E / D |
| to reduce them | nothing | a bucket of 2 b, 2 b + 4 b to sum | a bucket of 4 b, 4 b to sum |

Without accumulation bf16 at ZeRO-1 also has the 2 E of bf16 gradients until the weights are updated.
Parameters that lie across the border of two partitions count in both where gradients are kept by parameter (fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch._subclasses.fake_tensor import FakeTensorMode

from kraken_train.model.config import ModelConfig
from kraken_train.planning.fake_trace import fake_model, trace_micro_batch, trace_teacher
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.muon import Parts, working_bytes
from kraken_train.training.muon import MATRICES
from kraken_train.training.optim import parameter_groups, reduce_bucket_elements, state_names

FP32 = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the largest moment of a step."""

    weights: int  # those of a teacher included
    optimizer: int  # fp32 masters and moments
    gradients: int  # what is kept of them from one micro-batch, or step, to the next
    activations: int  # kept for the backward pass
    working: int  # what is needed besides at that moment: logits, gradients on their way, copies
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "optimizer", "gradients", "activations", "working")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Shards:
    """The parameters of one device, in the optimizer's groups, and how ZeRO cuts these."""

    groups: tuple[tuple[int, ...], ...]  # elements of each parameter
    shared: tuple[bool, ...]  # by group: whether all devices of a model copy hold all of it
    matrices: tuple[Parts, ...]  # by group: those that Muon updates
    states: tuple[int, ...]  # by group: numbers that the optimizer keeps for each parameter
    copies: int
    ranks: int  # of a copy
    zero_stage: int

    @property
    def elements(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def padded(self) -> list[int]:
        """Elements of each group, rounded up so that every copy's part begins on 4 bytes in bf16."""
        unit = 2 * self.copies
        return [-(-sum(group) // unit) * unit for group in self.groups]

    @property
    def parts(self) -> list[int]:
        """Elements of each group that this rank updates."""
        return [size // self.copies for size in self.padded]

    @property
    def by_muon(self) -> list[tuple[Parts, int, int, int]]:
        """The groups that Muon updates, as `kraken_train.planning.muon` takes them."""
        groups = zip(self.matrices, self.parts, strict=True)
        return [(matrices, part, self.copies, self.ranks) for matrices, part in groups if matrices]

    @property
    def overlapping(self) -> int:
        """Elements of all parameters of which the first rank updates something."""
        total = 0
        for group, part in zip(self.groups, self.parts, strict=True):
            begin = 0
            for size in group:
                if begin < part:
                    total += size
                begin += size
        return total

    @property
    def bucket(self) -> int:
        """Elements of the buffer for reduction, see `optim.reduce_bucket_elements`."""
        return reduce_bucket_elements([size for group in self.groups for size in group], self.zero_stage)

    @property
    def reduces_during_backward(self) -> bool:
        """Whether there are several buckets, which ZeRO-2 then sums as they become full."""
        return self.zero_stage > 1 and self.bucket < self.elements


@lru_cache(maxsize=256)
def shards(config: ModelConfig, layout: TrainingLayout) -> Shards:
    with FakeTensorMode():
        groups = parameter_groups(fake_model(config, layout), weight_decay=0.1, matrices_apart=layout.with_muon)
        sizes = tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups)
    return Shards(
        sizes,
        tuple(group["shared"] for group in groups),
        tuple(tuple(group.get(MATRICES, ())) for group in groups),
        tuple(len(state_names(group)) for group in groups),
        layout.data_parallel_size,
        layout.sub_layer_parallel_size,
        layout.zero_stage,
    )


def predict_memory(config: ModelConfig, layout: TrainingLayout) -> Memory:
    """Of the first device; all hold the same within a few rows of padding."""
    own, trace = shards(config, layout), trace_micro_batch(config, layout)
    besides = reduction_bytes(own, layout) if own.reduces_during_backward else new_bucket(own, layout)
    kept = trace.kept
    of_teacher, teacher_pass = 0, 0
    if layout.teacher is not None:
        of_teacher, teacher_pass = trace_teacher(layout.teacher, config.context_length, layout)
    moments = [
        ("forward pass of the teacher", 0, teacher_pass),
        ("loss", kept, trace.loss - kept),
        ("backward pass of the last layer", kept, trace.last_layer - kept + besides),
        ("backward pass of a layer", min(kept, trace.layers), max(0, trace.layers - kept) + besides),
        ("backward pass of the embedding", 0, trace.embedding + besides),
        ("sum of the gradients in fp32", 0, summation_bytes(own, layout)),
        ("reduction of the gradients", 0, reduction_bytes(own, layout)),
        ("update of the weights", 0, update_bytes(own, layout)),
    ]
    moment, activations, working = max(moments, key=lambda candidate: candidate[1] + candidate[2])
    return Memory(
        weights=sum(own.padded) * layout.width + of_teacher,
        optimizer=FP32 * sum((1 + kept) * part for kept, part in zip(own.states, own.parts, strict=True)),
        gradients=gradients_between(own, layout),
        activations=activations,
        working=working,
        moment=moment,
    )


def new_bucket(own: Shards, layout: TrainingLayout) -> int:
    """Bytes of the bucket that a backward pass makes; in fp32 at stage 1 it is made once and counts as gradients."""
    once = layout.accumulation_steps == 1
    makes_one = layout.zero_stage > 1 or (layout.precision == "fp32" and once)
    return layout.width * own.bucket if makes_one else 0


def gradients_between(own: Shards, layout: TrainingLayout) -> int:
    """Bytes that are there when a later micro-batch of a step begins; those of BF16_Optimizer always."""
    if layout.keeps_accumulator:
        return FP32 * sum(own.padded)
    if layout.accumulation_steps == 1:
        return 0
    if layout.precision == "bf16":
        return FP32 * sum(own.parts)
    return FP32 * (own.overlapping if layout.zero_stage > 1 else own.elements + own.bucket)


def summation_bytes(own: Shards, layout: TrainingLayout) -> int:
    """For BF16_Optimizer to add the gradients of an only micro-batch to its own: all in bf16, and one in fp32.

    Those of several micro-batches are added and freed one by one (`fake_trace.convert_to_fp32`).
    """
    if not layout.keeps_accumulator or layout.accumulation_steps > 1:
        return 0
    return layout.width * own.elements + FP32 * max(map(max, own.groups))


def reduction_bytes(own: Shards, layout: TrainingLayout) -> int:
    """To sum the gradients over the copies, beside what is counted as gradients."""
    if layout.keeps_accumulator:
        return 0
    if layout.precision == "bf16":
        first_part = 0 if layout.accumulation_steps > 1 else FP32 * sum(own.parts)
        return (layout.width + layout.width + FP32) * own.bucket + first_part
    if layout.zero_stage > 1 or layout.accumulation_steps == 1:
        reduced = own.overlapping if own.reduces_during_backward else 0  # which now is beside a further bucket
        return FP32 * (2 * own.bucket + reduced)
    return 0  # the copy takes the place of gradients that have moved into the bucket


def update_bytes(own: Shards, layout: TrainingLayout) -> int:
    """To update the weights with a fused AdamW, or Muon, beside what is counted as gradients."""
    muon, once = max((working_bytes(*group) for group in own.by_muon), default=0), layout.accumulation_steps == 1
    if layout.keeps_accumulator:
        return muon + (layout.width * own.elements if once else 0)
    if layout.precision == "bf16":
        return muon + (FP32 * sum(own.parts) if once else 0)
    # A flat copy of the group that is updated, in whose place its gradients are freed.
    more = max(FP32 * max(own.parts), muon)
    if layout.zero_stage == 1 and not once:
        return max(0, more - FP32 * own.bucket)  # the bucket, which counts as gradients, is gone by then
    return more + (FP32 * own.overlapping if once else 0)
