"""The settings of the paper's two baselines, and what they declare about themselves."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.model.architecture import (
    ADD,
    ATTENTION,
    FFN,
    GELU,
    JOIN_HEADS,
    NORM,
    AllReduces,
    LayerPart,
    Matrix,
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
    (`x + MHA(LN x) + FFN(LN x)`). Parameters, with D = hidden_size, k the width of the keys, m = ffn_multiplier and
    w norms a layer (2, or 1 in the parallel form): L ((2 + 2m) D^2 + 2 D k + w D) + V D + T D + D.
    """

    num_layers: int  # layers
    hidden_size: int  # width of the residual stream
    num_heads: int  # attention heads; tensor parallelism divides them
    # rows of the embedding; null: the data's vocabulary, rounded up to a multiple of 64 (GPT-2's 50257 is 50304)
    vocab_size: int
    context_length: int  # tokens of a sample
    ffn_multiplier: int = 4  # width of the FFN, in units of hidden_size
    norm_epsilon: float = 1e-5  # added to the variance in LayerNorm
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

    @property
    def norm_parameters(self) -> int:
        return (self.num_layers * self.form.norms + 1) * self.hidden_size

    @property
    def parallel_units(self) -> tuple[str, int]:
        """Key-value heads, with the heads that they serve and a part of the FFN."""
        return f"model.{self.heads_setting if self.num_kv_heads is None else self.kv_heads_setting}", self.kv_heads

    def layer_parts(self, ranks: int) -> dict[str, LayerPart]:
        d, inner = self.hidden_size, self.ffn_size // ranks
        attention = (Matrix(d, (d + 2 * self.kv_size) // ranks), Matrix(d // ranks, d))
        norm = ((NORM, d),) if self.form.norms > 1 else ()  # in the parallel form the attention's serves the FFN too
        return {
            ATTENTION: LayerPart(attention, ((NORM, d), (ADD, d), (JOIN_HEADS, d / ranks))),
            FFN: LayerPart((Matrix(d, inner), Matrix(inner, d)), (*norm, (ADD, d), (GELU, self.ffn_size / ranks))),
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
        heads_per_group = self.heads // self.kv_heads
        enough = (r for r in range(1, heads_per_group) if heads_per_group % r == 0 and r * self.kv_heads >= devices)
        return f"model.{self.heads_setting}", next(enough, heads_per_group) * self.kv_heads

    def served_with(self, units: int) -> GPTConfig:
        return self if units == self.kv_heads else self.with_kv_heads(units)

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
