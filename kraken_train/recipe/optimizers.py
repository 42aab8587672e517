"""Settings of optimizers. One class per choice of conf/optim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_choice, require_positive

PARAMETRIZATIONS = ("standard", "mup")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    lr: float  # peak learning rate
    betas: tuple[float, float]  # decay rates of the first and second moments
    eps: float  # added to the square root of the second moment
    weight_decay: float  # decoupled weight decay of matrices and embeddings, not of norms
    max_grad_norm: float  # gradients are scaled down to this norm; 0: no clipping
    name: Literal["adamw"] = "adamw"  # class of the optimizer
    # standard | mup: lr is that of a base model, and initial values, learning rates and weight decay of each kind of
    # weight follow from how many times larger this model is
    parametrization: str = "standard"
    base_hidden_size: int | None = None  # of the base model; mup needs it
    base_num_layers: int | None = None  # of the base model; mup needs it
    base_num_sub_layers: int | None = None  # of the base model; mup needs it for a Kraken

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("optim.lr", self.lr)
        require_positive("optim.eps", self.eps)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require_at_least("optim.max_grad_norm", self.max_grad_norm, 0)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"optim.betas={list(self.betas)} must both be at least 0 and less than 1")
        require_choice("optim.parametrization", self.parametrization, PARAMETRIZATIONS)
        for name in ("base_hidden_size", "base_num_layers", "base_num_sub_layers"):
            if getattr(self, name) is not None:
                require_positive(f"optim.{name}", getattr(self, name))
