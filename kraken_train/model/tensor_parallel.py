"""Models with one residual stream, equal on all ranks, whose layers are shared as in Megatron-LM, and their parts.

Source: arXiv 1909.08053, section 3: attention is shared by heads, the FFN by its inner width.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.initialization import initialize
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import AttentionScope, Layer, Norm, causal_attention, ffn_inner
from kraken_train.model.rotary import Rotary, rotate
from kraken_train.model.tensor_parallel_config import TensorParallelConfig
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units
from kraken_train.parallel.tensor_parallel import ColumnParallelLinear, QKVLinear, RowParallelLinear
from kraken_train.parallel.weight_role import WeightRole, weight_role


class TensorParallelModel(LanguageModel):
    """A subclass makes the layers and defines `hidden`.

    `groups` says which key-value heads are here (default: all), and with them which heads and which part of the FFN;
    `vocabulary`, `communicator` and `seed` as in `KrakenModel`.
    """

    def __init__(
        self,
        config: TensorParallelConfig,
        groups: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.groups = groups or all_units(config.kv_heads)
        self.layers = nn.ModuleList(self.make_layer(index) for index in range(config.num_layers))  # type: ignore[assignment]
        initialize(self, seed, residual_depth=config.num_layers)

    def make_layer(self, index: int) -> Layer:
        """Layer `index`, counted from 0."""
        raise TypeError(f"{type(self).__name__} does not define make_layer()")

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return 1, self.groups.count, self.config.head_size


def qk_gains(layers: Sequence[Layer], config: ModelConfig, communicator: Communicator) -> Sequence[Tensor | None]:
    """Gains of the norms of queries and keys, (2, K), of each layer; None where there are no such norms.

    All ranks have the same ones, for different heads. Copied together, they take one sum of gradients a model.
    """
    if not config.qk_norm:
        return [None] * len(layers)
    gains = [norm.weight for layer in layers for norm in (layer.attention.q_norm, layer.attention.k_norm)]  # type: ignore[union-attr]
    copied = communicator.copy_to_ranks(torch.stack(cast(list[Tensor], gains)))
    return cast(Sequence[Tensor], copied.unflatten(0, (-1, 2)).unbind())


# Where each rank has its part of the gradient of the residual stream, a sum of `start_all_reduce` and `wait` is one of
# gradients as well, and these are the other operations on it.


def sum_of_ranks(communicator: Communicator, part: Tensor) -> Tensor:
    """This rank's part of an output (B, T, D) -> the sum over the ranks, for which it waits, as for its gradient's."""
    return communicator.wait(communicator.start_all_reduce(part[None]))


def last_sum(communicator: Communicator, x: Tensor, part: Tensor) -> Tensor:
    """x, equal on all ranks, and their parts (B, T, D) -> x + the sum of the parts, whose gradient all ranks have.

    The first rank adds x, so that the gradient of x is a part on each rank, zero on the others.
    """
    place = communicator.model_rank
    return communicator.all_reduce(part + (x if place.size == 1 else x * float(place.rank == 0)))


def layer_gains(layers: Sequence[Layer], communicator: Communicator) -> list[dict[str, Tensor]]:
    """Gains of all norms of each layer, by the name of the norm, as copied to the ranks.

    All together they take one sum of gradients a model.
    """
    norms = [
        {name: module for name, module in layer.named_modules() if weight_role(module) is WeightRole.NORM}
        for layer in layers
    ]
    gains = [cast(Tensor, module.weight) for of_layer in norms for module in of_layer.values()]
    copied = iter(communicator.copy_to_ranks(torch.cat(gains)).split([len(gain) for gain in gains]))
    return [{name: next(copied) for name in of_layer} for of_layer in norms]


def gains_of_heads(gains: Mapping[str, Tensor]) -> Tensor | None:
    """Those of queries and keys in a layer's, (2, K); None where it has none."""
    if "attention.q_norm" not in gains:
        return None
    return torch.stack([gains["attention.q_norm"], gains["attention.k_norm"]])


class AddNorm(Norm):
    """x and what is added to it, (B, T, D) each -> (x + added, norm(x + added)).

    The gain is the weight, or `gain`, which is what ranks have copied of it.
    """

    def forward(self, x: Tensor, added: Tensor, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x + added
        return total, self.normalize(total, self.weight.shape, self.weight if gain is None else gain, eps=self.epsilon)


class QKNorm(nn.Module):
    """RMSNorm over the head dimension, (..., K); the gain, for all heads, is its weight by way of `qk_gains`."""

    weight_role = WeightRole.NORM

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.head_size))
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, eps=self.epsilon)


class Attention(nn.Module):
    """The heads here, (B, T, D) -> their part of (B, T, D)."""

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        heads_per_group = config.heads // config.kv_heads
        self.qkv = QKVLinear(config.hidden_size, groups, heads_per_group, config.head_size)
        self.q_norm = QKNorm(config) if config.qk_norm else None
        self.k_norm = QKNorm(config) if config.qk_norm else None
        self.out = RowParallelLinear(groups.in_units_of(heads_per_group * config.head_size), config.hidden_size)

    def forward(
        self, x: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> Tensor:
        query, key, value = self.qkv(x)
        if qk_gains is not None and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query, qk_gains[0]), self.k_norm(key, qk_gains[1])
        if rotary is not None:
            query, key = (rotate(part, rotary, heads_axis=-3) for part in (query, key))
        attended: Tensor = self.out(causal_attention(query, key, value, scope))
        return attended


class FFN(nn.Module):
    """The inner columns that go with the heads here, (B, T, D) -> their part of (B, T, D).

    In the parallel form that of the attention, `attended`, is added.
    """

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        inner = groups.in_units_of(config.ffn_size // config.kv_heads)
        self.gate = ColumnParallelLinear(config.hidden_size, inner) if config.ffn == "swiglu" else None
        self.up = ColumnParallelLinear(config.hidden_size, inner)
        self.down = RowParallelLinear(inner, config.hidden_size)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        part: Tensor = self.down(ffn_inner(x, self.gate, self.up))
        return part if attended is None else attended + part


class LayerOfTwoNorms(Layer):
    """What layers have whose attention and FFN each have a norm of their own; subclasses define `forward`."""

    def __init__(self, config: TensorParallelConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.attention_norm = AddNorm(config)
        self.attention = Attention(config, groups)
        self.ffn_norm = AddNorm(config)
        self.ffn = FFN(config, groups)
