"""Ticks of logarithmic axes: enough of them have a label, however small the range. Imports matplotlib alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

LEAST, MOST = 3, 8  # ticks of an axis
DIGITS = ((1, 3), (1, 2, 5), range(1, 10))  # of ticks, where powers of the base are too few


def label_log_axis(axis: Axis, base: int = 10, text: Callable[[float], str] = "{:g}".format) -> None:
    """Label an axis, whose scale is logarithmic already, with the `text` of values."""
    axis.set_major_locator(ReadableLogLocator(base))
    axis.set_major_formatter(lambda value, _: text(value))
    axis.set_minor_formatter(NullFormatter())


class ReadableLogLocator(LogLocator):
    """Powers of the base, or what is between them where fewer than LEAST are in sight.

    matplotlib's own locator labels powers only, one or none of which may be in sight.
    """

    def __init__(self, base: int) -> None:
        super().__init__(base)
        self.base = base

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        low, high = sorted((vmin, vmax))
        if low <= 0:  # nothing is drawn
            return []
        for candidates in ticks_between(low, high, self.base):
            inside = [value for value in candidates if low <= value <= high]
            if len(inside) >= LEAST:
                break
        return inside


def ticks_between(low: float, high: float, base: int) -> Iterator[Sequence[float]]:
    """From the roundest to the finest choice; the values are at least about those from `low` to `high`."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    stride = math.ceil((last - first) / MOST)
    yield [float(base) ** power for power in range(first, last + 1) if power % max(stride, 1) == 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in DIGITS:
        yield [float(f"{digit}e{power}") for power in decades for digit in digits]
    yield MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
