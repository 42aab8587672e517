"""Rules that settings obey. Each raises ConfigError with the setting, its value, the rule and what would work."""

from __future__ import annotations

import difflib
import math

from kraken_train.common.errors import ConfigError

LARGEST_TRIED = 1_000_000  # divisor


def require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}={value} must be greater than 0{' and finite' if value == math.inf else ''}")


def require_at_least(name: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise ConfigError(f"{name}={value} must be at least {minimum}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value} is not known; use {' or '.join(choices)}{suggestion(value, choices)}")


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        nearest = sorted(divisors(value), key=lambda d: abs(int(d) - divisor))[:4]
        raise ConfigError(
            f"{divisor_name}={divisor} does not divide {name}={value}; "
            f"near it, {', '.join(sorted(nearest, key=int))} would"
        )


def divisors(number: int) -> list[str]:
    """In ascending order; those of a huge number that are found at once."""
    small = [d for d in range(1, min(math.isqrt(max(number, 0)), LARGEST_TRIED) + 1) if number % d == 0]
    return [str(d) for d in sorted({*small, *(number // d for d in small)})]


def suggestion(value: object, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
