"""Numbers of tokens as people write them: 2B, 1.5B, 300M, 500k, or all digits."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3, "": 1}
WRITTEN = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?) ?([kmbt]?)", re.IGNORECASE)


def parse_tokens(value: object) -> int:
    """`2B`, `1.5B`, `300M`, `500k`, `1e9` or a whole number -> the number. Raises ValueError for anything else."""
    written = WRITTEN.fullmatch(str(value).strip())
    if isinstance(value, str | int | float) and not isinstance(value, bool) and written:
        number = Fraction(written[1].replace("_", "")) * UNITS[written[2].upper()]
        if number.denominator == 1:
            return int(number)
    raise ValueError("no whole number of tokens; give one such as 2B, 1.5B, 300M, 500k or 1000000")


def format_tokens(tokens: int) -> str:
    """`2B`, `1.5B` or `300M` where that is the exact number, else its digits: `2,000,158,720`."""
    for unit, size in UNITS.items():
        if unit and tokens >= size and tokens * 10 % size == 0:
            return f"{Decimal(tokens) / size:f}{'k' if unit == 'K' else unit}"
    return f"{tokens:,}"


Tokens = Annotated[int, BeforeValidator(parse_tokens)]  # the type of a setting
