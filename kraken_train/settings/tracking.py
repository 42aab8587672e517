"""A copy of the run for Weights & Biases or TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import Name
from kraken_train.common.validation import require_at_least, require_choice


@dataclass(frozen=True)
class TrackingConfig:
    """A copy of the run's metrics and events in Weights & Biases or TensorBoard."""

    kind: str  # wandb | tensorboard
    mode: str  # online | offline (W&B: in RUN_DIR/wandb, for `wandb sync`) | off
    project: Name  # project in W&B
    entity: Name | None  # user or team in W&B; null: the default one
    name: Name | None  # name of the run; null: that of the run folder
    group: Name | None  # group of runs; null: none
    tags: tuple[Name, ...]  # tags of the run
    notes: Name | None  # a text about the run; null: none
    finish_seconds: float  # longest wait at the end of training for data that has not been sent

    def validate(self) -> None:
        require_choice("tracking.kind", self.kind, ("wandb", "tensorboard"))
        require_choice("tracking.mode", self.mode, ("online", "offline", "off"))
        if self.kind == "tensorboard" and self.mode == "online":
            raise ConfigError("tracking.mode=online: TensorBoard only has files; use offline or off with it")
        require_at_least("tracking.finish_seconds", self.finish_seconds, 0)
