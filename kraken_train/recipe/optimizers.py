"""Settings of optimizers. One class per choice of conf/optim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_positive


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    lr: float  # peak learning rate
    betas: tuple[float, float]  # decay rates of the first and second moments
    eps: float  # added to the square root of the second moment
    weight_decay: float  # decoupled weight decay of matrices and embeddings, not of norms
    max_grad_norm: float  # gradients are scaled down to this norm; 0: no clipping
    name: Literal["adamw"] = "adamw"  # class of the optimizer

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("optim.lr", self.lr)
        require_positive("optim.eps", self.eps)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require_at_least("optim.max_grad_norm", self.max_grad_norm, 0)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"optim.betas={list(self.betas)} must both be at least 0 and less than 1")
