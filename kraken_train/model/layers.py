"""What layers are made of. A Kraken's weights are stacked over sub-layers, which a rank then runs as one product.

Shapes: n sub-layers here, B batch, T tokens, S tokens seen so far (cache included), D hidden size, F FFN size,
H heads of a sub-layer, G <= H key-value heads, each for H / G heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.rotary import Rotary, rotate
from kraken_train.model.weight_kind import WeightKind
from kraken_train.parallel.sharding import ShardedDim, UnitRange
from kraken_train.parallel.weight_role import WeightRole

if TYPE_CHECKING:
    from kraken_train.kernels.fused import FusedKernels

# Functions of PyTorch: x, the shape of the last axes, the gain, eps.
NORMALIZE: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


class AttentionScope(Protocol):
    """What the queries of a layer attend to, where that is not simply what comes before them.

    During generation it is the layer's cache of keys and values; with documents apart, see `model.documents`, it is
    each token's own document.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A cache adds the keys and values of T new tokens, (rows, G, T, K) each, and attends to all tokens so far.

        The queries (rows, H, T, K) are those of the new tokens, each of which sees itself and what came before it;
        the result is (rows, H, T, K).
        """
        ...


class Layer(nn.Module):
    """A layer of a model: `forward` states its formula and communicates between its parts.

    The parts are its children. They communicate nothing, so that each is compiled and computed again on its own.
    """

    recompute = False
    observer: Callable[[str, Tensor], None] | None = None  # gets what `show` shows

    def run(self, part: nn.Module, *inputs: Any) -> Any:
        """A part's output; with `recompute` its activations are not kept but computed again in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)

    def show(self, **values: Tensor) -> None:
        """Let the observer see intermediate results, (B, T, D) and equal on all ranks, or (n, B, T, D)."""
        if self.observer is not None:
            for name, value in values.items():
                self.observer(name, value)

    def residual(self, output: Any) -> Tensor:
        """What `forward` returned -> the residual stream after the layer, (B, T, D) and equal on all ranks, or the
        streams here, (n, B, T, D). A collective where the ranks hold parts of the stream.
        """
        x, added = output
        total: Tensor = x + added
        return total


class Norm(nn.Module):
    """LayerNorm without bias or RMSNorm, as `config.norm` says, over the last axis, of `size` (default: D) values."""

    weight_role = WeightRole.NORM

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size or config.hidden_size))
        self.normalize = NORMALIZE[config.norm]
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight.shape, self.weight, eps=self.epsilon)


class FinalNorm(Norm):
    """The norm before the head."""

    weight_kind = WeightKind.FINAL_NORM

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.embedding_width)


