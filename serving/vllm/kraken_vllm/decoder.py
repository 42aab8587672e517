"""From token ids to the input of the head, on one of P ranks. Imports no vLLM.

Each rank holds the whole embedding. A Kraken has one all-reduce per layer, under way while the attention computes, and
one for the conjunction. The first layer has none unless the streams start as maps of the embedding (`embedding_size`).

Shapes: n sub-layers of this rank, T tokens, D hidden size, E width of the embedding (D without `embedding_size`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from kraken_vllm.backend import Backend
from kraken_vllm.fal import FALLayer
from kraken_vllm.gpt import ParallelLayer, StandardLayer
from kraken_vllm.kraken import KrakenLayer
from kraken_vllm.ladder import LadderLayer
from kraken_vllm.layers import Embedding, Norm, StackedLinear, rotary_angles
from kraken_vllm.track import TrackLayer

# By architecture: built with (config, backend, prefix, index), called with what the layer before returned and the
# angles of the rotary embeddings. `begin(embedding, n)` is what the first layer takes, for n streams on this rank;
# `end` makes the residual stream (T, D) of what the last one returned, in a Kraken the streams (n, T, D).
LAYERS: dict[str, Any] = {
    "kraken": KrakenLayer,
    "standard": StandardLayer,
    "parallel": ParallelLayer,
    "track": TrackLayer,
    "ladder": LadderLayer,
    "fal": FALLayer,
}


class Decoder(nn.Module):
    """Token ids and positions (T,) -> (T, E), equal on all ranks."""

    def __init__(self, config: Any, backend: Backend, prefix: str = "model") -> None:
        super().__init__()
        share, width = backend.share, config.embedding_width
        self.config = config
        self.count = share.of(config.streams) if config.is_stacked else 1
        self.all_reduce = backend.all_reduce
        self.token_embedding = Embedding(config.vocab_size, width)
        self.position_embedding = Embedding(config.context_length, width) if config.positions == "learned" else None
        self.layer_class = LAYERS[config.architecture]
        self.embedding_maps = None
        if getattr(config, "embedding_size", None) is not None:
            self.embedding_maps = StackedLinear(
                backend, self.count, width, config.hidden_size, f"{prefix}.embedding_maps", share.along
            )
        self.layers = nn.ModuleList(
            self.layer_class(config, backend, f"{prefix}.layers.{index}", index) for index in range(config.num_layers)
        )
        self.conjunction = None
        if self.layer_class.has_conjunction:
            self.conjunction = StackedLinear(
                backend, self.count, config.hidden_size, width, f"{prefix}.conjunction", share.along
            )
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
        state = self.layer_class.begin(embedding, self.count)
        if self.embedding_maps is not None:
            state = self.embedding_maps(state)
        for layer in self.layers:
            state = layer(state, rotary)
        stream = cast(Any, self.layers[-1]).end(state)
        if self.conjunction is not None:
            stream = self.all_reduce(self.conjunction(stream).sum(dim=0))
        result: Tensor = self.final_norm(stream)
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
