"""A layer of FAL (arXiv 2510.14614). Imports no vLLM.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kraken_vllm.backend import Backend
from kraken_vllm.gpt import LayerOfTwoNorms
from kraken_vllm.layers import Norm, Rotary

State = tuple[Tensor, Tensor]  # x, and the normed output of the first attention; both are (T, D)


class FALLayer(LayerOfTwoNorms):
    """x = x + MHA(LN1 x) + FFN(LN2 x + f), where f is the normed output of the first attention.

    In the first layer a = MHA(LN1 x); x = x + a; f = LN_f a; x = x + FFN(LN2 x).
    """

    def __init__(self, config: Any, backend: Backend, prefix: str, index: int) -> None:
        super().__init__(config, backend, prefix, index)
        self.output_norm = Norm(config.norm, config.hidden_size, config.norm_epsilon) if index == 0 else None

    @staticmethod
    def begin(embedding: Tensor, count: int) -> State:
        return embedding, torch.zeros_like(embedding)

    def end(self, state: State) -> Tensor:
        return state[0]

    def forward(self, state: State, rotary: Rotary | None) -> State:
        x, first = state
        attended = self.attention(self.attention_norm(x), rotary)
        if self.output_norm is None:
            return x + self.all_reduce(attended + self.ffn(self.ffn_norm(x) + first)), first
        attended = self.all_reduce(attended)
        x = x + attended
        return x + self.all_reduce(self.ffn(self.ffn_norm(x))), self.output_norm(attended)
