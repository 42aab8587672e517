"""What is looked at inside a run: traces of steps, and sizes by layer."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of optimizer steps, see `kraken_train.training.profiler`."""

    # [FIRST, LAST]: optimizer steps of which PyTorch's profiler writes a trace to RUN_DIR/starts/NUMBER/profiles; []:
    # none; `echo 5 > RUN_DIR/profile` traces the next 5 steps of a running job
    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)  # that write one
    memory: bool = False  # also a snapshot of the GPU's memory over these steps, for https://pytorch.org/memory_viz

    def validate(self) -> None:
        """Raises ConfigError."""
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ConfigError(f"profile.steps={list(self.steps)} must be the first and the last step, as in [100,110]")
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError(f"profile.ranks={list(self.ranks)} must be numbers of ranks, as in [0,7]; [] traces none")


@dataclass(frozen=True)
class NormsConfig:
    """Sizes of weights, updates and activations by layer, see `kraken_train.training.norms`."""

    # optimizer steps between those in which the sizes of weights, updates, activations and, in a Kraken, of the
    # exchanged sums are measured, layer by layer; 0: never
    every: int = 100

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("norms.every", self.every, 0)
