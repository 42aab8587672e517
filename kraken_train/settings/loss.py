"""What a training minimizes beside, or in place of, the cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy in training."""

    # weight of the z-loss, the mean of (log Z)^2 with Z = sum of exp(logit) over the vocabulary; 1e-4 in PaLM; 0: none
    z_loss: float

    def validate(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError(f"loss.z_loss={self.z_loss} must be at least 0 and finite, as 1e-4; 0 switches it off")


@dataclass(frozen=True)
class DistillConfig:
    """A teacher from whose predictions the model learns, see `kraken_train.training.teacher`."""

    # export of a model with the same tokenizer, of any architecture; its weights stay as they are; null: none
    teacher: FilePath | None = None
    # share w of the teacher in the loss (1 - w) cross-entropy + w T^2 KL(teacher || model); 0 measures KL only
    weight: float = 0.5
    temperature: float = 1.0  # T, by which the logits of both are divided in KL

    def validate(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"distill.weight={self.weight} must be from 0 (text alone) to 1 (teacher alone)")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"distill.temperature={self.temperature} must be above 0 and finite, as 1 or 2")
