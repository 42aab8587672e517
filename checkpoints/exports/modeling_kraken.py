"""Kraken (arXiv 2408.07802) and its two baselines, GPT-2 in standard and parallel form, for Hugging Face transformers.

This file travels in every export of kraken-train (Apache-2.0) and needs nothing but torch and transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It computes what kraken-train computes, from the same weights under the same names; sub-layers are stacked. What the
library builds upon is all here: its caches, its masks and its table of attention functions. To these the sub-layers of
a Kraken are more attention heads, `num_attention_heads` in all, so that a cache's first axis is the batch and beam
search can reorder it. That makes the base models fit for backends that bring an attention function of their own, such
as vLLM's Transformers backend: `AutoModel` is in `auto_map`, keyword arguments pass through all modules down to that
function, and `_supports_attention_backend` is set. There is no plan for tensor or pipeline parallelism.

Shapes: N sub-layers, B batch, T new tokens, S tokens seen so far, D hidden size, E width of the embedding (D unless the
model has an `embedding_size`), H heads of a sub-layer (of a layer in the baselines), G <= H key-value heads, K head
dimension, V vocabulary size.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.versions import require_version

require_version("transformers>=5.4", "This model's file builds on it: pip install -U transformers")
import transformers.initialization as init  # noqa: E402 (older versions have none)

# Of config.json and the weights; 3 added the settings of layers other than GPT-2's, 4 `ffn_reads_stream`, 5
# `embedding_size`.
FORMAT_VERSION = 5
INITIAL_STD = 0.02


class KrakenConfig(PretrainedConfig):
    """The settings of config.json. `architecture` is one of `LAYERS`.

    Each architecture has settings of its own, which its class in `LAYERS` declares: a Kraken has `num_sub_layers` with
    `heads_per_sub_layer` and `kv_heads_per_sub_layer` each, a baseline `num_heads` and `num_kv_heads`. Where the number
    of key-value heads is None it is that of the heads.
    """

    model_type = "kraken"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as the library declares it)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context_length",
    }

    def __init__(
        self,
        architecture: str = "kraken",
        num_layers: int = 2,
        hidden_size: int = 32,
        vocab_size: int = 256,
        context_length: int = 512,  # tokens
        norm: str = "layernorm",  # or rmsnorm
        norm_epsilon: float = 1e-5,
        ffn: str = "gelu",  # or swiglu
        ffn_hidden_size: int | None = None,  # None: as `intermediate_size` derives it
        positions: str = "learned",  # or rope
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        head_dim: int | None = None,  # None: hidden_size / heads
        tie_embeddings: bool = True,
        use_cache: bool = True,
        tie_word_embeddings: bool | None = None,  # the library's name of `tie_embeddings`
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(f"format_version={format_version}, and this file knows up to {FORMAT_VERSION}")
        if architecture not in LAYERS:
            raise ValueError(f"architecture={architecture} is not known; this file has {', '.join(LAYERS)}")
        self.architecture = architecture
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.ffn = ffn
        self.ffn_hidden_size = ffn_hidden_size
        self.positions = positions
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        self.tie_embeddings = tie_embeddings if tie_word_embeddings is None else tie_word_embeddings
        for name, default in LAYERS[architecture].settings.items():
            given = kwargs.pop(name, None)
            setattr(self, name, default if given is None else given)
        # A number in any case: vLLM reads `num_kv_heads` first and asks no further.
        setattr(self, self.layer_class.kv_heads_setting, self.kv_heads_per_stream)
        self.head_dim = head_dim or hidden_size // self.heads_per_stream
        self.use_cache = use_cache
        self.tie_word_embeddings = self.tie_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.format_version = format_version
        super().__init__(**kwargs)

    @property
    def layer_class(self) -> type[KrakenLayer] | type[GPTLayer]:
        return LAYERS[self.architecture]

    @property
    def is_stacked(self) -> bool:
        """Whether there are residual streams side by side, (N, B, T, D)."""
        return self.layer_class.streams_setting is not None

    @property
    def streams(self) -> int:
        """N in a Kraken, else 1."""
        setting = self.layer_class.streams_setting
        return 1 if setting is None else int(getattr(self, setting))

    @property
    def heads_per_stream(self) -> int:
        return int(getattr(self, self.layer_class.heads_setting))

    @property
    def kv_heads_per_stream(self) -> int:
        return int(getattr(self, self.layer_class.kv_heads_setting) or self.heads_per_stream)

    # Under the names by which caches and inference servers ask for them:

    @property
    def embedding_width(self) -> int:
        """Of the embeddings, and of what the head reads."""
        return int(getattr(self, "embedding_size", None) or self.hidden_size)

    @property
    def num_attention_heads(self) -> int:
        """Of all sub-layers of a layer together."""
        return self.streams * self.heads_per_stream

    @property
    def num_key_value_heads(self) -> int:
        return self.streams * self.kv_heads_per_stream

    @property
    def intermediate_size(self) -> int:
        """Of one sub-layer's FFN."""
        if self.ffn_hidden_size is not None:
            return int(self.ffn_hidden_size)
        width = int(self.ffn_multiplier * self.hidden_size)
        if self.ffn == "gelu":
            return width
        step = 64 if self.is_stacked else math.lcm(64, self.num_attention_heads)
        return max(1, round(2 * width / 3 / step)) * step


