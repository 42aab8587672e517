"""From the weights of prepared folders to whole numbers of samples, which a `Blend` keeps exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError

LARGEST_PERIOD = 1_000_000  # samples after which a blend of data repeats: half a second and 16 MB to schedule


def whole_shares(weights: str | dict[str, Any], setting: str = "data_dir") -> dict[Path, int]:
    """Decimal weights as the smallest whole numbers in the same ratio: 0.75 and 0.25 are 3 and 1; one folder alone: 1.

    Raises ConfigError, naming the `setting`, for what is no weight, and where the numbers sum up to more than
    LARGEST_PERIOD.
    """
    weights = {weights: 1} if isinstance(weights, str) else weights
    for folder, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"{setting}: the weight {weight} of {folder} must be a number greater than 0, as in "
                "'data_dir={data/web: 0.7, data/books: 0.3}'"
            )
    fractions = [Fraction(str(weight)) for weight in weights.values()]  # what was typed, not its binary neighbour
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * denominator) for fraction in fractions]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LARGEST_PERIOD:
        raise ConfigError(
            f"{setting}: the weights {', '.join(map(str, weights.values()))} are in the ratio "
            f"{':'.join(map(str, shares))}, but the numbers may sum up to {LARGEST_PERIOD} at most so that they can "
            "be kept exactly; round the weights, or give whole numbers such as 2 and 1"
        )
    folders = {Path(folder).expanduser(): share for folder, share in zip(weights, shares, strict=True)}
    if len(folders) < len(weights):
        raise ConfigError(f"{setting} names a folder twice ({', '.join(weights)}); give it once, with one weight")
    return folders
