"""Configurations of models: frozen dataclasses that say what a model's settings mean and which rules they obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import OneOf, from_dict
from kraken_train.common.validation import require_choice, require_divides, require_positive


@dataclass(frozen=True)
class KrakenConfig:
    """A Kraken model (arXiv 2408.07802, section 3): every layer is `num_sub_layers` narrow sub-layers.

    The product `num_sub_layers * heads_per_sub_layer` is the total number of heads of a layer.
    """

    num_sub_layers: int
    num_layers: int
    hidden_size: int  # width of each sub-layer's own residual stream
    heads_per_sub_layer: int
    vocab_size: int  # rows of the embedding; at least the tokenizer's size
    context_length: int  # tokens
    ffn_multiplier: int = 2  # width of a sub-layer's FFN in units of hidden_size
    norm_epsilon: float = 1e-5
    kv_heads_per_sub_layer: int | None = None  # fewer than heads: grouped-query attention; 1: multi-query
    architecture: str = "kraken"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        require_choice("model.architecture", self.architecture, ("kraken",))
        positive_fields = (
            "num_sub_layers", "num_layers", "hidden_size", "heads_per_sub_layer",
            "vocab_size", "context_length", "ffn_multiplier", "norm_epsilon",
        )  # fmt: skip
        for name in positive_fields:
            require_positive(f"model.{name}", getattr(self, name))
        require_divides("model.heads_per_sub_layer", self.heads_per_sub_layer, "model.hidden_size", self.hidden_size)
        if self.kv_heads_per_sub_layer is not None:
            require_kv_heads(
                "kv_heads_per_sub_layer", self.kv_heads_per_sub_layer, "heads_per_sub_layer", self.heads_per_sub_layer
            )

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a sub-layer."""
        return self.kv_heads_per_sub_layer or self.heads_per_sub_layer

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads_per_sub_layer

    @property
    def kv_size(self) -> int:
        """Width of the keys of a sub-layer, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def ffn_size(self) -> int:
        return self.ffn_multiplier * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """L N ((2 + 2m) d^2 + 2dk + 2d) + V d + T d + N d^2 + d: sub-layers, embeddings, conjunction, final norm.

        k is the width of the keys; with as many key-value heads as heads it is d.
        """
        norms = self.num_layers * self.num_sub_layers * 2 * self.hidden_size + self.hidden_size
        return self.matrix_parameters + self.context_length * self.hidden_size + norms

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: all but position embedding and norms."""
        d, n = self.hidden_size, self.num_sub_layers
        sub_layer = (2 + 2 * self.ffn_multiplier) * d * d + 2 * d * self.kv_size
        return self.num_layers * n * sub_layer + n * d * d + self.vocab_size * d

    @property
    def attention_width(self) -> int:
        """Width of all heads of a layer together: what attention's cost is proportional to."""
        return self.num_sub_layers * self.hidden_size

    @property
    def cache_width(self) -> int:
        """Values that the key-value cache holds per layer and token."""
        return 2 * self.num_sub_layers * self.kv_size

    @property
    def parallel_units(self) -> tuple[str, int]:
        """What the ranks of a model copy share, by setting: the sub-layers."""
        return "model.num_sub_layers", self.num_sub_layers


