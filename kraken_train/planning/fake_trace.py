"""One micro-batch on one device, rehearsed: the real model computes forward and backward on tensors without memory.

PyTorch's fake tensors have shapes, types and lifetimes but no data, so counting the living ones gives what autograd
keeps and what each operation needs, for the code as it is and for any size; nothing is a formula that could fall
behind the model. Three and four layers are rehearsed; each further one adds what the fourth does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kraken_train.model.config import ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.live_bytes import LiveBytes

SHALLOW, DEEP = 3, 4  # layers; with fewer, the largest sums fall elsewhere


@dataclass(frozen=True)
class Rehearsal:
    """Bytes beside weights and optimizer state; all are linear in the number of layers.

    `kept` is what layers and embedding leave for the backward pass. The others are the largest sums of four stretches
    of time: forward with the loss and its backward pass, the last layer's backward pass, that of the other layers, and
    the embedding's.
    """

    kept: int
    loss: int
    last_layer: int
    layers: int
    embedding: int

    @classmethod
    def through(cls, shallow: Rehearsal, deep: Rehearsal, num_layers: int) -> Rehearsal:
        """The line through those of SHALLOW and DEEP layers."""
        more = (num_layers - SHALLOW) / (DEEP - SHALLOW)
        ends = zip(astuple(shallow), astuple(deep), strict=True)
        return cls(*(round(first + more * (second - first)) for first, second in ends))


def rehearse(config: ModelConfig, layout: TrainingLayout) -> Rehearsal:
    """A micro-batch of full length on the first device of a model copy.

    Complete gradients take no place here: they are added to those of the micro-batch before, or copied into a bucket,
    which both count elsewhere. Only at stage 1 and without accumulation do they appear and stay.
    """
    treat: Treatment | None = add_to_sum if layout.keeps_accumulator else move_away
    if layout.zero_stage == 1 and layout.accumulation_steps == 1:
        treat = None
    alike = replace(layout, data_parallel_size=1, zero_stage=1, accumulation_steps=1)  # what matters no further
    if config.num_layers <= DEEP:
        return rehearse_all(config, alike, treat)
    shallow, deep = (rehearse_all(config.replace(num_layers=depth), alike, treat) for depth in (SHALLOW, DEEP))
    return Rehearsal.through(shallow, deep, config.num_layers)


Treatment = Callable[[Tensor], None]  # of a parameter whose gradient is complete


def add_to_sum(parameter: Tensor) -> None:
    """BF16_Optimizer makes an fp32 copy to add it to the sum."""
    parameter.grad.to(torch.float32)  # type: ignore[union-attr]
    parameter.grad = None


def move_away(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=1024)
def rehearse_all(config: ModelConfig, layout: TrainingLayout, treat: Treatment | None) -> Rehearsal:
    with FakeTensorMode():
        model = fake_model(config, layout)
        if treat is not None:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(treat)
        ids = torch.zeros(layout.micro_batch_size, config.context_length, dtype=torch.long)
        with LiveBytes(model.parameters()) as live, stretches(model, live) as ends:
            model.loss(ids, ids).backward()
            ends.append(live.take_peak())
    return Rehearsal(*ends)


def fake_model(config: ModelConfig, layout: TrainingLayout) -> LanguageModel:
    """The share of the first device, whose weights are not counted."""
    model_rank = ModelRank(0, layout.sub_layer_parallel_size)
    communicator: Communicator = LocalCommunicator()
    if model_rank.size > 1:
        communicator = SilentCommunicator(FakeGroup(model_rank), collective=begin_nothing)  # type: ignore[arg-type]
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
    """What the exchange asks of a process group."""

    model_rank: ModelRank

    def rank(self) -> int:
        return self.model_rank.rank

    def size(self) -> int:
        return self.model_rank.size


class SilentCommunicator(DistributedCommunicator):
    """All of the exchange but the communication, whose buffers are its own."""

    def gather(self, part: Tensor) -> Tensor:
        parts = part.detach().contiguous().new_empty(self.group.size(), *part.shape)
        return parts.movedim(0, -2).flatten(-2)


class NoWork:
    def wait(self) -> None:
        pass


def begin_nothing(buffer: Tensor, **_: Any) -> NoWork:
    """An all-reduce in place takes no memory of PyTorch's."""
    return NoWork()


@contextmanager
def stretches(model: LanguageModel, live: LiveBytes) -> Iterator[list[int]]:
    """Bytes at the end of the layers' forward pass, then the peaks up to three moments of the backward pass."""
    ends: list[int] = []

    def when_gradient_arrives(number: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if len(ends) == number:  # with recomputation it may come twice
                ends.append(live.take_peak())

        return arrived

    def into_head(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        ends.append(live.current)
        inputs[0].register_hook(when_gradient_arrives(1))

    def into_last_layer(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].register_hook(when_gradient_arrives(2))

    def out_of_embedding(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(when_gradient_arrives(3))

    handles = [
        model.final_norm.register_forward_pre_hook(into_head),
        model.layers[-1].register_forward_pre_hook(into_last_layer),
        model.position_embedding.register_forward_hook(out_of_embedding),
    ]
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()
