"""Lengths that are given in optimizer steps or in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.token_counts import format_tokens
from kraken_train.common.validation import require_at_least
from kraken_train.recipe.batch_ramp import Step


@dataclass(frozen=True)
class Length:
    """A length, by its two settings. The one in tokens, where it is given, counts in place of the one in steps."""

    steps_setting: str
    steps: int
    tokens_setting: str
    tokens: int | None

    def validate(self, minimum: int) -> None:
        """Raises ConfigError."""
        require_at_least(self.steps_setting, self.steps, minimum)
        if self.tokens is not None:
            require_at_least(self.tokens_setting, self.tokens, minimum)

    @property
    def setting(self) -> str:
        """The name of the setting that counts."""
        return self.steps_setting if self.tokens is None else self.tokens_setting

    def __str__(self) -> str:
        """The setting that counts, as a user types it."""
        return f"{self.setting}={self.steps if self.tokens is None else format_tokens(self.tokens)}"

    def is_reached_by(self, step: Step) -> bool:
        """Whether a multiple of the length ends with or within the step; never for a length of 0."""
        if self.tokens is None:
            return self.steps > 0 and step.number % self.steps == 0
        return self.tokens > 0 and step.after.tokens // self.tokens > step.before.tokens // self.tokens
