"""How initial values, learning rates and AdamW's epsilon of each kind of weight follow the size of a model.

muP for width (arXiv 2203.03466), CompleteP for depth (arXiv 2505.01618), and our own rules for the number of Kraken's
sub-layers; docs/learning-rate-transfer.md derives all of them. Whatever those papers multiply in the forward pass is
here a part of the weights (arXiv 2011.14522, section 3, "abc-parametrization"), so that models stay plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kraken_train.model.weight_kind import WeightKind


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
    """How many times larger a model is than the base, at which the learning rate was found. 1: the standard one."""

    width: float = 1.0  # hidden_size
    depth: float = 1.0  # layers
    streams: float = 1.0  # sub-layers of Kraken

    def multipliers(self, kind: WeightKind) -> Multipliers:
        width, depth, streams = self.width, self.depth, self.streams
        match kind:
            case WeightKind.EMBEDDING:
                return Multipliers(1.0, 1.0, 1 / width)
            case WeightKind.HIDDEN:
                return Multipliers(1 / math.sqrt(width), 1 / width, 1 / (width * depth * streams))
            case WeightKind.RESIDUAL:
                # The standard values fall with sqrt(depth * streams); from the base to here they fall with depth alone.
                initial = math.sqrt(streams / depth) / math.sqrt(width)
                return Multipliers(initial, 1 / (width * depth), 1 / (width * streams))
            case WeightKind.CONJUNCTION:
                return Multipliers(1 / (math.sqrt(width) * streams), 1 / (width * streams), 1 / width)
            case WeightKind.NORM:
                return Multipliers(1.0, 1.0, 1 / (width * depth * streams))
            case WeightKind.FINAL_NORM:  # the head's factor 1 / width
                return Multipliers(1 / width, 1 / width, 1.0)


STANDARD = Parametrization()