# ---------------------------------------------------------------------------------------------------------------
# Norms, rotary embeddings and non-linearities
# ---------------------------------------------------------------------------------------------------------------

NORMALIZE: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


class Norm(nn.Module):
    """LayerNorm without bias or RMSNorm, over the last axis of (..., D)."""

    def __init__(self, norm: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.normalize = NORMALIZE[norm]
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight.shape, self.weight, eps=self.epsilon)


Rotary = tuple[Tensor, Tensor]  # cosines and sines of the angles of each token, (B, T, K)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Positions (B or 1, T) -> what `rotate` takes; computed in float32 from the positions alone."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (B, heads, T, K), whose value pairs (j, j + K/2) are rotated."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def ffn_inner(x: Tensor, gate: nn.Module | None, up: nn.Module) -> Tensor:
    """(..., D) -> (..., inner width): GELU without a gate, SwiGLU with one."""
    return F.gelu(up(x), approximate="tanh") if gate is None else F.silu(gate(x)) * up(x)


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: KrakenAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Queries (B, heads, T, K) on keys and values (B, kv heads, S, K) -> mixed (B, T, heads, K), weights (.., T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=precise).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KrakenAttention(nn.Module, ABC):
    """The attention of a layer, of all its sub-layers at once; subclasses make the heads and join them again.

    vLLM's Transformers backend reads the source of `forward`, which must contain the one call of what comes out of the
    library's table of attention functions.
    """

    is_causal = True

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.heads_per_stream
        self.num_kv_heads = config.kv_heads_per_stream
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5

    @abstractmethod
    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input -> queries (B, N H, T, K), keys and values (B, N G, T, K)."""

    @abstractmethod
    def join_heads(self, mixed: Tensor) -> Tensor:
        """Mixed values (B, T, N, H K) -> the attention's output, of the shape of the layer's input."""

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        rotary: Rotary | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's input -> the attention's output of the same shape, and weights if the library returns them."""
        query, key, value = self.split_heads(x)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        batch, _, tokens, _ = query.shape
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, T, N H, K), but some backends flatten it
        if mixed.numel() != query.numel():
            raise ValueError(
                f"the attention function returned {mixed.numel() / query.numel():g} times the heads of the queries, as "
                "a server does that divides the heads among devices; this file computes all of them on one device, so "
                "serve it with a tensor parallel size of 1"
            )
        return self.join_heads(mixed.reshape(batch, tokens, self.config.streams, -1)), weights


# ---------------------------------------------------------------------------------------------------------------
# Kraken: stacked parts, all sub-layers as one product
# ---------------------------------------------------------------------------------------------------------------


class StackedLinear(nn.Module):
    """N independent bias-free linear maps, (N, B, T, in) -> (N, B, T, out)."""

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        n, batch, tokens, _ = x.shape
        product = torch.bmm(x.reshape(n, batch * tokens, -1), self.weight.transpose(1, 2))
        return product.view(n, batch, tokens, -1)


