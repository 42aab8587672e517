"""The paper's two baselines, GPT-2 without biases: the standard Transformer and its parallel form.

    standard  x = x + MHA(LN1 x);  x = x + FFN(LN2 x)
    parallel  x = x + MHA(LN x) + FFN(LN x)

Over several ranks both are sharded as in Megatron-LM (arXiv 1909.08053, section 3): attention by heads, the FFN by its
inner width. The standard form waits for two all-reduces per layer, the parallel form for one, and as many backward.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kraken_train.model.gpt_config import GPTConfig
from kraken_train.model.layers import AttentionScope, Layer
from kraken_train.model.rotary import Rotary
from kraken_train.model.tensor_parallel import (
    FFN,
    AddNorm,
    Attention,
    LayerOfTwoNorms,
    TensorParallelModel,
    qk_gains,
)
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange


class GPTModel(TensorParallelModel):
    """Either form, by `config.architecture`."""

    config: GPTConfig

    def make_layer(self, index: int) -> Layer:
        return LAYERS[self.config.architecture](self.config, self.groups, self.communicator)

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, added = embedding, embedding.new_zeros(())
        all_gains = qk_gains(self.layers, self.config, self.communicator)
        for layer, scope, gains in zip(self.layers, scopes, all_gains, strict=True):
            x, added = layer(x, added, rotary, scope, gains)
        return x + added


# In both layers `added` is what the part before adds to x: the next norm makes the sum, so that compilation can fuse
# the two. Both are (B, T, D).


class StandardLayer(LayerOfTwoNorms):
    """x = x + MHA(LN1 x);  x = x + FFN(LN2 x)"""

    def forward(
        self, x: Tensor, added: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        added = self.communicator.all_reduce(self.run(self.attention, normed, rotary, scope, qk_gains))
        x, normed = self.ffn_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        return x, self.communicator.all_reduce(self.run(self.ffn, normed))


class ParallelLayer(Layer):
    """x = x + MHA(LN x) + FFN(LN x)"""

    def __init__(self, config: GPTConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.norm = AddNorm(config)
        self.attention = Attention(config, groups)
        self.ffn = FFN(config, groups)

    def forward(
        self, x: Tensor, added: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        attended = self.run(self.attention, normed, rotary, scope, qk_gains)
        return x, self.communicator.all_reduce(self.run(self.ffn, normed, attended))


LAYERS: dict[str, type[StandardLayer] | type[ParallelLayer]] = {"standard": StandardLayer, "parallel": ParallelLayer}
