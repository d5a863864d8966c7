"""Axis scales and ticks of figures, linear and logarithmic.

- A scale maps values to a length in pixels; ticks are round numbers inside its range.
- Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TICKS = 6
"""About so many ticks on an axis."""


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers around `low` to `high`, about `count` of them."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step = next(
        step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count
    )
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """A map of `low` to `high` onto pixels `start` to `stop`; logarithmic if asked."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, cut off at the ends of the scale."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        share = (at - low) / ((high - low) or 1.0)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, count: int = TICKS) -> list[float]:
        """Return round numbers inside the range."""
        if not self.log:
            return [tick for tick in ticks(self.low, self.high, count) if self._has(tick)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        # Decades alone say too little where the range has one or two of them.
        factors = (1,) if last - first > 3 else (1, 2, 5)
        powers = range(first, last + 1)
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in found if self._has(tick)]
        if len(inside) < 2:
            return [tick for tick in ticks(self.low, self.high, count) if self._has(tick)]
        return inside[:: max(1, math.ceil(len(inside) / (count + 2)))]

    def _has(self, tick: float) -> bool:
        edge = 1e-9 * max(abs(self.low), abs(self.high))
        return self.low - edge <= tick <= self.high + edge


def range_of(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return the lowest and the highest value, a little apart where they are equal.

    With `log`, values that are not above 0 do not count.
    """
    counted = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not counted:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(counted), max(counted)
    if high > low:
        return low, high
    return (low / 2, high * 2) if log else (low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1)


def short_number(value: float) -> str:
    """Format the label of a tick: `200`, `1.5K`, `2M`, `0.0003`, `1e-07`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.10g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"
