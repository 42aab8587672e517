"""The settings of FAL, and what it declares about itself."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.model.architecture import AllReduces
from kraken_train.model.tensor_parallel_config import TensorParallelConfig

PAPER = "https://arxiv.org/abs/2510.14614"


@dataclass(frozen=True)
class FALConfig(TensorParallelConfig):
    """First Attentions Last (arXiv 2510.14614): every FFN reads the first layer's attention in place of its own.

    It has the weights of a standard Transformer of the same settings and one norm more, of the first attention's
    output. A layer has one all-reduce, and the first one a second.
    """

    architecture: str = "fal"  # class of the model

    architectures = ("fal",)
    model_class = "kraken_train.model.fal.FALModel"
    color = "#3a7d44"
    title = "FAL"

    @property
    def hidden_norms(self) -> int:
        return 2 * self.num_layers + 2

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        return (AllReduces("attention with FFN, and their gradients", 2 * (self.num_layers + 1), self.hidden_size),)

    @property
    def copied_gains(self) -> int:
        """Of all norms but the last."""
        return self.norm_parameters - self.hidden_size

    @property
    def introduction(self) -> str:
        return (
            f"A language model of the FAL architecture ([arXiv 2510.14614]({PAPER})) with {self.num_parameters:,} "
            "parameters: every FFN reads the output of the first layer's attention in place of that of its own layer, "
            "so that a layer takes one sum over the devices."
        )
