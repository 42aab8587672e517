"""The memory of one micro-batch on one device, from a trace of the real model with PyTorch's fake tensors.

Fake tensors have shapes, types and lifetimes but no data. Counting those that are alive gives what autograd keeps and
what each operation needs, for the code as it is and for any size, without formulas that could differ from the model.
Three and four layers are traced; each further layer adds as much as the fourth. Where layers repeat after a period,
two numbers of whole periods are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from kraken_train.model.config import ModelConfig
from kraken_train.model.divergence import SoftTargets
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.live_bytes import LiveBytes

SHALLOW = 3  # layers; with fewer, the largest sums fall elsewhere


@dataclass(frozen=True)
class FakeTrace:
    """Bytes besides weights and optimizer state; all are linear in the number of layers.

    `kept` is what the layers and the embedding keep for the backward pass. The others are peaks, each during a phase:
    the forward pass with the loss and its backward pass, the backward pass of the last layer, that of the other layers,
    and that of the embedding.
    """

    kept: int
    loss: int
    last_layer: int
    layers: int
    embedding: int

    @classmethod
    def through(cls, traces: Mapping[int, FakeTrace], num_layers: int) -> FakeTrace:
        """Extrapolated linearly from the traces of two numbers of layers."""
        (fewer, shallow), (many, deep) = sorted(traces.items())
        more = (num_layers - fewer) / (many - fewer)
        peaks = zip(astuple(shallow), astuple(deep), strict=True)
        return cls(*(round(first + more * (second - first)) for first, second in peaks))


def trace_micro_batch(config: ModelConfig, layout: TrainingLayout) -> FakeTrace:
    """A micro-batch of full length on the first device of a model copy.

    Complete gradients are not counted here: they are added to those of the previous micro-batch or copied into a
    bucket, and `planning.memory` counts both. Only at stage 1 without accumulation are they created and kept.
    """
    gradient_hook: GradientHook | None = convert_to_fp32 if layout.keeps_accumulator else drop_gradient
    if layout.zero_stage == 1 and layout.accumulation_steps == 1:
        gradient_hook = None
    reduced = replace(layout, data_parallel_size=1, zero_stage=1, accumulation_steps=1)  # what has no influence
    period = config.layer_period
    depths = [period * -(-depth // period) for depth in (SHALLOW, SHALLOW + period)]
    if config.num_layers <= depths[-1]:
        return trace_all_layers(config, reduced, gradient_hook)
    traces = {depth: trace_all_layers(config.at_depth(depth), reduced, gradient_hook) for depth in depths}
    return FakeTrace.through(traces, config.num_layers)


GradientHook = Callable[[Tensor], None]  # of a parameter whose gradient is complete


def convert_to_fp32(parameter: Tensor) -> None:
    """As BF16_Optimizer, which makes an fp32 copy to add it to its accumulator."""
    parameter.grad.to(torch.float32)  # type: ignore[union-attr]
    parameter.grad = None


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=1024)
def trace_all_layers(config: ModelConfig, layout: TrainingLayout, gradient_hook: GradientHook | None) -> FakeTrace:
    with FakeTensorMode():
        model = fake_model(config, layout)
        if gradient_hook is not None:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(gradient_hook)
        ids = torch.zeros(layout.micro_batch_size, config.context_length, dtype=torch.long)
        head = fake_head(layout)
        weights = [*model.parameters(), *([] if head is None else [head])]
        with LiveBytes(weights) as live, record_peaks(model, live) as peaks:
            model.losses(ids, ids, soft=fake_soft_targets(ids, head)).objective.backward()
            peaks.append(live.take_peak())
    return FakeTrace(*peaks)


def fake_head(layout: TrainingLayout) -> Tensor | None:
    """The rows of the teacher's head on the first device."""
    teacher = layout.teacher
    if teacher is None:
        return None
    return torch.empty(layout.vocabulary_rows(teacher.vocab_size), teacher.embedding_width, dtype=layout.dtype)


