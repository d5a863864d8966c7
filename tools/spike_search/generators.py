"""Generated training series with a known event: what the detector and other rules are judged on.

- The learning curve has the shape of a large run: 10.4 nat at the start, 4.2 after a thousand
  steps, 2.7 after ten thousand. Noise is Gaussian, or a heavy-tailed t distribution with 4 degrees.
- The norm of the gradient falls in the first thousand steps, and that of the update, per learning
  rate, stays near.
- `bloom` has the losses and norms that the log of BLOOM-176B prints around its spike at iteration
  31,219 (bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles.md); the steps around them
  and between the last two printed ones are ours.

Alternatives considered:
- Real series alone: nobody knows where exactly their events begin.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOSS_NOISE = 0.02
NORM_NOISE = 0.12
UPDATE_NOISE = 0.03
BLOOM_FIRST = 31215
BLOOM = (
    (2.220, 0.947),
    (2.595, 2.390),
    (2.242, 15.886),
    (2.345, 145.119),
    (5.098, 960.351),
    (3.492, 353.201),
    (3.213, 379.330),
    (2.805, 650.246),
)
"""Loss and gradient norm of iterations 31215 to 31222, as printed."""


@dataclass(frozen=True)
class Point:
    """One step of a generated series."""

    step: int
    loss: float
    grad_norm: float
    update_norm: float


Noise = Callable[[random.Random], float]


def gaussian(source: random.Random) -> float:
    """Noise of spread 1."""
    return source.gauss(0.0, 1.0)


def heavy(source: random.Random) -> float:
    """Noise of a t distribution with 4 degrees of freedom, scaled to the same quartiles."""
    chi = sum(source.gauss(0.0, 1.0) ** 2 for _ in range(4))
    return source.gauss(0.0, 1.0) / math.sqrt(chi / 4) * 0.6745 / 0.7407


NOISES: dict[str, Noise] = {"gaussian": gaussian, "t(4)": heavy}


def curve(step: int) -> float:
    """Loss of a step without noise."""
    return 1.8 + 8.6 * (1.0 + step / 60.0) ** -0.45


def clean(steps: int, seed: int, noise: str = "gaussian", first: int = 1) -> list[Point]:
    """Generate a run in which nothing happens."""
    source, draw = random.Random(f"{seed} {noise}"), NOISES[noise]
    points = []
    for step in range(first, first + steps):
        log_grad = math.log(0.3) + 2.0 * math.exp(-step / 300.0)
        points.append(
            Point(
                step,
                curve(step) + LOSS_NOISE * draw(source),
                math.exp(log_grad + NORM_NOISE * draw(source)),
                math.exp(UPDATE_NOISE * draw(source)),
            )
        )
    return points


def changed(
    points: Sequence[Point],
    onset: int,
    loss: Callable[[int], float],
    grad: Callable[[int], float] = lambda after: 1.0,
    update: Callable[[int], float] = lambda after: 1.0,
) -> list[Point]:
    """Add a rise of the loss and factors of the norms, given by the steps since the onset."""
    return [
        point
        if point.step < onset
        else Point(
            point.step,
            point.loss + loss(point.step - onset),
            point.grad_norm * grad(point.step - onset),
            point.update_norm * update(point.step - onset),
        )
        for point in points
    ]


def bloom(points: Sequence[Point], onset: int) -> list[Point]:
    """Put BLOOM's spike into a series, above its own level: 2.215 nat and a norm of 0.25."""
    printed = len(BLOOM)

    def rise(after: int) -> float:
        if after < printed:
            return BLOOM[after][0] - 2.215
        return (BLOOM[-1][0] - 2.215) * math.exp(-(after - printed + 1) / 6.0)

    def factor(after: int) -> float:
        if after < printed:
            return BLOOM[after][1] / 0.25
        return 1.0 + (BLOOM[-1][1] / 0.25 - 1.0) * math.exp(-(after - printed + 1) / 3.5)

    return changed(points, onset, rise, factor)


def plateau(points: Sequence[Point], onset: int, nat: float) -> list[Point]:
    """Damage that stays: two steps of large norms, then quiet ones at a higher loss."""
    return changed(
        points,
        onset,
        lambda after: nat * (1.0 + 1.5 * math.exp(-after / 5.0)),
        lambda after: 1.0 + 20.0 * math.exp(-after / 2.0),
        lambda after: 1.0 + 1.0 * math.exp(-after / 3.0),
    )


def rising(points: Sequence[Point], onset: int, slope: float, most: float) -> list[Point]:
    """Drift: `slope` nat a step, up to `most`."""
    return changed(points, onset, lambda after: min(most, slope * after))


def level(points: Sequence[Point], onset: int, nat: float) -> list[Point]:
    """Other data: a small step of the loss, and nothing else."""
    return changed(points, onset, lambda after: nat)


def lost_moments(points: Sequence[Point], first_step: int) -> list[Point]:
    """A restart without moments: right once, then large updates and a loss that comes back."""

    def rise(after: int) -> float:
        return 0.0 if after == 0 else 0.35 * math.exp(-after / 60.0)

    return changed(
        points,
        first_step,
        rise,
        lambda after: 1.0 if after == 0 else 1.0 + 0.6 * math.exp(-after / 20.0),
        lambda after: 1.0 + 2.0 * math.exp(-after / 8.0),
    )


def not_a_number(points: Sequence[Point], at: int) -> list[Point]:
    """One step whose loss and norm are not numbers."""
    return [
        Point(point.step, math.nan, math.nan, point.update_norm) if point.step == at else point
        for point in points
    ]
