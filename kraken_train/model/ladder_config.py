"""The settings of Ladder Residual, and what it declares about itself."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import ATTENTION, FFN, AllReduces
from kraken_train.model.tensor_parallel_config import TensorParallelConfig

PAPER = "https://arxiv.org/abs/2501.06589"


@dataclass(frozen=True)
class LadderConfig(TensorParallelConfig):
    """Ladder Residual (arXiv 2501.06589, section 3): no part of a layer waits for the output of the part before it.

    It has the weights of a standard Transformer of the same settings, and as many all-reduces, which all but the last
    run beside the next part. With `ladder_layers` it is a hybrid, as the paper's converted 8B model (section 4.2).
    """

    # the last so many layers are ladder layers and those before them standard ones, which wait; null: all are ladder
    # layers
    ladder_layers: int | None = None
    architecture: str = "ladder"  # class of the model

    architectures = ("ladder",)
    model_class = "kraken_train.model.ladder.LadderModel"
    color = "#e09f3e"

    def validate(self) -> None:
        super().validate()
        if self.num_ladder_layers > self.num_layers:
            raise ConfigError(
                f"model.ladder_layers={self.ladder_layers} is more than model.num_layers={self.num_layers}; use at "
                f"most {self.num_layers}, or null for all layers"
            )

    @property
    def num_ladder_layers(self) -> int:
        return self.num_layers if self.ladder_layers is None else self.ladder_layers

    def at_depth(self, num_layers: int) -> LadderConfig:
        """A hybrid has its share of ladder layers, one at least."""
        share = None if self.ladder_layers is None else max(1, round(num_layers * self.ladder_layers / self.num_layers))
        return self.replace(num_layers=num_layers, ladder_layers=share)

    @property
    def all_reduces(self) -> tuple[AllReduces, ...]:
        """A sum hides behind the part after it where that is of a ladder layer; there is none after the last FFN."""
        layers, ladders, width = self.num_layers, self.num_ladder_layers, self.hidden_size
        hidden = ladders + min(ladders, layers - 1)  # sums forward: of attention, and of the FFN of the layer before
        return (
            AllReduces("attention, and its gradient", 2 * ladders, width, behind=FFN),
            AllReduces("FFN, and its gradient", 2 * min(ladders, layers - 1), width, behind=ATTENTION),
            AllReduces("those exposed, as of the last FFN", 2 * (2 * layers - hidden), width),
        )

    @property
    def title(self) -> str:
        hybrid = "" if self.num_ladder_layers == self.num_layers else f" in {self.num_ladder_layers} layers"
        return f"Ladder Residual{hybrid}"

    @property
    def copied_gains(self) -> int:
        """Of all norms but the last."""
        return self.norm_parameters - self.hidden_size

    @property
    def introduction(self) -> str:
        return (
            f"A language model of the Ladder Residual architecture ([arXiv 2501.06589]({PAPER})) with "
            f"{self.num_parameters:,} parameters: each attention and FFN reads the residual stream from before the "
            "output of the one before it, whose sum over the devices runs meanwhile."
        )