@dataclass(frozen=True)
class GPTConfig:
    """A GPT-2 without biases: the paper's two baselines.

    `architecture="standard"` adds attention and FFN one after the other, `"parallel"` adds both to the same input
    (`x + MHA(LN x) + FFN(LN x)`).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    context_length: int  # tokens
    ffn_multiplier: int = 4
    norm_epsilon: float = 1e-5
    num_kv_heads: int | None = None  # fewer than heads: grouped-query attention; 1: multi-query
    architecture: str = "standard"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError if a setting breaks a rule."""
        require_choice("model.architecture", self.architecture, ("standard", "parallel"))
        positive_fields = (
            "num_layers", "hidden_size", "num_heads", "vocab_size", "context_length", "ffn_multiplier", "norm_epsilon",
        )  # fmt: skip
        for name in positive_fields:
            require_positive(f"model.{name}", getattr(self, name))
        require_divides("model.num_heads", self.num_heads, "model.hidden_size", self.hidden_size)
        if self.num_kv_heads is not None:
            require_kv_heads("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def ffn_size(self) -> int:
        return self.ffn_multiplier * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """L ((2 + 2m) D^2 + 2 D k + w D) + V D + T D + D with w = 2 norms a layer, or 1 in the parallel form.

        k is the width of the keys; with as many key-value heads as heads it is D.
        """
        norms_per_layer = 2 if self.architecture == "standard" else 1
        norms = (self.num_layers * norms_per_layer + 1) * self.hidden_size
        return self.matrix_parameters + self.context_length * self.hidden_size + norms

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: all but position embedding and norms."""
        width = self.hidden_size
        layer = (2 + 2 * self.ffn_multiplier) * width * width + 2 * width * self.kv_size
        return self.num_layers * layer + self.vocab_size * width

    @property
    def attention_width(self) -> int:
        return self.hidden_size

    @property
    def cache_width(self) -> int:
        """Values that the key-value cache holds per layer and token."""
        return 2 * self.kv_size

    @property
    def parallel_units(self) -> tuple[str, int]:
        """What the ranks of a model copy share, by setting: key-value heads with their heads and a part of the FFN."""
        return ("model.num_heads" if self.num_kv_heads is None else "model.num_kv_heads"), self.kv_heads


def require_kv_heads(name: str, kv_heads: int, heads_name: str, heads: int) -> None:
    """Each key-value head serves the same number of heads. Raises ConfigError."""
    require_positive(f"model.{name}", kv_heads)
    require_divides(f"model.{name}", kv_heads, f"model.{heads_name}", heads)


ModelConfig = KrakenConfig | GPTConfig
MODEL_CONFIGS: dict[str, type[KrakenConfig] | type[GPTConfig]] = {
    "kraken": KrakenConfig,
    "standard": GPTConfig,
    "parallel": GPTConfig,
}
ModelSettings = Annotated[dict[str, Any], OneOf(tuple(dict.fromkeys(MODEL_CONFIGS.values())))]  # for `parse_model`


def parse_model(settings: dict[str, Any], data_vocab_size: int | None = None) -> ModelConfig:
    """A `conf/model` group as a configuration object.

    `vocab_size: null` stands for the data's vocabulary, rounded up to a multiple of 64. Raises ConfigError for an
    unknown architecture or setting, and for a vocabulary that does not fit the data's.
    """
    settings = dict(settings)
    architecture = settings.get("architecture", "kraken")
    require_choice("model.architecture", architecture, tuple(MODEL_CONFIGS))
    if data_vocab_size is not None:
        if settings.get("vocab_size") is None:
            settings["vocab_size"] = padded_vocab_size(data_vocab_size)
        require_fitting_vocabulary(settings["vocab_size"], data_vocab_size)
    return from_dict(settings, MODEL_CONFIGS[architecture], prefix="model")


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 64, the row count that matrix units like (GPT-2's 50257 becomes 50304)."""
    return -(-vocab_size // 64) * 64


def require_fitting_vocabulary(model_vocab_size: object, data_vocab_size: int) -> None:
    """The model's embedding has a row for each token of the data, and less than 1024 rows more (padding)."""
    if not isinstance(model_vocab_size, int) or not data_vocab_size <= model_vocab_size < data_vocab_size + 1024:
        raise ConfigError(
            f"model.vocab_size={model_vocab_size} does not fit the data, whose tokenizer has {data_vocab_size} "
            f"tokens; use {data_vocab_size}, {padded_vocab_size(data_vocab_size)} (padded to a multiple of 64), or "
            "null to take it from the data"
        )
