"""What is done when a run does not go well."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_choice, require_positive


@dataclass(frozen=True)
class HealthConfig:
    """What is done when a run does not go well; see `kraken_train.health.loss_monitor` for what a spike is."""

    # time without a step, save, validation or restore after which the job ends, and three times that before the first
    # step; all ranks write their stacks to RUN_DIR/starts/NUMBER/logs first, as they do after `kill -USR2 PROCESS`;
    # less than the 1800 s after which collectives time out without such a message; 0: never
    step_seconds: float
    # warn about a rank whose own work takes so many times longer than that of the median rank; 0: never
    straggler_factor: float
    nonfinite: str  # stop | rollback: after max_nonfinite_steps
    # ignore | stop | rollback: to the newest checkpoint before the spike, and on with the data after it; a spike is
    # spike_steps losses in a row, each above median + spike_factor * deviation of the last spike_window ones; nothing
    # is saved meanwhile
    loss_spike: str
    # deviations above the median; the deviation is the median absolute one, at least 1% of the median
    spike_factor: float
    spike_window: int  # losses of which the median and the deviation are computed
    spike_steps: int  # losses in a row that make a spike
    max_rollbacks: int  # rollbacks of a start before the same step; after them it stops

    def validate(self) -> None:
        require_at_least("health.step_seconds", self.step_seconds, 0)
        if self.straggler_factor != 0 and not self.straggler_factor > 1:
            raise ConfigError(f"health.straggler_factor={self.straggler_factor} must be above 1, or 0 to tell of none")
        require_choice("health.nonfinite", self.nonfinite, ("stop", "rollback"))
        require_choice("health.loss_spike", self.loss_spike, ("ignore", "stop", "rollback"))
        require_positive("health.spike_factor", self.spike_factor)
        require_at_least("health.spike_window", self.spike_window, 2)
        require_positive("health.spike_steps", self.spike_steps)
        require_positive("health.max_rollbacks", self.max_rollbacks)
