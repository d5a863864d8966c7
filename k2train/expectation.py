"""Expectations about a run: a measure, a bound and a number of steps, from one line of text.

- `held-out loss under 2.1 within 200 steps`: a change by hand says what it is to bring, and by
  when. The run then measures, and writes the outcome beside it.
- Strict: what is not understood is refused with the whole grammar, instead of never measured.

Alternatives considered:
- Free text: nobody comes back to it.
"""

import re
from dataclasses import dataclass
from math import inf, isfinite

HELD_OUT, LOSS, NORM = "held-out loss", "loss", "gradient norm"
GRAMMAR = (
    "MEASURE under A within N steps, MEASURE over A within N steps, or MEASURE within A to B "
    f"within N steps, where MEASURE is {HELD_OUT}, {LOSS} or {NORM}"
)
MOST_STEPS = 10**9

_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_FORM = re.compile(
    rf"(?P<measure>{HELD_OUT}|{LOSS}|{NORM}) "
    rf"(?:under (?P<under>{_NUMBER})|over (?P<over>{_NUMBER})"
    rf"|within (?P<low>{_NUMBER}) to (?P<high>{_NUMBER})) "
    r"within (?P<steps>[0-9]{1,10}) steps?"
)


@dataclass(frozen=True)
class Expectation:
    """What is expected: `measure` between `low` and `high` after `steps` more steps.

    A bound that was given is met at itself only between two of them: `under 2.1` is not met by 2.1.
    """

    text: str
    measure: str
    low: float
    high: float
    steps: int

    def is_met_by(self, value: float) -> bool:
        """Whether a measured value is what was expected; NaN never is."""
        if isfinite(self.low) and isfinite(self.high):
            return self.low <= value <= self.high
        return self.low < value < self.high


def parse_expectation(text: str) -> Expectation:
    """Return the expectation that a line of text states.

    Raises ValueError with the grammar where it states none.
    """
    words = " ".join(text.split())
    found = _FORM.fullmatch(words)
    if found is None:
        raise ValueError(f"must be {GRAMMAR}, is {words[:80]!r}")

    numbers = {key: float(found[key]) for key in ("under", "over", "low", "high") if found[key]}
    low = numbers.get("over", numbers.get("low", -inf))
    high = numbers.get("under", numbers.get("high", inf))
    if not all(map(isfinite, numbers.values())) or low > high:
        raise ValueError(f"must have finite bounds, the lower one first, is {words[:80]!r}")

    steps = int(found["steps"])
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"must be within 1 to {MOST_STEPS} steps, is {words[:80]!r}")
    return Expectation(words, found["measure"], low, high, steps)
