"""The paper's two baselines, GPT-2 without biases: the standard Transformer and its parallel form.

    standard  x = x + MHA(LN1 x);  x = x + FFN(LN2 x)
    parallel  x = x + MHA(LN x) + FFN(LN x)

Over several ranks both are sharded as in Megatron-LM (arXiv 1909.08053, section 3): attention by heads, the FFN by its
inner width. The standard form waits for two all-reduces per layer, the parallel form for one, and as many backward.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.gpt_config import GPTConfig
from kraken_train.model.initialization import initialize
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import KeyValueStore, Layer, causal_attention
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units
from kraken_train.parallel.tensor_parallel import ColumnParallelLinear, QKVLinear, RowParallelLinear


class GPTModel(LanguageModel):
    """Either form, by `config.architecture`.

    `groups` says which key-value heads are here (default: all), and with them which heads and which part of the FFN;
    `vocabulary`, `communicator` and `seed` as in `KrakenModel`.
    """

    def __init__(
        self,
        config: GPTConfig,
        groups: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.config = config
        self.groups = groups or all_units(config.kv_heads)
        layer = LAYERS[config.architecture]
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            layer(config, self.groups, self.communicator) for _ in range(config.num_layers)
        )
        initialize(self, seed, residual_depth=config.num_layers)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return 1, self.groups.count, self.config.head_dim

    def hidden(self, embedding: Tensor, caches: Sequence[KeyValueStore | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, added = embedding, embedding.new_zeros(())
        for layer, cache in zip(self.layers, caches, strict=True):
            x, added = layer(x, added, cache)
        return x + added


# In both layers `added` is what the part before adds to x: the next norm makes the sum, so that compilation can fuse
# the two. Both are (B, T, D).


class StandardLayer(Layer):
    """x = x + MHA(LN1 x);  x = x + FFN(LN2 x)"""

    def __init__(self, config: GPTConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.attention_norm = AddNorm(config)
        self.attention = Attention(config, groups)
        self.ffn_norm = AddNorm(config)
        self.ffn = FFN(config, groups)

    def forward(self, x: Tensor, added: Tensor, cache: KeyValueStore | None) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        added = self.communicator.all_reduce(self.run(self.attention, normed, cache))
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

    def forward(self, x: Tensor, added: Tensor, cache: KeyValueStore | None) -> tuple[Tensor, Tensor]:
        x, normed = self.norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        attended = self.run(self.attention, normed, cache)
        return x, self.communicator.all_reduce(self.run(self.ffn, normed, attended))


LAYERS: dict[str, type[StandardLayer] | type[ParallelLayer]] = {"standard": StandardLayer, "parallel": ParallelLayer}


class AddNorm(nn.LayerNorm):
    """x and what is added to it, (B, T, D) each -> (x + added, LN(x + added))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.norm_epsilon, bias=False)

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x + added
        return total, super().forward(total)


class Attention(nn.Module):
    """The heads here, (B, T, D) -> their part of (B, T, D)."""

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        heads_per_group = config.heads // config.kv_heads
        self.qkv = QKVLinear(config.hidden_size, groups, heads_per_group, config.head_dim)
        self.out = RowParallelLinear(groups.in_units_of(heads_per_group * config.head_dim), config.hidden_size)

    def forward(self, x: Tensor, cache: KeyValueStore | None = None) -> Tensor:
        query, key, value = self.qkv(x)
        attended: Tensor = self.out(causal_attention(query, key, value, cache))
        return attended


class FFN(nn.Module):
    """The inner columns that go with the heads here, (B, T, D) -> their part of (B, T, D).

    In the parallel form that of the attention, `attended`, is added.
    """

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        inner = groups.in_units_of(config.ffn_size // config.kv_heads)
        self.up = ColumnParallelLinear(config.hidden_size, inner)
        self.down = RowParallelLinear(inner, config.hidden_size)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        part: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return part if attended is None else attended + part
