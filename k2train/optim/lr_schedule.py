"""Learning-rate schedules: cosine, linear, constant, warmup-stable-decay.

- Pure functions of the step. `rate(step)` is the rate used in that step; steps count from 1.
- Nothing is carried from step to step, so a restart cannot shift the schedule.
- Warm-up is linear and reaches the peak at step `warmup_steps`. The last step of the stage runs at
  `final` (constant: at `peak`).
"""

from collections.abc import Callable
from math import cos, pi

from k2train.errors import ConfigError


def rate(
    step: int,
    kind: str,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int | None = None,
) -> float:
    """Learning rate of step 1..total_steps.

    - cosine: half a cosine from peak to final (Loshchilov and Hutter 2017, arXiv:1608.03983,
      equation 5, one cycle).
    - linear: straight from peak to final.
    - constant: peak.
    - wsd: peak, then straight to final over the last `decay_steps` (Hu et al. 2024,
      arXiv:2404.06395, section 4).
    """
    assert 1 <= step <= total_steps, f"step {step} is outside 1..{total_steps}"

    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    if kind == "constant":
        return peak

    start = total_steps - decay_steps if kind == "wsd" and decay_steps else warmup_steps
    done = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    return _DECAY[kind](peak, final, done)


def _cosine(peak: float, final: float, done: float) -> float:
    return final + (peak - final) * 0.5 * (1.0 + cos(pi * done))


def _linear(peak: float, final: float, done: float) -> float:
    return peak + (final - peak) * done


_DECAY: dict[str, Callable[[float, float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _linear,
}


def check_schedule(kind: str, warmup_steps: int, total_steps: int, decay_steps: int | None) -> None:
    """Raise ConfigError when warm-up (and decay) do not fit into the steps of the stage."""
    if kind == "constant" and warmup_steps > total_steps:
        raise ConfigError(
            f"lr.warmup_steps ({warmup_steps}) must not exceed the steps of the stage "
            f"({total_steps}), or the rate never comes to lr.peak; lower it or add chunks"
        )
    if kind != "constant" and warmup_steps >= total_steps:
        raise ConfigError(
            f"lr.warmup_steps ({warmup_steps}) must be less than the steps of the stage "
            f"({total_steps}); lower it or add chunks"
        )
    if kind == "wsd" and decay_steps is not None and warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"lr.warmup_steps ({warmup_steps}) + lr.decay_steps ({decay_steps}) must not exceed "
            f"the steps of the stage ({total_steps}); lower either"
        )
