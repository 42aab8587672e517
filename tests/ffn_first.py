"""An architecture that only tests know: a GPT whose FFN comes before the attention, with settings of other names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kraken_train.model.architecture import (
    ADD,
    ATTENTION,
    FFN,
    NORM,
    AllReduces,
    LayerPart,
    ModelConfig,
)
from kraken_train.model.initialization import initialize
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import AttentionScope, Layer
from kraken_train.model.rotary import Rotary
from kraken_train.model.tensor_parallel import FFN as GPTFFN
from kraken_train.model.tensor_parallel import AddNorm, Attention, qk_gains
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units

NAME = "ffn-first"


@dataclass(frozen=True)
class FFNFirstConfig(ModelConfig):
    num_layers: int
    hidden_size: int
    query_heads: int
    vocab_size: int
    context_length: int
    ffn_multiplier: int = 3
    norm_epsilon: float = 1e-5
    shared_heads: int | None = None
    architecture: str = NAME

    architectures = (NAME,)
    model_class = "ffn_first.FFNFirstModel"
    heads_setting = "query_heads"
    kv_heads_setting = "shared_heads"
    is_baseline = True
    color = "#123456"
    title = "FFN-first GPT"
    introduction = "A language model whose FFN comes first."

    @property
    def hidden_norms(self) -> int:
        return 2 * self.num_layers + 1

    @property
    def parallel_units(self) -> tuple[str, int]:
        return "model.query_heads", self.kv_heads

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        add_norm = ((NORM, self.hidden_size), (ADD, self.hidden_size))
        return {
            FFN: LayerPart(self.ffn_matrices(1, ranks), (*add_norm, *self.ffn_passes(1, ranks))),
            ATTENTION: LayerPart(self.attention_matrices(1, ranks), (*add_norm, *self.attention_passes(1, ranks))),
        }

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        return (AllReduces("FFN and attention, and their gradients", 4 * self.num_layers, self.hidden_size),)


class FFNFirstModel(LanguageModel):
    def __init__(
        self,
        config: FFNFirstConfig,
        units: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.units = units or all_units(config.kv_heads)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            FFNFirstLayer(config, self.units, self.communicator) for _ in range(config.num_layers)
        )
        initialize(self, seed, residual_depth=config.num_layers)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return 1, self.units.count, self.config.head_size

    def hidden(self, embedding: Tensor, rotary: Rotary | None, caches: Sequence[AttentionScope | None]) -> Tensor:
        x, added = embedding, embedding.new_zeros(())
        all_gains = qk_gains(self.layers, self.config, self.communicator)
        for layer, cache, gains in zip(self.layers, caches, all_gains, strict=True):
            x, added = layer(x, added, rotary, cache, gains)
        return x + added


class FFNFirstLayer(Layer):
    """x = x + FFN(LN1 x);  x = x + MHA(LN2 x)"""

    def __init__(self, config: FFNFirstConfig, units: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.ffn_norm = AddNorm(config)
        self.ffn = GPTFFN(config, units)
        self.attention_norm = AddNorm(config)
        self.attention = Attention(config, units)

    def forward(
        self, x: Tensor, added: Tensor, rotary: Rotary | None, cache: AttentionScope | None, gains: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.ffn_norm(x, added)
        added = self.communicator.all_reduce(self.run(self.ffn, self.communicator.copy_to_ranks(normed)))
        x, normed = self.attention_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        return x, self.communicator.all_reduce(self.run(self.attention, normed, rotary, cache, gains))


def transformers_layer(modeling: Any) -> type[nn.Module]:
    """The class that `modeling_kraken.py`, imported as `modeling`, would have for it."""

    class FFNFirstLayerOfTransformers(modeling.GPTLayer):  # type: ignore[misc, name-defined]
        settings = {"ffn_multiplier": 3, "query_heads": 4, "shared_heads": None}  # noqa: RUF012 (as the file has it)
        heads_setting = "query_heads"
        kv_heads_setting = "shared_heads"

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            self.ffn_norm = modeling.plain_norm(config)
            self.ffn = modeling.GPTFFN(config)
            self.attention_norm = modeling.plain_norm(config)
            self.attention = modeling.GPTAttention(config, layer_idx)

        def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            x = x + self.ffn(self.ffn_norm(x))
            attended, weights = self.attention(self.attention_norm(x), **kwargs)
            return x + attended, weights

    return FFNFirstLayerOfTransformers
