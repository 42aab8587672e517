"""The settings of the paper's two baselines, and what they declare about themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import (
    ADD,
    ATTENTION,
    FFN,
    NORM,
    AllReduces,
    LayerPart,
    ModelConfig,
)
from kraken_train.model.kraken_config import PAPER


@dataclass(frozen=True)
class Form:
    """How the two baselines differ."""

    norms: int  # of a layer
    all_reduces: int  # of a layer, forward
    color: str


FORMS = {"standard": Form(2, 2, "#2b4c7e"), "parallel": Form(1, 1, "#8d99ae")}


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """A GPT-2 without biases: the paper's two baselines.

    `architecture="standard"` adds attention and FFN one after the other, `"parallel"` adds both to the same input
    (`x + MHA(LN x) + FFN(LN x)`). Parameters of the paper's models, with D = hidden_size, k the width of the keys,
    m = ffn_multiplier and w norms a layer (2, or 1 in the parallel form):
    L ((2 + 2m) D^2 + 2 D k + w D) + V D + T D + D.
    """

    num_layers: int  # layers
    hidden_size: int  # width of the residual stream
    num_heads: int  # attention heads; tensor parallelism divides them
    # rows of the embedding; null: the data's vocabulary, rounded up to a multiple of 64 (GPT-2's 50257 is 50304)
    vocab_size: int
    context_length: int  # tokens of a sample
    ffn_multiplier: int = 4  # width of the FFN, in units of hidden_size
    norm_epsilon: float = 1e-5  # added to the variance in norms
    # key-value heads: fewer than heads is grouped-query attention, 1 multi-query; null: as many as heads
    num_kv_heads: int | None = None
    # standard: attention and FFN one after the other; parallel: both add to the same input
    architecture: str = "standard"

    architectures = tuple(FORMS)
    model_class = "kraken_train.model.gpt.GPTModel"
    heads_setting = "num_heads"
    kv_heads_setting = "num_kv_heads"
    is_baseline = True

    @property
    def form(self) -> Form:
        return FORMS[self.architecture]

    def validate(self) -> None:
        super().validate()
        if self.ffn_size % self.kv_heads:  # the ranks of a copy share both
            name, kv_heads = self.parallel_units
            below, above = (self.ffn_size // kv_heads + more for more in (0, 1))
            raise ConfigError(
                f"model.ffn_hidden_size={self.ffn_size} is not a multiple of {name}={kv_heads}, and the ranks of a "
                f"model copy share the FFN with the heads; use {f'{below * kv_heads} or ' if below else ''}"
                f"{above * kv_heads}"
            )

    @property
    def swiglu_step(self) -> int:
        return math.lcm(super().swiglu_step, self.heads)

    @property
    def hidden_norms(self) -> int:
        return self.num_layers * self.form.norms + 1

    @property
    def parallel_units(self) -> tuple[str, int]:
        """Key-value heads, with the heads that they serve and a part of the FFN."""
        return f"model.{self.heads_setting if self.num_kv_heads is None else self.kv_heads_setting}", self.kv_heads

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        d = self.hidden_size
        norm = ((NORM, d),) if self.form.norms > 1 else ()  # in the parallel form the attention's serves the FFN too
        attention = ((NORM, d), (ADD, d), *self.attention_passes(1, ranks))
        return {
            ATTENTION: LayerPart(self.attention_matrices(1, ranks), attention),
            FFN: LayerPart(self.ffn_matrices(1, ranks), (*norm, (ADD, d), *self.ffn_passes(1, ranks))),
        }

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        return (AllReduces("attention and FFN, and their gradients", 2 * self.form.all_reduces * self.num_layers),)

    def serving_units(self, devices: int) -> tuple[str, int]:
        """Where there are more devices than key-value heads, copies of these count: each with a part of the heads.

        Every device has one then; a key-value head has at most as many copies as it serves heads.
        """
        if self.kv_heads >= devices:
            return self.parallel_units
        most = self.heads // self.kv_heads
        copies = [r for r in range(1, most + 1) if most % r == 0 and self.ffn_size % (r * self.kv_heads) == 0]
        enough = (r for r in copies if r * self.kv_heads >= devices)
        return f"model.{self.heads_setting}", next(enough, copies[-1]) * self.kv_heads

    def served_with(self, units: int) -> GPTConfig:
        return self if units == self.kv_heads else self.replace(num_kv_heads=units, ffn_hidden_size=self.ffn_size)

    @property
    def title(self) -> str:
        return f"{self.architecture} GPT"

    @property
    def color(self) -> str:
        return self.form.color

    @property
    def introduction(self) -> str:
        return (
            f"A language model with {self.num_parameters:,} parameters, a Transformer of the {self.architecture} form, "
            f"a baseline of Kraken ([arXiv 2408.07802]({PAPER}))."
        )
