"""FAL, First Attentions Last: every FFN reads the output of the first layer's attention in place of its own layer's.

Source: "First Attentions Last: Better Exploiting First Attentions for Efficient Transformer Training", NeurIPS 2025,
arXiv 2510.14614. FAL redirects the output of the first attention to the inputs of the FFNs of the following layers and
removes the connection from attention to FFN within them, so that both are computed side by side:

    layer 1      a = MHA(LN1 e);  x = e + a;  f = LN_f a;  x = x + FFN(LN2 x)
    layer l > 1  x = x + MHA(LN1 x) + FFN(LN2 x + f)

Our choices where we had the paper's summary alone: the first layer stays a standard one; the first attention's output
has a norm of its own, LN_f, computed once, and is added after the norm of each FFN, whose scale does not change with
the depth; there is no factor. FAL+, which keeps the connection within layers, is not here.

Ranks share the layers as in Megatron-LM, and gradients of the residual stream as in Ladder Residual (see there): each
rank has its part. So a layer has one sum over the ranks in each direction, and the first layer a second one.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kraken_train.model.fal_config import FALConfig
from kraken_train.model.layers import AttentionScope, Layer
from kraken_train.model.rotary import Rotary
from kraken_train.model.tensor_parallel import (
    AddNorm,
    LayerOfTwoNorms,
    TensorParallelModel,
    gains_of_heads,
    last_sum,
    layer_gains,
    sum_of_ranks,
)
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange


class FALModel(TensorParallelModel):
    """See the module's formulas."""

    config: FALConfig

    def make_layer(self, index: int) -> Layer:
        kind = FirstLayer if index == 0 else LaterLayer
        return kind(self.config, self.groups, self.communicator)

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = self.communicator.copy_to_ranks(embedding)
        part = first = x.new_zeros(())
        all_gains = layer_gains(self.layers, self.communicator)
        for layer, scope, gains in zip(self.layers, scopes, all_gains, strict=True):
            x, part, first = layer(x, part, first, rotary, scope, gains)
        return last_sum(self.communicator, x, part)


# Between two layers the residual stream is x + part, where `part` is this rank's part of what the layer adds and not
# summed yet; `first` is the normed output of the first attention. All are (B, T, D).
State = tuple[Tensor, Tensor, Tensor]


class FALLayer(LayerOfTwoNorms):
    """What all layers have; subclasses define `forward`."""

    def residual(self, output: State) -> Tensor:
        x, part, _ = output
        return x + sum_of_ranks(self.communicator, part)


class FirstLayer(FALLayer):
    """a = MHA(LN1 e);  x = e + a;  f = LN_f a;  x = x + FFN(LN2 x)"""

    def __init__(self, config: FALConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__(config, groups, communicator)
        self.output_norm = AddNorm(config)

    def forward(
        self,
        x: Tensor,
        part: Tensor,
        first: Tensor,
        rotary: Rotary | None,
        scope: AttentionScope | None,
        gains: Mapping[str, Tensor],
    ) -> State:
        """`part` and `first` are zero."""
        x, normed = self.attention_norm(x, part, gains["attention_norm"])
        attended = self.run(self.attention, normed, rotary, scope, gains_of_heads(gains))
        added = sum_of_ranks(self.communicator, attended)
        _, first = self.output_norm(added, first, gains["output_norm"])
        x, normed = self.ffn_norm(x, added, gains["ffn_norm"])
        return x, self.run(self.ffn, normed), first


class LaterLayer(FALLayer):
    """x = x + MHA(LN1 x) + FFN(LN2 x + f)"""

    def forward(
        self,
        x: Tensor,
        part: Tensor,
        first: Tensor,
        rotary: Rotary | None,
        scope: AttentionScope | None,
        gains: Mapping[str, Tensor],
    ) -> State:
        added = sum_of_ranks(self.communicator, part)
        _, of_ffn = self.ffn_norm(x, added, gains["ffn_norm"])
        x, normed = self.attention_norm(x, added, gains["attention_norm"])
        attended = self.run(self.attention, normed, rotary, scope, gains_of_heads(gains))
        return x, self.run(self.ffn, of_ffn + first, attended), first
