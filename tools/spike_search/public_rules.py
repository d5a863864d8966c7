"""Spike rules of other projects, written from their published descriptions, to compare with ours.

- Each takes a step's loss and gradient norm and says whether the rule flags the step. None of them
  gives a verdict, so how a flag ends is not theirs to say.
- Sources: OLMo-core's skip-step optimizer (128 steps, 6 standard deviations); OLMo 2's spike score
  (1,000 steps, 7 of them); llm.c's outlier detector (64 steps, the new value included); LLM
  Foundry's KillLossSpike (twice the mean of 100 steps, five times in a row); ZClip (exponential
  averages of the norm, 2.5); Megatron-LM's "spiky" loss (ten times the largest of the first 100).
"""

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Protocol


class Rule(Protocol):
    """A rule that sees one step after the other."""

    def flags(self, loss: float, grad_norm: float) -> bool:
        """Whether the rule flags this step."""
        ...


class Window:
    """Mean and standard deviation of the last values, from running sums.

    A value that is not a number stays in the sums for as long as it is in the window.
    """

    def __init__(self, length: int) -> None:
        self.values: deque[float] = deque(maxlen=length)
        self._sum = self._squares = 0.0
        self._bad = 0

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            self._count(self.values[0], -1)
        self.values.append(value)
        self._count(value, 1)

    def replace_last(self, value: float) -> None:
        self._count(self.values[-1], -1)
        self.values[-1] = value
        self._count(value, 1)

    def _count(self, value: float, sign: int) -> None:
        if math.isfinite(value):
            self._sum += sign * value
            self._squares += sign * value * value
        else:
            self._bad += sign

    @property
    def mean(self) -> float:
        return math.nan if self._bad else self._sum / len(self.values)

    @property
    def sd(self) -> float:
        variance = self._squares / len(self.values) - self.mean**2
        return math.nan if self._bad else math.sqrt(max(variance, 1e-18))

    def z(self, value: float) -> float:
        return (value - self.mean) / self.sd


class OlmoCoreSkipStep:
    """Skips a step of more than 6 standard deviations, which stays in the window."""

    def __init__(self) -> None:
        self.losses, self.norms = Window(128), Window(128)

    def flags(self, loss: float, grad_norm: float) -> bool:
        # Comparisons with NaN are false: a step that cannot be compared is skipped.
        usual = len(self.losses) < 64 or (
            self.losses.z(loss) <= 6.0 and self.norms.z(grad_norm) <= 6.0
        )
        self.losses.add(loss)
        self.norms.add(grad_norm)
        return not usual


class Olmo2Score:
    """Counts a loss of 7 standard deviations off the mean of the last 1,000 steps."""

    def __init__(self) -> None:
        self.losses = Window(1000)

    def flags(self, loss: float, grad_norm: float) -> bool:
        flagged = len(self.losses) == 1000 and abs(self.losses.z(loss)) >= 7.0
        self.losses.add(loss)
        return flagged


class LlmC:
    """Flags z above 6 over 64 values, the new one included; outliers go, unless 3 come in a row."""

    def __init__(self) -> None:
        self.losses, self.norms, self.in_a_row = Window(64), Window(64), 0

    def flags(self, loss: float, grad_norm: float) -> bool:
        last = [window.values[-1] if window.values else 0.0 for window in (self.losses, self.norms)]
        self.losses.add(loss)
        self.norms.add(grad_norm)
        flagged = len(self.losses) == 64 and not (
            self.losses.z(loss) <= 6.0 and self.norms.z(grad_norm) <= 6.0
        )
        self.in_a_row = self.in_a_row + 1 if flagged else 0
        if flagged and self.in_a_row < 3:
            self.losses.replace_last(last[0])
            self.norms.replace_last(last[1])
        return flagged


class KillLossSpike:
    """Ends a run at twice the mean of the last 100 losses, five times in a row."""

    def __init__(self) -> None:
        self.losses, self.in_a_row = Window(100), 0

    def flags(self, loss: float, grad_norm: float) -> bool:
        full = len(self.losses) == 100
        self.in_a_row = self.in_a_row + 1 if full and loss >= 2.0 * self.losses.mean else 0
        high = full and sum(value > 10.0 for value in self.losses.values) >= 50
        self.losses.add(loss)
        return self.in_a_row >= 5 or high


class ZClip:
    """Clips norms of z above 2.5 against exponential averages; what it clips counts as flagged."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def flags(self, loss: float, grad_norm: float) -> bool:
        if len(self.first) < 25:
            self.first.append(grad_norm)
            self.mean, self.variance = fmean(self.first), pstdev(self.first) ** 2
            return False
        sd = math.sqrt(self.variance) + 1e-6
        z = (grad_norm - self.mean) / sd
        flagged = z > 2.5
        value = self.mean + 2.5 * sd / (z / 2.5) if flagged else grad_norm
        self.mean = 0.97 * self.mean + 0.03 * value
        self.variance = 0.97 * self.variance + 0.03 * (value - self.mean) ** 2
        return flagged


class MegatronSpiky:
    """Calls a loss spiky at ten times the largest of the first 100."""

    def __init__(self) -> None:
        self.largest, self.seen = 0.0, 0

    def flags(self, loss: float, grad_norm: float) -> bool:
        self.seen += 1
        if self.seen <= 100:
            self.largest = max(self.largest, loss)
            return False
        return loss >= 10.0 * self.largest


RULES: dict[str, Callable[[], Rule]] = {
    "OLMo-core skip step": OlmoCoreSkipStep,
    "OLMo 2 score": Olmo2Score,
    "llm.c": LlmC,
    "KillLossSpike": KillLossSpike,
    "ZClip": ZClip,
    "Megatron 10x max": MegatronSpiky,
}
