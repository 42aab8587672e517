"""The settings of the paper's two baselines, and what they declare about themselves."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.model.architecture import ADD, ATTENTION, FFN, NORM, AllReduces, LayerPart
from kraken_train.model.kraken_config import PAPER
from kraken_train.model.tensor_parallel_config import TensorParallelConfig


@dataclass(frozen=True)
class Form:
    """How the two baselines differ."""

    norms: int  # of a layer
    all_reduces: int  # of a layer, forward
    color: str


FORMS = {"standard": Form(2, 2, "#2b4c7e"), "parallel": Form(1, 1, "#8d99ae")}


@dataclass(frozen=True)
class GPTConfig(TensorParallelConfig):
    """A GPT-2 without biases: the paper's two baselines.

    `architecture="standard"` adds attention and FFN one after the other, `"parallel"` adds both to the same input
    (`x + MHA(LN x) + FFN(LN x)`). Parameters of the paper's models, with D = hidden_size, k the width of the keys,
    m = ffn_multiplier and w norms a layer (2, or 1 in the parallel form):
    L ((2 + 2m) D^2 + 2 D k + w D) + V D + T D + D.
    """

    # standard: attention and FFN one after the other; parallel: both add to the same input
    architecture: str = "standard"

    architectures = tuple(FORMS)
    model_class = "kraken_train.model.gpt.GPTModel"

    @property
    def form(self) -> Form:
        return FORMS[self.architecture]

    @property
    def hidden_norms(self) -> int:
        return self.num_layers * self.form.norms + 1

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
        count = 2 * self.form.all_reduces * self.num_layers
        return (AllReduces("attention and FFN, and their gradients", count, self.hidden_size),)

    @property
    def copied_gains(self) -> int:
        """Of the norms of queries and keys."""
        return self.norm_parameters - self.hidden_norms * self.hidden_size

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