class StackedLinear(nn.Module):
    """n independent bias-free linear maps, (n, B, T, in) -> (n, B, T, out), as one batched product.

    `fused` are the rows of each of the matrices that the weight of a sub-layer consists of, where these are several.
    """

    weight_role = WeightRole.STACKED_MATRIX

    def __init__(self, units: UnitRange, in_features: int, out_features: int, fused: Sequence[int] = ()) -> None:
        super().__init__()
        self.sharded_dim = ShardedDim(units, axis=0)
        self.fused = list(fused) or [out_features]
        self.weight = nn.Parameter(torch.empty(units.count, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        n, batch, tokens, _ = x.shape
        if n == 1:  # an ordinary product, for which the libraries choose among more kernels
            return F.linear(x, self.weight[0])
        product = torch.bmm(x.reshape(n, batch * tokens, -1), self.weight.transpose(1, 2))
        return product.view(n, batch, tokens, -1)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """See `kraken_train.parallel.matrices`."""
        return [matrix for of_sub_layer in weight for matrix in of_sub_layer.split(self.fused)]


class StackedNorm(nn.Module):
    """n norms without bias, each with a gain of its own, over the last axis of (n, ..., size)."""

    weight_role = WeightRole.NORM

    def __init__(self, units: UnitRange, size: int, norm: str, epsilon: float) -> None:
        super().__init__()
        self.sharded_dim = ShardedDim(units, axis=0)
        self.weight = nn.Parameter(torch.empty(units.count, size))
        self.normalize = NORMALIZE[norm]
        self.is_centered = norm == "layernorm"
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        between = (1,) * (x.dim() - 2)
        return self.normalize(x, x.shape[-1:], eps=self.epsilon) * self.weight.view(len(self.weight), *between, -1)


class StackedAttention(nn.Module):
    """MHA_i(LN1_i(x_i)) of all sub-layers here, (n, B, T, D) -> (n, B, T, D)."""

    kernels: type[FusedKernels] | None = None

    def __init__(self, units: UnitRange, config: ModelConfig) -> None:
        super().__init__()
        self.head_counts = (config.heads, config.kv_heads, config.kv_heads)  # of queries, keys, values
        self.head_size = config.head_size
        width, epsilon = config.hidden_size, config.norm_epsilon
        self.norm = StackedNorm(units, width, config.norm, epsilon)
        rows = [count * self.head_size for count in self.head_counts]
        self.qkv = StackedLinear(units, width, sum(rows), fused=rows)
        self.q_norm = StackedNorm(units, self.head_size, "rmsnorm", epsilon) if config.qk_norm else None
        self.k_norm = StackedNorm(units, self.head_size, "rmsnorm", epsilon) if config.qk_norm else None
        self.out = StackedLinear(units, config.query_size, width)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, scope: AttentionScope | None = None, is_normed: bool = False
    ) -> Tensor:
        """`is_normed`: x is LN1_i(x_i) already."""
        n, batch, tokens, _ = x.shape
        by_head = self.qkv(x if is_normed else self.norm(x)).view(n, batch, tokens, -1, self.head_size)
        if self.kernels is None:
            query, key, value = by_head.split(self.head_counts, dim=3)
        elif rotary is None or self.q_norm is not None:
            query, key, value = self.kernels.split_heads(by_head, self.head_counts)
        else:
            query, key, value = self.kernels.split_heads(by_head, self.head_counts, *rotary)
            rotary = None  # they are rotated
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = (rotate(part, rotary, heads_axis=-2) for part in (query, key))
        # To attention, sub-layers are more rows of the batch.
        query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
        attended: Tensor = self.out(causal_attention(query, key, value, scope).view(n, batch, tokens, -1))
        return attended


class Ahead(NamedTuple):
    """What an FFN needs to begin the next layer, in one kernel with its own sum.

    It then returns x_i (n, B, T, D), their sum (B, T, D) in `sum_dtype`, and LN1_i(x_i) with the next layer's `gain`.
    """

    gain: Tensor  # (n, D)
    sum_dtype: torch.dtype


class StackedFFN(nn.Module):
    """x_i + a_i + FFN_i(LN2_i(a_i + s)) of all sub-layers here, each (n, B, T, D), but s (B, T, D).

    With `reads_stream` the FFN reads LN2_i(x_i + a_i + s). The sums belong to it so that compilation can fuse them with
    the norm and with each other.
    """

    kernels: type[FusedKernels] | None = None

    def __init__(self, units: UnitRange, config: ModelConfig, reads_stream: bool = False) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_size
        self.reads_stream = reads_stream
        self.norm = StackedNorm(units, width, config.norm, config.norm_epsilon)
        self.gate = StackedLinear(units, width, inner) if config.ffn == "swiglu" else None
        self.up = StackedLinear(units, width, inner)
        self.down = StackedLinear(units, inner, width)

    def forward(self, streams: Tensor, attended: Tensor, total: Tensor, ahead: Ahead | None = None) -> Any:
        """With `ahead`, which needs `kernels`, it begins the next layer: see `Ahead`."""
        if self.kernels is None:
            # No name holds the sum or the norm, which nothing needs any more.
            inner = ffn_inner(
                self.norm((streams + attended if self.reads_stream else attended) + total), self.gate, self.up
            )
            return streams + attended + self.down(inner)
        norm = self.norm
        streams, normed = self.kernels.ffn_entry(
            streams, attended, total, norm.weight, norm.epsilon, norm.is_centered, self.reads_stream
        )
        gate = None if self.gate is None else self.gate(normed)
        added = self.kernels.activated_product(gate, self.up(normed), self.down.weight)
        if ahead is None:
            return streams + added
        return self.kernels.layer_entry(streams, added, ahead.gain, norm.epsilon, norm.is_centered, ahead.sum_dtype)


def ffn_inner(x: Tensor, gate: nn.Module | None, up: nn.Module) -> Tensor:
    """(..., D) -> (..., F): GELU where there is no gate, else SwiGLU (arXiv 2002.05202)."""
    # No name holds a result that is not needed any more, since these are the largest of a layer.
    return F.gelu(up(x), approximate="tanh") if gate is None else F.silu(gate(x)) * up(x)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope | None = None) -> Tensor:
    """Causal attention of queries (rows, H, T, K) to keys and values (rows, G, T, K) -> (rows, T, H K).

    Head h attends to key-value head h // (H / G). With a cache the T new tokens come after those that it holds and
    attend to them too.
    """
    mixed = attend_causally(query, key, value) if scope is None else scope.attend(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Queries (rows, H, T, K), keys and values (rows, G, T, K) of the same tokens -> (rows, H, T, K).

    A `bias` (rows, 1, T, T), which is added to the scores, takes the place of the causal mask.
    """
    heads_per_group = query.shape[1] // key.shape[1]
    if heads_per_group > 1 and query.dtype not in (torch.bfloat16, torch.float16):
        # Fused kernels share key-value heads in 16 bits only; without one, all scores would be held at once.
        key, value = (shared.repeat_interleave(heads_per_group, dim=1) for shared in (key, value))
        heads_per_group = 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, enable_gqa=heads_per_group > 1
    )
