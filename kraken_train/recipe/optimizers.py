"""Settings of optimizers. One class per choice of conf/optim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_choice, require_positive

PARAMETRIZATIONS = ("standard", "mup")


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share: the settings of AdamW."""

    lr: float  # peak learning rate
    betas: tuple[float, float]  # decay rates of AdamW's first and second moments
    eps: float  # AdamW adds it to the square root of the second moment
    weight_decay: float  # decoupled weight decay of matrices and embeddings, not of norms
    max_grad_norm: float  # gradients are scaled down to this norm; 0: no clipping

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("optim.lr", self.lr)
        require_positive("optim.eps", self.eps)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require_at_least("optim.max_grad_norm", self.max_grad_norm, 0)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"optim.betas={list(self.betas)} must both be at least 0 and less than 1")


@dataclass(frozen=True)
class AdamWConfig(Optimizer):
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"  # class of the optimizer
    # standard | mup: one lr is the best for models of all sizes, since initial values, learning rates and weight decay
    # of each kind of weight follow from how many times larger a model is than a base
    parametrization: str = "standard"
    base_hidden_size: int | None = None  # of the base, whose initial values are the standard ones; mup needs it
    base_num_layers: int | None = None  # of the base; mup needs it
    base_num_sub_layers: int | None = None  # of the base; mup needs it for a Kraken

    def validate(self) -> None:
        super().validate()
        require_choice("optim.parametrization", self.parametrization, PARAMETRIZATIONS)
        for name in ("base_hidden_size", "base_num_layers", "base_num_sub_layers"):
            if getattr(self, name) is not None:
                require_positive(f"optim.{name}", getattr(self, name))


@dataclass(frozen=True)
class MuonConfig(Optimizer):
    """Muon for the matrices of the model, AdamW for its embeddings, head and norms, with one learning rate.

    Updates by Muon are scaled to the root mean square of AdamW's (arXiv 2502.16982, section 2.2).
    """

    momentum: float  # decay rate of Muon's momentum, which is Nesterov's
    ns_steps: int  # Newton-Schulz iterations that orthogonalise a matrix
    name: Literal["muon"] = "muon"  # class of the optimizer

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum={self.momentum} must be at least 0 and less than 1")
        if not 1 <= self.ns_steps < 100:
            raise ConfigError(f"optim.ns_steps={self.ns_steps} must be between 1 and 99; 5 is usual")


AnyOptimizer = AdamWConfig | MuonConfig
