"""From token ids to the input of the head, on one of P ranks. Imports no vLLM.

Each rank holds the whole embedding. A Kraken has one all-reduce per layer but the first, under way while the attention
computes, and one for the conjunction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from kraken_vllm.backend import Backend
from kraken_vllm.gpt import ParallelLayer, StandardLayer
from kraken_vllm.kraken import KrakenLayer
from kraken_vllm.layers import Embedding, Norm, StackedLinear, rotary_angles

# By architecture: built with (config, backend, prefix, index), called with the streams (n, T, D), or (T, D) where there
# is one only, and the angles of the rotary embeddings.
LAYERS: dict[str, type[nn.Module]] = {
    "kraken": KrakenLayer,
    "standard": StandardLayer,
    "parallel": ParallelLayer,
}


class Decoder(nn.Module):
    """Token ids and positions (T,) -> (T, D), equal on all ranks."""

    def __init__(self, config: Any, backend: Backend, prefix: str = "model") -> None:
        super().__init__()
        share, width = backend.share, config.hidden_size
        self.config = config
        self.is_stacked = config.is_stacked
        self.count = share.of(config.streams) if self.is_stacked else 1
        self.all_reduce = backend.all_reduce
        self.token_embedding = Embedding(config.vocab_size, width)
        self.position_embedding = Embedding(config.context_length, width) if config.positions == "learned" else None
        layer = LAYERS[config.architecture]
        self.layers = nn.ModuleList(
            layer(config, backend, f"{prefix}.layers.{index}", index) for index in range(config.num_layers)
        )
        if self.is_stacked:
            self.conjunction = StackedLinear(backend, self.count, width, width, f"{prefix}.conjunction", share.along)
        self.final_norm = Norm(config.norm, width, config.norm_epsilon)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        embedding = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = None
        if self.position_embedding is not None:
            embedding = embedding + self.position_embedding(positions)
        else:
            rotary = rotary_angles(positions, self.config, embedding.dtype)
        streams = embedding.expand(self.count, -1, -1) if self.is_stacked else embedding
        for layer in self.layers:
            streams = layer(streams, rotary)
        if self.is_stacked:
            streams = self.all_reduce(self.conjunction(streams).sum(dim=0))
        result: Tensor = self.final_norm(streams)
        return result

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Weights of an export by name, each whole. Raises ValueError unless they are those of the model."""
        missing = {
            f"{name}.weight": module for name, module in self.named_modules() if name and hasattr(module, "load")
        }
        for name, full in weights:
            if name not in missing:
                raise ValueError(f"the file has the weight {name}, which config.json does not describe")
            try:
                missing.pop(name).load(full)
            except ValueError as error:
                raise ValueError(f"{name} in the file does not fit config.json: {error}") from error
        if missing:
            raise ValueError(f"the file lacks the weight {min(missing)}, which config.json describes")