class EmbeddingMaps(StackedLinear):
    """A map from the embedding into each stream, (N, B, T, E) -> (N, B, T, D)."""

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__(count, in_features, out_features)
        self.initial_std = in_features**-0.5  # a stream has the variance of the embedding


class StackedNorm(nn.Module):
    """N norms, each with a gain of its own, over the last axis of (N, ..., size)."""

    def __init__(self, count: int, norm: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, size))
        self.normalize = NORMALIZE[norm]
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # With the sub-layers beside the channels the gains broadcast. torch.fx can trace all of it, which vLLM needs:
        # of an RMSNorm that it traces in part it sees no gain per sub-layer.
        normed = self.normalize(x, x.shape[-1:], eps=self.epsilon).transpose(0, -2)
        return (normed * self.weight).transpose(0, -2)


class StackedAttention(KrakenAttention):
    """MHA_i(LN1_i(x_i)) of all sub-layers, (N, B, T, D) -> (N, B, T, D)."""

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        count, width, epsilon = config.streams, config.hidden_size, config.norm_epsilon
        self.norm = StackedNorm(count, config.norm, width, epsilon)
        self.qkv = StackedLinear(count, width, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.q_norm = StackedNorm(count, "rmsnorm", self.head_dim, epsilon) if config.qk_norm else None
        self.k_norm = StackedNorm(count, "rmsnorm", self.head_dim, epsilon) if config.qk_norm else None
        self.out = StackedLinear(count, self.num_heads * self.head_dim, width)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, batch, tokens, _ = x.shape
        by_head = self.qkv(self.norm(x)).view(n, batch, tokens, -1, self.head_dim)
        query, key, value = by_head.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=3)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.permute(1, 0, 3, 2, 4).flatten(1, 2) for part in (query, key, value))
        return query, key, value

    def join_heads(self, mixed: Tensor) -> Tensor:
        joined: Tensor = self.out(mixed.permute(2, 0, 1, 3))
        return joined


class StackedFFN(nn.Module):
    """x_i + a_i + FFN_i(LN2_i(a_i + s)) of all sub-layers, each (N, B, T, D), but s (B, T, D).

    With `reads_stream` the FFN reads LN2_i(x_i + a_i + s).
    """

    def __init__(self, config: KrakenConfig, reads_stream: bool) -> None:
        super().__init__()
        self.reads_stream = reads_stream
        count, width, inner = config.streams, config.hidden_size, config.intermediate_size
        self.norm = StackedNorm(count, config.norm, width, config.norm_epsilon)
        self.gate = StackedLinear(count, width, inner) if config.ffn == "swiglu" else None
        self.up = StackedLinear(count, width, inner)
        self.down = StackedLinear(count, inner, width)

    def forward(self, streams: Tensor, attended: Tensor, total: Tensor) -> Tensor:
        residual = streams + attended
        own = residual if self.reads_stream else attended
        result: Tensor = residual + self.down(ffn_inner(self.norm(own + total), self.gate, self.up))
        return result