def fake_soft_targets(ids: Tensor, head: Tensor | None) -> SoftTargets | None:
    """Nothing keeps them after the loss, as in training."""
    return None if head is None else SoftTargets(head.new_empty(*ids.shape, head.shape[1]), head, 0.5, 1.0)


@lru_cache(maxsize=256)
def trace_teacher(teacher: ModelConfig, tokens: int, layout: TrainingLayout) -> tuple[int, int]:
    """Bytes on the first device: of the teacher's weights, and besides at the peak of its forward pass.

    `tokens` are those of a sample.
    """
    depth = teacher.layer_period * -(-SHALLOW // teacher.layer_period)
    with FakeTensorMode():
        weights = layout.width * sum(parameter.numel() for parameter in fake_model(teacher, layout).parameters())
        # Without a backward pass nothing of a layer is kept, so that more layers take no more.
        model = fake_model(teacher.at_depth(min(depth, teacher.num_layers)), layout)
        ids = torch.zeros(layout.micro_batch_size, tokens, dtype=torch.long)
        with LiveBytes(model.parameters()) as live:
            model.soft_targets(ids, 0.5, 1.0)
    return weights, live.peak


def fake_model(config: ModelConfig, layout: TrainingLayout) -> LanguageModel:
    """The part of the first device; must be called in a FakeTensorMode. Its weights are not counted."""
    model_rank = ModelRank(0, layout.sub_layer_parallel_size)
    communicator: Communicator = LocalCommunicator()
    if model_rank.size > 1:
        communicator = SilentCommunicator(FakeGroup(model_rank), collective=no_collective)  # type: ignore[arg-type]
    units, vocabulary = even_share(config, model_rank, layout.vocab_parallel)
    default = torch.get_default_dtype()
    torch.set_default_dtype(layout.dtype)
    try:
        model = build_model(config, 0, units, communicator, vocabulary)
    finally:
        torch.set_default_dtype(default)
    model.recompute = layout.activation_checkpointing
    return model


@dataclass(frozen=True)
class FakeGroup:
    """What `DistributedCommunicator` asks of a process group."""

    model_rank: ModelRank

    def rank(self) -> int:
        return self.model_rank.rank

    def size(self) -> int:
        return self.model_rank.size


class SilentCommunicator(DistributedCommunicator):
    """`DistributedCommunicator` with its buffers and without its communication."""

    def gather(self, part: Tensor) -> Tensor:
        parts = part.detach().contiguous().new_empty(self.group.size(), *part.shape)
        return parts.movedim(0, -2).flatten(-2)


class NoWork:
    def wait(self) -> None:
        pass


def no_collective(buffer: Tensor, **_: Any) -> NoWork:
    """In place of an all-reduce, which takes no memory of PyTorch's allocator."""
    return NoWork()


@contextmanager
def record_peaks(model: LanguageModel, live: LiveBytes) -> Iterator[list[int]]:
    """A list that gets the bytes after the layers' forward pass and then the peaks up to three moments of the backward
    pass: the gradients of the head's input, of the last layer's input and of the embedding.
    """
    peaks: list[int] = []

    def when_gradient_arrives(number: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if len(peaks) == number:  # with recomputation it may come twice
                peaks.append(live.take_peak())

        return arrived

    def into_head(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        peaks.append(live.current)
        inputs[0].register_hook(when_gradient_arrives(1))

    def into_last_layer(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        tree_leaves(inputs)[0].register_hook(when_gradient_arrives(2))  # the first of what a layer hands to the next

    def out_of_embedding(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(when_gradient_arrives(3))

    handles = [
        model.final_norm.register_forward_pre_hook(into_head),
        model.layers[-1].register_forward_pre_hook(into_last_layer),
        (model.position_embedding or model.token_embedding).register_forward_hook(out_of_embedding),
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
