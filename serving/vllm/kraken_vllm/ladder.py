"""A layer of Ladder Residual (arXiv 2501.06589). Imports no vLLM.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kraken_vllm.backend import Backend
from kraken_vllm.gpt import LayerOfTwoNorms
from kraken_vllm.late_sum import LateSum
from kraken_vllm.layers import Rotary

# x and this rank's part of the output f of the FFN before, which is not in x; None before the first. Both are (T, D).
State = tuple[Tensor, Tensor | None]


class LadderLayer(LayerOfTwoNorms):
    """a = MHA(LN1 x); f' = FFN(LN2 (x + f)); the next x is x + f + a, its f is f'.

    The sum of f over the ranks is under way while the attention computes, that of a while the FFN does. In the first
    layers of a hybrid, which are standard, the ranks wait for both.
    """

    def __init__(self, config: Any, backend: Backend, prefix: str, index: int) -> None:
        super().__init__(config, backend, prefix, index)
        ladders = config.num_layers if config.ladder_layers is None else config.ladder_layers
        self.is_standard = index < config.num_layers - ladders
        self.sum = LateSum(backend, config.overlap)

    @staticmethod
    def begin(embedding: Tensor, count: int) -> State:
        return embedding, None

    def end(self, state: State) -> Tensor:
        x, part = state
        return x if part is None else x + self.all_reduce(part)

    def forward(self, state: State, rotary: Rotary | None) -> State:
        if self.is_standard:
            x = self.end(state)
            x = x + self.all_reduce(self.attention(self.attention_norm(x), rotary))
            return x, self.ffn(self.ffn_norm(x))
        x, part = state
        begun = None if part is None else self.sum.begin(part)
        attended = self.attention(self.attention_norm(x), rotary)
        if part is not None and begun is not None:
            x = self.sum.add(part, begun, x)
        begun = self.sum.begin(attended)
        part = self.ffn(self.ffn_norm(x))
        return self.sum.add(attended, begun, x), part
