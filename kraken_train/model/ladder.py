"""Ladder Residual: each part of a layer reads the residual stream from before the output of the part before it.

Source: Zhang et al., "Ladder-residual: parallelism-aware architecture for accelerating large model inference with
communication overlapping", ICML 2025, arXiv 2501.06589, section 3. Attention and FFN in turn are h_1, h_2, ...:

    ladder    x_(i+1) = x_i + h_(i+1)(LN x_(i-1)),  where x_(-1) = x_0 = e
    standard  x_(i+1) = x_i + h_(i+1)(LN x_i)       in the first layers of a hybrid

The all-reduce of h_i begins before h_(i+1) is computed and is needed only after it. A ladder layer after a standard one
does not read that layer's last FFN either, as in the authors' hybrid. The logits are those of the last x.

Ranks share the layers as in Megatron-LM, but gradients of the residual stream are other than there: each rank has its
part of the gradient, and the sums over the ranks are those of the gradients of h_i, so that they hide as well. What is
equal on all ranks, the gains of the norms, is copied to the ranks once for all layers.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.layers import AttentionScope, Layer
from kraken_train.model.rotary import Rotary
from kraken_train.model.tensor_parallel import (
    LayerOfTwoNorms,
    TensorParallelModel,
    gains_of_heads,
    last_sum,
    layer_gains,
    sum_of_ranks,
)


class LadderModel(TensorParallelModel):
    """See the module's formulas."""

    config: LadderConfig

    def make_layer(self, index: int) -> Layer:
        standard = self.config.num_layers - self.config.num_ladder_layers
        kind = StandardLayer if index < standard else LadderLayer
        return kind(self.config, self.groups, self.communicator)

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, added = self.communicator.copy_to_ranks(embedding), embedding.new_zeros(())
        part: Tensor | None = None
        all_gains = layer_gains(self.layers, self.communicator)
        for layer, scope, gains in zip(self.layers, scopes, all_gains, strict=True):
            x, added, part = layer(x, added, part, rotary, scope, gains)
        return last_sum(self.communicator, x + added, cast(Tensor, part))


# Between two layers the residual stream is x + added + part, all (B, T, D): `added` is the output of the attention,
# which the next norm adds, and `part` this rank's part of the output of the FFN, not summed yet; None before the first.
State = tuple[Tensor, Tensor, Tensor | None]


class LadderLayer(LayerOfTwoNorms):
    """a = MHA(LN1 (x - f)), f being the FFN before;  f = FFN(LN2 x);  x = x + a + f"""

    def forward(
        self,
        x: Tensor,
        added: Tensor,
        part: Tensor | None,
        rotary: Rotary | None,
        scope: AttentionScope | None,
        gains: Mapping[str, Tensor],
    ) -> State:
        pending = None if part is None else self.communicator.start_all_reduce(part[None])
        x, normed = self.attention_norm(x, added, gains["attention_norm"])
        attended = self.run(self.attention, normed, rotary, scope, gains_of_heads(gains))
        added = x.new_zeros(()) if pending is None else self.communicator.wait(pending)
        pending = self.communicator.start_all_reduce(attended[None])
        x, normed = self.ffn_norm(x, added, gains["ffn_norm"])
        part = self.run(self.ffn, normed)
        return x, self.communicator.wait(pending), part

    def residual(self, output: State) -> Tensor:
        x, added, part = output
        total = x + added
        return total if part is None else total + sum_of_ranks(self.communicator, part)


class StandardLayer(LadderLayer):
    """x = x + MHA(LN1 x);  x = x + FFN(LN2 x)"""

    def forward(
        self,
        x: Tensor,
        added: Tensor,
        part: Tensor | None,
        rotary: Rotary | None,
        scope: AttentionScope | None,
        gains: Mapping[str, Tensor],
    ) -> State:
        if part is not None:
            x, added = x + added, sum_of_ranks(self.communicator, part)
        x, normed = self.attention_norm(x, added, gains["attention_norm"])
        attended = self.run(self.attention, normed, rotary, scope, gains_of_heads(gains))
        x, normed = self.ffn_norm(x, sum_of_ranks(self.communicator, attended), gains["ffn_norm"])
        return x, x.new_zeros(()), self.run(self.ffn, normed)
