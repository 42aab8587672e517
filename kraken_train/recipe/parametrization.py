"""How initial values, learning rates and AdamW's epsilon of each kind of weight follow the size of a model.

muP for width (arXiv 2203.03466), CompleteP for depth (arXiv 2505.01618), and our own rules for the number of Kraken's
sub-layers; docs/learning-rate-transfer.md derives all of them. Whatever those papers multiply in the forward pass is
here a part of the weights (arXiv 2011.14522, section 3, "abc-parametrization"), so that models stay plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.weight_kind import WeightKind
from kraken_train.recipe.optimizers import AdamWConfig, AnyOptimizer


@dataclass(frozen=True)
class Multipliers:
    """What the settings of a weight are multiplied with."""

    initial: float  # the standard initial values of this model
    learning_rate: float
    epsilon: float  # of AdamW: the size of gradients follows the size of the model

    @property
    def weight_decay(self) -> float:
        """The product of learning rate and weight decay, what a step takes from a weight, stays the same."""
        return 1 / self.learning_rate


@dataclass(frozen=True)
class Parametrization:
    """How many times larger a model is than the base, for which all multipliers are 1."""

    width: float = 1.0  # hidden_size
    depth: float = 1.0  # layers
    streams: float = 1.0  # sub-layers of Kraken

    def multipliers(self, kind: WeightKind) -> Multipliers:
        width, depth, streams = self.width, self.depth, self.streams
        rules = {
            WeightKind.EMBEDDING: Multipliers(1.0, 1.0, 1 / width),
            # Its standard initial values fall with the width of the embedding already.
            WeightKind.EMBEDDING_MAP: Multipliers(1.0, 1 / width, 1 / (width * streams)),
            WeightKind.HIDDEN: Multipliers(1 / math.sqrt(width), 1 / width, 1 / (width * depth * streams)),
            # The standard values fall with sqrt(depth * streams); from the base to here they fall with depth alone.
            WeightKind.RESIDUAL: Multipliers(
                math.sqrt(streams / depth) / math.sqrt(width), 1 / (width * depth), 1 / (width * streams)
            ),
            WeightKind.CONJUNCTION: Multipliers(1 / (math.sqrt(width) * streams), 1 / (width * streams), 1 / width),
            WeightKind.NORM: Multipliers(1.0, 1.0, 1 / (width * depth * streams)),
            WeightKind.FINAL_NORM: Multipliers(1 / width, 1 / width, 1.0),  # the head's factor 1 / width
        }
        return rules[kind]


STANDARD = Parametrization()


def parametrization_of(optim: AnyOptimizer, model: ModelConfig) -> Parametrization:
    """How many times larger `model` is than the base in `optim`. Raises ConfigError where a size of it is missing."""
    if not isinstance(optim, AdamWConfig) or optim.parametrization != "mup":
        return STANDARD
    if not model.has_mup_rules:
        raise ConfigError(
            f"optim.parametrization=mup has no rules for model.architecture={model.architecture}; use standard"
        )
    sizes = {"base_hidden_size": model.hidden_size, "base_num_layers": model.num_layers}
    if model.units_setting is not None:
        sizes["base_num_sub_layers"] = model.num_streams
    elif optim.base_num_sub_layers is not None:
        raise ConfigError(
            f"optim.base_num_sub_layers={optim.base_num_sub_layers}: model.architecture={model.architecture} has no "
            "sub-layers; use null"
        )
    ratios = []
    for name, size in sizes.items():
        base = getattr(optim, name)
        if base is None:
            raise ConfigError(
                f"optim.parametrization=mup needs optim.{name}, the same for all models that share optim.lr (in this "
                f"model it is {size})"
            )
        ratios.append(size / base)
    return Parametrization(*ratios)
