"""The settings of a Kraken with the changes that the quality study asks about. Each is off by default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.registry import ARCHITECTURES


@dataclass(frozen=True)
class VariantConfig(KrakenConfig):
    """A Kraken whose layers compute, with learned gains g per channel and sub-layer where a setting gives their start,

        a_i = MHA_i(LN1_i(x_i + g s'));  x_i = x_i + a_i + FFN_i(LN2_i(a_i + g s + g x_i)) + g s

    s' being the sum that the layer before has used. None of them adds a collective that is waited for, but for
    `shared_attention_layers`.
    """

    architecture: str = "kraken-variant"
    sum_start: float | None = None  # start of the gain of s in the FFN's input; null: 1, not learned
    own_start: float | None = None  # start of the gain of x_i in the FFN's input; null: x_i is not there
    late_start: float | None = None  # start of the gain of s' in the attention's input; null: s' is not there
    residual_start: float | None = None  # start of the gain of s in the residual stream; null: s is not there
    separate_norms: bool = False  # LN(a_i + g x_i) + LN(g s) instead of one norm of the sum
    concatenated: bool = False  # the FFN reads LN(a_i + g x_i) and LN(g s) side by side, 2 D inputs
    # width of the embedding and of the head, each sub-layer with a map from it to hidden_size; null: hidden_size
    outer_size: int | None = None
    stream_maps: bool = False  # each stream starts as a map of the embedding of its own
    # first layers whose FFNs read x + sum_j a_j, as a standard layer's does: one all-reduce each that is waited for
    shared_attention_layers: int = 0
    residual_depth: int | None = None  # terms of a residual sum, for initial weights; null: layers times sub-layers
    learned_gains: bool = True  # false: gains keep their start

    architectures = ("kraken-variant",)
    model_class = "studies.quality.variant.VariantModel"

    def validate(self) -> None:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(KrakenConfig)}
        KrakenConfig(**{**plain, "architecture": "kraken"})
        if self.embedding_size is not None:
            raise ConfigError("model.embedding_size is called model.outer_size in the study's Kraken; use that")
        if self.separate_norms and self.concatenated:
            raise ConfigError("model.separate_norms and model.concatenated exclude each other; set one of them")
        if self.shared_attention_layers > 1:
            raise ConfigError("model.shared_attention_layers is 0 or 1: later streams differ from each other")
        if self.shared_attention_layers and self.has_maps:
            raise ConfigError("model.shared_attention_layers needs streams that start equal: no maps, no outer_size")

    @property
    def has_maps(self) -> bool:
        return self.stream_maps or self.outer_size is not None

    @property
    def embedding_width(self) -> int:
        return self.outer_size or self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, as the base counts them and the changes add."""
        n, layers, d = self.num_sub_layers, self.num_layers, self.hidden_size
        gains = sum(start is not None for start in (self.sum_start, self.own_start, self.residual_start)) * layers
        gains += (self.late_start is not None) * (layers - 1)
        total = super().num_parameters + self.learned_gains * gains * n * d
        total += (self.separate_norms or self.concatenated) * layers * n * d
        total += self.concatenated * layers * n * d * self.ffn_size * (2 if self.ffn == "swiglu" else 1)
        return total + self.has_maps * n * d * self.embedding_width


def register() -> None:
    """Add the architecture to those that the programs of this process know."""
    ARCHITECTURES["kraken-variant"] = VariantConfig