class KrakenLayer(GradientCheckpointingLayer):
    """a_i = MHA_i(LN1_i(x_i)); x_i = x_i + a_i + FFN_i(LN2_i(a_i + sum_j x_j)), (N, B, T, D) -> (N, B, T, D).

    With `ffn_reads_stream` the FFN reads LN2_i(x_i + a_i + sum_j x_j).
    """

    settings: ClassVar[dict[str, Any]] = {  # of this architecture, with their defaults
        "ffn_multiplier": 2, "num_sub_layers": 2, "heads_per_sub_layer": 2, "kv_heads_per_sub_layer": None,
        "ffn_reads_stream": False, "embedding_size": None,
    }  # fmt: skip
    streams_setting: ClassVar[str | None] = "num_sub_layers"
    has_conjunction: ClassVar[bool] = True
    heads_setting: ClassVar[str] = "heads_per_sub_layer"
    kv_heads_setting: ClassVar[str] = "kv_heads_per_sub_layer"

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        # Streams that start as the embedding are equal before the first layer, and it counts once, not N times.
        self.reads_embedding = layer_idx == 0 and getattr(config, "embedding_size", None) is None
        self.attention = StackedAttention(config, layer_idx)
        self.ffn = StackedFFN(config, getattr(config, "ffn_reads_stream", False))

    @staticmethod
    def begin(embedding: Tensor, config: KrakenConfig) -> Any:
        """(B, T, D) -> what the first layer reads."""
        return embedding.expand(config.streams, -1, -1, -1)

    @staticmethod
    def residual(state: Any) -> Tensor:
        """What a layer hands to the next one -> (B, T, D)."""
        total: Tensor = state.sum(dim=0)
        return total

    def forward(self, streams: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        total = streams[0] if self.reads_embedding else streams.sum(dim=0)
        attended, weights = self.attention(streams, **kwargs)
        return self.ffn(streams, attended, total), weights


class TrackLayer(KrakenLayer):
    """Parallel Track (arXiv 2602.07306): x_i = x_i + MHA_i(LN1_i x_i); x_i = x_i + FFN_i(LN2_i x_i), (N, B, T, D).

    Before it, every `sync_every` layers, y = y + sum_i (x_i - y), which is (B, T, D), and x_i = y.
    """

    settings: ClassVar[dict[str, Any]] = {
        "ffn_multiplier": 4, "num_tracks": 2, "sync_every": 4, "heads_per_track": 2, "kv_heads_per_track": None,
    }  # fmt: skip
    streams_setting: ClassVar[str | None] = "num_tracks"
    has_conjunction: ClassVar[bool] = False
    heads_setting: ClassVar[str] = "heads_per_track"
    kv_heads_setting: ClassVar[str] = "kv_heads_per_track"

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sums_before = layer_idx > 0 and layer_idx % config.sync_every == 0

    @staticmethod
    def begin(embedding: Tensor, config: KrakenConfig) -> Any:
        return embedding.expand(config.streams, -1, -1, -1), embedding

    @staticmethod
    def residual(state: Any) -> Tensor:
        tracks, begun = state
        total: Tensor = begun + (tracks - begun).sum(dim=0)
        return total

    def forward(  # type: ignore[override]
        self, state: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        tracks, begun = state
        if self.sums_before:
            begun = self.residual(state)
            tracks = begun.expand(len(tracks), -1, -1, -1)
        attended, weights = self.attention(tracks, **kwargs)
        return (self.ffn(tracks, attended, tracks), begun), weights


# ---------------------------------------------------------------------------------------------------------------
# The baselines
# ---------------------------------------------------------------------------------------------------------------


class QKVLinear(nn.Module):
    """(B, T, D) -> queries (B, H, T, K), keys and values (B, G, T, K), without bias.

    The weight is (G, (H / G + 2) K, D): each key-value head behind the heads that it serves.
    """

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        self.heads_per_group = config.heads_per_stream // config.kv_heads_per_stream
        self.head_dim = config.head_dim
        rows = (self.heads_per_group + 2) * self.head_dim
        self.weight = nn.Parameter(torch.empty(config.kv_heads_per_stream, rows, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, (len(self.weight), -1, self.head_dim))
        by_head = grouped.permute(0, 2, 3, 1, 4)  # (B, G, H / G + 2, T, K)
        query, key, value = by_head.split((self.heads_per_group, 1, 1), dim=2)
        return query.flatten(1, 2), key.squeeze(2), value.squeeze(2)


class GPTAttention(KrakenAttention):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.qkv = QKVLinear(config)
        self.q_norm = Norm("rmsnorm", self.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = Norm("rmsnorm", self.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def join_heads(self, mixed: Tensor) -> Tensor:
        joined: Tensor = self.out(mixed.squeeze(2))
        return joined


class GPTFFN(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(width, inner, bias=False) if config.ffn == "swiglu" else None
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(ffn_inner(x, self.gate, self.up))
        return result


class GPTLayer(GradientCheckpointingLayer):
    """A layer with one residual stream: what its architecture declares."""

    attention: GPTAttention
    ffn: GPTFFN

    settings: ClassVar[dict[str, Any]] = {"ffn_multiplier": 4, "num_heads": 4, "num_kv_heads": None}
    streams_setting: ClassVar[str | None] = None
    has_conjunction: ClassVar[bool] = False
    heads_setting: ClassVar[str] = "num_heads"
    kv_heads_setting: ClassVar[str] = "num_kv_heads"

    @staticmethod
    def begin(embedding: Tensor, config: KrakenConfig) -> Any:
        """(B, T, D) -> what the first layer reads."""
        return embedding

    @staticmethod
    def residual(state: Any) -> Tensor:
        """What a layer hands to the next one -> the residual stream (B, T, D)."""
        stream: Tensor = state
        return stream


class StandardLayer(GPTLayer):
    """x = x + MHA(LN1 x); x = x + FFN(LN2 x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = plain_norm(config)
        self.attention = GPTAttention(config, layer_idx)
        self.ffn_norm = plain_norm(config)
        self.ffn = GPTFFN(config)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(self.attention_norm(x), **kwargs)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), weights


class ParallelLayer(GPTLayer):
    """x = x + MHA(LN x) + FFN(LN x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = plain_norm(config)
        self.attention = GPTAttention(config, layer_idx)
        self.ffn = GPTFFN(config)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = self.norm(x)
        attended, weights = self.attention(normed, **kwargs)
        return x + (attended + self.ffn(normed)), weights


class LadderLayer(GPTLayer):
    """Ladder Residual (arXiv 2501.06589): a = MHA(LN1 x); f' = FFN(LN2 (x + f)); the next x is x + f + a, its f is f'.

    x is the residual stream without the output f of the FFN before, (B, T, D) each. In the first layers of a hybrid,
    which are standard, x has it.
    """

    settings: ClassVar[dict[str, Any]] = {**GPTLayer.settings, "ladder_layers": None}

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        ladders = config.num_layers if config.ladder_layers is None else config.ladder_layers
        self.is_standard = layer_idx < config.num_layers - ladders
        self.attention_norm = plain_norm(config)
        self.attention = GPTAttention(config, layer_idx)
        self.ffn_norm = plain_norm(config)
        self.ffn = GPTFFN(config)

    @staticmethod
    def begin(embedding: Tensor, config: KrakenConfig) -> Any:
        return embedding, torch.zeros_like(embedding)

    @staticmethod
    def residual(state: Any) -> Tensor:
        x, of_ffn = state
        stream: Tensor = x + of_ffn
        return stream

    def forward(self, state: tuple[Tensor, Tensor], **kwargs: Any) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        x, of_ffn = state
        if self.is_standard:
            x, of_ffn = x + of_ffn, torch.zeros_like(of_ffn)
        attended, weights = self.attention(self.attention_norm(x), **kwargs)
        x = x + of_ffn
        after = x + attended
        return (after, self.ffn(self.ffn_norm(after if self.is_standard else x))), weights


class FALLayer(GPTLayer):
    """FAL (arXiv 2510.14614): x = x + MHA(LN1 x) + FFN(LN2 x + f), where f is the normed output of the first attention.

    In the first layer a = MHA(LN1 x); x = x + a; f = LN_f a; x = x + FFN(LN2 x). x and f are (B, T, D).
    """

    def __init__(self, config: KrakenConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = plain_norm(config)
        self.attention = GPTAttention(config, layer_idx)
        self.output_norm = plain_norm(config) if layer_idx == 0 else None
        self.ffn_norm = plain_norm(config)
        self.ffn = GPTFFN(config)

    @staticmethod
    def begin(embedding: Tensor, config: KrakenConfig) -> Any:
        return embedding, torch.zeros_like(embedding)

    @staticmethod
    def residual(state: Any) -> Tensor:
        stream: Tensor = state[0]
        return stream

    def forward(self, state: tuple[Tensor, Tensor], **kwargs: Any) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        x, first = state
        attended, weights = self.attention(self.attention_norm(x), **kwargs)
        if self.output_norm is None:
            return (x + (attended + self.ffn(self.ffn_norm(x) + first)), first), weights
        x = x + attended
        return (x + self.ffn(self.ffn_norm(x)), self.output_norm(attended)), weights


def plain_norm(config: KrakenConfig) -> Norm:
    return Norm(config.norm, config.hidden_size, config.norm_epsilon)


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------


LAYERS: dict[str, type[KrakenLayer] | type[GPTLayer]] = {  # by architecture
    "kraken": KrakenLayer, "standard": StandardLayer, "parallel": ParallelLayer,
    "track": TrackLayer,
    "ladder": LadderLayer,
    "fal": FALLayer,
}  # fmt: skip


class KrakenModel(PreTrainedModel):
    """A Kraken or a baseline, as `config.architecture` says, without its head.

    One class serves all, since the library remembers one for each configuration class. The model with a head is a base
    model that has `lm_head`, not one that contains a base model, so that weights have the same names in both.
    """

    token_embedding: nn.Module
    layers: nn.ModuleList

    config_class = KrakenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__(config)
        width = config.embedding_width
        if config._attn_implementation == "vllm" and width != config.hidden_size and not config.tie_embeddings:
            raise ValueError(
                f"vLLM without a plugin makes a head of hidden_size={config.hidden_size} inputs, and this one has "
                f"embedding_size={width}; install the plugin of kraken-train, serving/vllm, which serves it"
            )
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.context_length, width) if learned else None
        # Not `config.layer_class`: vLLM sends configurations to its processes with a copy of their class, and of all
        # that the class uses, without the source.
        layer_class = LAYERS[config.architecture]
        self.embedding_maps = None
        if getattr(config, "embedding_size", None) is not None:
            self.embedding_maps = EmbeddingMaps(config.num_sub_layers, width, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(config.num_layers))
        if layer_class.has_conjunction:
            self.conjunction = StackedLinear(config.num_sub_layers, config.hidden_size, width)
        self.final_norm = Norm(config.norm, width, config.norm_epsilon)
        # Here, since the library initializes no layers of code that travels, only modules that have weights themselves.
        depth = config.num_layers * config.streams
        for layer in cast(Any, self.layers):
            for projection in (layer.attention.out, layer.ffn.down):
                projection.initial_std = INITIAL_STD / math.sqrt(2 * depth)
        self.gradient_checkpointing = False
        self.build_head(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def build_head(self, config: KrakenConfig) -> None:
        """A base model has none."""

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, T) -> `last_hidden_state` (B, T, E), which is what the head takes.

        `attention_mask` (B, S) has 0 for padding, on either side. `hidden_states` are the embedding, the sum over
        sub-layers after each layer but the last, and the last hidden state.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            self.require_tokens(input_ids)  # type: ignore[arg-type]
            inputs_embeds = self.token_embedding(input_ids)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = position_ids is not None
        if position_ids is None:
            position_ids = self.find_positions(inputs_embeds, attention_mask, past_key_values)
        # A caller that gives positions and keeps the cache itself, as inference servers do, checks their range.
        if not torch.compiler.is_compiling() and (not given or past_key_values is not None):
            self.require_context(position_ids, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        embedding, rotary = inputs_embeds, None
        if self.position_embedding is not None:
            embedding = embedding + self.position_embedding(position_ids).to(inputs_embeds.device)
        else:
            position_ids = position_ids.to(inputs_embeds.device)
            rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, inputs_embeds.dtype)

        layer_class = self.config.layer_class
        state = layer_class.begin(embedding, self.config)
        if self.embedding_maps is not None:
            state = self.embedding_maps(state)
        states, all_weights = [embedding], []
        for layer in self.layers:
            state, weights = layer(
                state,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                rotary=rotary,
                **kwargs,
            )
            if keep_states:
                states.append(layer_class.residual(state))
            all_weights.append(weights)
        joined = self.conjunction(state) if layer_class.has_conjunction else state
        last = self.final_norm(layer_class.residual(joined))
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], last) if keep_states else None,
            attentions=tuple(all_weights) if keep_weights and all_weights[0] is not None else None,
        )

    def require_tokens(self, ids: Tensor, on_gpu: bool = False) -> None:
        """Raises ValueError unless these are token ids (B, T) of the vocabulary, of one token at least.

        Ids on a GPU are checked only with `on_gpu`, since that makes the host wait for the GPU.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(
                f"input_ids has the shape {tuple(ids.shape)}, and the model reads rows of at least one token, (B, T); "
                "to begin a text, give the token that ends documents (tokenizer.eos_token_id)"
            )
        if torch.compiler.is_compiling() or not (on_gpu or ids.device.type == "cpu"):
            return
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise ValueError(
                f"input_ids has the token {int(wrong[0])}, and the model's vocabulary has the tokens 0 to "
                f"{self.config.vocab_size - 1}; use the tokenizer in the model's folder"
            )

    def find_positions(self, embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        """Positions (B or 1, T) of new tokens that follow those of the cache; padding does not count."""
        tokens = embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens:].to(embeds.device)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(tokens, device=embeds.device) + seen)[None]

    def require_context(self, positions: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> None:
        """Raises ValueError for positions beyond the context, which on a GPU would end the process.

        Checks them only where there are so many tokens, padding included, since that makes the host wait for the GPU.
        """
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        tokens = positions.shape[1] + (seen if isinstance(seen, int) else 0)  # a static cache's length is on the GPU
        if attention_mask is not None and attention_mask.dim() == 2:
            tokens = attention_mask.shape[1]
        if tokens > self.config.context_length and bool(positions.max() >= self.config.context_length):
            raise ValueError(
                f"{int(positions.max()) + 1} tokens are more than the model's context_length="
                f"{self.config.context_length}; shorten the text, for example by truncation=True of the tokenizer"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, 0.02), or what a module has as its `initial_std`; norms 1."""
        if isinstance(module, StackedNorm | Norm):
            init.ones_(module.weight)
        elif isinstance(module, StackedLinear | QKVLinear | nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=getattr(module, "initial_std", INITIAL_STD))


class ContextEnd(StoppingCriteria):
    """Ends a generation when the longest of its sequences fills the context.

    `uncounted` are the tokens of that sequence that `generate` has not in its ids, less the padding that it has.
    """

    def __init__(self, context_length: int, uncounted: int) -> None:
        self.context_length = context_length
        self.uncounted = uncounted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        full = input_ids.shape[1] + self.uncounted >= self.context_length
        if full:
            message = f"generation ends here: the model's context of {self.context_length} tokens is full"
            warnings.warn(message, stacklevel=2)
        return torch.full((len(input_ids),), full, device=input_ids.device)


class KrakenForCausalLM(KrakenModel, GenerationMixin):
    """With the head, which is tied to the embedding unless `tie_embeddings` is false, and the loss."""

    lm_head: nn.Module

    _tied_weights_keys = {"lm_head.weight": "token_embedding.weight"}  # noqa: RUF012

    def build_head(self, config: KrakenConfig) -> None:
        self.lm_head = nn.Linear(config.embedding_width, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library has it, but the prompts are checked first, and a sequence that fills the context is the end.

        Raises ValueError for prompts that are empty or not of the vocabulary.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        uncounted = 0
        if embeds is None and ids is not None:
            self.require_tokens(ids, on_gpu=True)
        elif embeds is not None and (ids is None or ids.shape[1] == 0):
            uncounted = embeds.shape[1]
        if mask is not None and mask.dim() == 2:
            lengths = mask.ne(0).sum(dim=-1).tolist()
            if 0 in lengths:
                raise ValueError(
                    f"row {lengths.index(0)} of attention_mask is padding only, so its prompt is empty; to begin a "
                    "text, give the token that ends documents (tokenizer.eos_token)"
                )
            uncounted -= mask.shape[1] - max(lengths)
        criteria = [*(stopping_criteria or []), ContextEnd(self.config.context_length, uncounted)]
        arguments = (inputs, generation_config, logits_processor, StoppingCriteriaList(criteria))
        return super().generate(*arguments, **kwargs)  # type: ignore[misc]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) -> logits (B, T, V), of the last `logits_to_keep` tokens only unless that is 0.

        With `labels` (B, T), which are the token ids and not shifted, the mean cross-entropy in nats; -100 does not
        count.
        """
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
