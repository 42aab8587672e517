"""Kraken: every layer is N independent, narrower sub-layers whose outputs are summed once per layer.

Source: Prabhakar, Zhang, Wentzlaff, "Kraken: Inherently Parallel Transformers For Efficient Multi-Device
Inference", NeurIPS 2024, arXiv 2408.07802, section 3.

    layer 1      a_i = MHA_i(LN1_i(e));    x_i = e + a_i + FFN_i(LN2_i(e + a_i))
    layer l > 1  s = sum_j x_j;  a_i = MHA_i(LN1_i(x_i));  x_i = x_i + a_i + FFN_i(LN2_i(a_i + s))
    conjunction  y = sum_i W_i x_i;  logits = LN(y) E^T

The sum s is asked for before the attention and needed only after it, so its AllReduce hides behind the attention.

Shapes: N sub-layers in all, n of them here, B batch, T tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kraken_train.cross_entropy import IGNORED
from kraken_train.exchange import Exchange, LocalExchange
from kraken_train.initialization import initialize
from kraken_train.layers import KeyValueStore, StackedAttention, StackedFFN, StackedLinear
from kraken_train.model_config import KrakenConfig, ModelConfig
from kraken_train.placement import Placement, place_all
from kraken_train.vocabulary import Vocabulary


class LanguageModel(nn.Module):
    """What Kraken and the baselines share: embeddings in, the tied head and the loss out.

    A subclass turns the embedding into the last hidden state, (B, T, D) -> (B, T, D), layer by layer; the parts that
    its `layers` consist of communicate nothing.
    """

    layers: Sequence[Any]

    def __init__(self, config: ModelConfig, exchange: Exchange, vocabulary: Placement | None) -> None:
        super().__init__()
        self.exchange = exchange
        self.context_length = config.context_length
        self.token_embedding = Vocabulary(vocabulary or place_all(config.vocab_size), config.hidden_size, exchange)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.final_norm = nn.LayerNorm(config.hidden_size, config.norm_epsilon, bias=False)
        self.recompute = False

    def hidden(self, embedding: Tensor, caches: Sequence[KeyValueStore | None]) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define hidden()")

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Of a layer's keys here: rows for each sequence, key-value heads G, head dimension K."""
        raise TypeError(f"{type(self).__name__} does not define cache_shape")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(
        self, input_ids: Tensor, caches: Sequence[KeyValueStore] | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V).

        With `caches` (one per layer) the tokens continue those that the caches hold; `positions`, (T,) or (B, T) and
        below `context_length`, then says where they stand, and by default they are the first ones. Raises ValueError
        where these are more than `context_length`.
        """
        return self.token_embedding.logits(self.last_hidden(input_ids, caches, positions))

    def last_hidden(
        self, input_ids: Tensor, caches: Sequence[KeyValueStore] | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> what the head sees, (B, T, D)."""
        if positions is None:
            tokens = input_ids.shape[1]
            if tokens > self.context_length:
                raise ValueError(f"{tokens} tokens are more than context_length={self.context_length}")
            positions = torch.arange(tokens, device=input_ids.device)
        embedding = self.token_embedding(input_ids) + self.position_embedding(positions)
        return self.final_norm(self.hidden(embedding, caches if caches is not None else [None] * self.num_layers))

    def token_losses(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies in nats of `targets` (B, T) after `input_ids` (B, T), of at least float32, without gradients.

        Targets of -100 do not count and have 0.
        """
        return self.token_embedding.token_losses(self.last_hidden(input_ids), targets)

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean of `token_losses` over the targets that count, a scalar."""
        return self.token_embedding.loss(self.last_hidden(input_ids), targets) / (targets != IGNORED).sum()

    def run_part(self, part: nn.Module, *inputs: Any) -> Tensor:
        """A part of a layer; with `recompute` its activations are not kept but computed again in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)

    def compile_parts(self) -> None:
        """Compile the parts of the layers, once for all of them, and what the loss does to the logits."""
        self.token_embedding.cross_entropy.compile()
        for layer in self.layers:
            for part in layer.children():
                part.compile()


class KrakenModel(LanguageModel):
    """See the module's formulas.

    `placement` says which sub-layers are here and `vocabulary` which rows of the embedding (default: all), `exchange`
    how they are summed (default: locally). The initial weights are drawn from `seed` and depend on none of these.
    """

    def __init__(
        self,
        config: KrakenConfig,
        placement: Placement | None = None,
        exchange: Exchange | None = None,
        seed: int = 0,
        vocabulary: Placement | None = None,
    ) -> None:
        super().__init__(config, exchange or LocalExchange(), vocabulary)
        self.config = config
        self.placement = placement or place_all(config.num_sub_layers)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            KrakenLayer(config, self.placement) for _ in range(config.num_layers)
        )
        self.conjunction = StackedLinear(self.placement, config.hidden_size, config.hidden_size)
        initialize(self, seed, residual_depth=config.num_layers * config.num_sub_layers)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.placement.count, self.config.kv_heads, self.config.head_dim

    def hidden(self, embedding: Tensor, caches: Sequence[KeyValueStore | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        embedding = self.exchange.broadcast(embedding)
        # x_i, (n, B, T, D): laid out as in every later layer, so that one compilation serves all.
        streams = embedding.expand(self.placement.count, -1, -1, -1).contiguous()
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            # All streams start as the embedding, and it counts once, not N times: layer 1 has no sum to wait for.
            pending = self.exchange.start(streams) if index > 0 else None
            attended = self.run_part(layer.attention, streams, cache)
            total = self.exchange.finish(pending) if index > 0 else embedding  # s, (B, T, D)
            streams = self.run_part(layer.ffn, streams, attended, total)
        return self.exchange.reduce(self.conjunction(streams).sum(dim=0))


class KrakenLayer(nn.Module):
    """The two parts of a layer; `KrakenModel.hidden` puts the exchange between them."""

    def __init__(self, config: KrakenConfig, placement: Placement) -> None:
        super().__init__()
        self.attention = StackedAttention(
            placement, config.hidden_size, config.heads_per_sub_layer, config.kv_heads, config.norm_epsilon
        )
        self.ffn = StackedFFN(placement, config.hidden_size, config.ffn_size, config.norm_epsilon)
