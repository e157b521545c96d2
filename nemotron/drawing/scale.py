"""Axes of a chart: where a value stands, which values are written at it, and how."""

import math
from dataclasses import dataclass

import numpy as np

from nemotron.drawing.series import Numbers

LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which `auto` is logarithmic."""
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SMALLEST_SPAN = 1e-9
"""Of the values on an axis, as a share of the largest; less is noise of the last bits."""


@dataclass(frozen=True)
class Axis:
    """Maps values of `low` to `high` to pixels of `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, values: Numbers) -> Numbers:
        """Return the pixels of values, those outside at the nearest end."""
        low, high = self.low, self.high
        values = np.clip(values, low, high)
        if self.is_log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        """Return round values, at least so many unless an axis has fewer powers of ten."""
        if self.is_log:
            low, high = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            powers = [10.0**i for i in range(low, high + 1, max(1, (high - low) // number))]
            if len(powers) > 1:
                return powers
        span = (self.high - self.low) / number
        step = 10 ** math.floor(math.log10(span))
        step *= next(factor for factor in (5, 2, 1) if factor * step <= span * 1.01)
        first = math.ceil(self.low / step - 1e-9)
        found = [i * step for i in range(first, first + 6 * number)]
        return [tick for tick in found if tick <= self.high + step * 1e-9]


def axis(values: Numbers, start: float, end: float, scale: str = "linear") -> Axis:
    """Return the axis on which all of the values are, which are finite and at least one.

    `scale` is `linear`, `exact` (linear without a margin) or `auto`.
    """
    low, high = float(values.min()), float(values.max())
    if scale == "auto" and low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.1, high * 1.1, start, end, is_log=True)
    if high - low <= SMALLEST_SPAN * max(abs(low), abs(high)):
        margin = abs(high) / 10 or 1.0
        return Axis(low - margin, high + margin, start, end)
    margin = 0.0 if scale == "exact" else (high - low) / 20
    return Axis(low - margin, high + margin, start, end)


def short(value: float) -> str:
    """Return a value in few characters, such as 12.5k, 0.031 or 3e-4."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if size < 1e-12:
        return "0"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1e15:
        return f"{value:.2e}"
    for unit, suffix in SUFFIXES:
        if size >= unit * 10 or (size >= unit and unit > 1e3):
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"
