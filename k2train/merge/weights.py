"""Weights of a merge: equal, rising with the step, or given. No torch.

- `mean`: 1/n each. `linear`: proportional to 1 to n in the order of steps, so later ones count
  more.
- Given weights must sum to 1, unless they are to be normalized. A weight below 0 leaves the hull of
  the checkpoints, and must be asked for.

Alternatives considered:
- Normalizing without a word: a weight that was forgotten, or typed wrong, would not be seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from k2train.errors import UserError
from k2train.text import counted

Kind = Literal["mean", "linear", "given"]
TOLERANCE = 1e-6
"""How far from 1 the sum of given weights may be: what is typed has a few digits."""


@dataclass(frozen=True)
class Weights:
    """How checkpoints are weighted; `given` has the values of that kind, in the order named."""

    kind: Kind
    given: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, normalize: bool = False, negative: bool = False) -> "Weights":
        """Read `mean`, `linear`, or numbers such as `0.2,0.3,0.5`. Raises UserError."""
        if text in ("mean", "linear"):
            if normalize or negative:
                raise UserError(
                    f"--weights {text} needs neither --normalize nor --negative: they are for "
                    "given numbers"
                )
            return cls("mean" if text == "mean" else "linear")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise UserError(
                f"--weights ({text!r:.60}) must be mean, linear, or numbers with commas between: "
                "0.2,0.3,0.5"
            ) from None
        return cls("given", tuple(_checked(values, normalize, negative)))

    def of(self, count: int) -> list[float]:
        """Return the weight of each of `count` checkpoints: of `given` as named, else by steps.

        Raises UserError when there are not as many.
        """
        if self.kind == "mean":
            return [1 / count] * count
        if self.kind == "linear":
            total = count * (count + 1) / 2
            return [number / total for number in range(1, count + 1)]
        if len(self.given) != count:
            raise UserError(
                f"--weights has {counted(len(self.given), 'number')}, --checkpoints has "
                f"{counted(count, 'checkpoint')}; give one number for each"
            )
        return list(self.given)


def _checked(values: Sequence[float], normalize: bool, negative: bool) -> list[float]:
    for value in values:
        if not math.isfinite(value) or value == 0:
            raise UserError(
                f"--weights has {value}; each must be a finite number other than 0, and a "
                "checkpoint that should not count is left out of --checkpoints"
            )
        if value < 0 and not negative:
            raise UserError(
                f"--weights has {value}: a weight below 0 goes beyond the checkpoints; ask for it "
                "with --negative"
            )

    # A sum beyond the floats is refused like one that is not 1.
    total = sum(values)
    if not normalize:
        if abs(total - 1) > TOLERANCE:
            raise UserError(
                f"--weights sum to {total:.9g}, they must sum to 1; divide them by their sum with "
                "--normalize"
            )
        return list(values)
    if not total > 0 or not math.isfinite(total):
        raise UserError(
            f"--weights sum to {total:.9g}, which nothing can be divided by; raise them"
        )
    return [value / total for value in values]
