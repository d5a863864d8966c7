"""Curves of a run, as W&B and TensorBoard show them: names in groups, values of each row.

- The part of a name before the slash is its group: one section on the page.
- Loss is drawn over steps, over tokens and over hours of training, under one name each: no page has
  to be set up by hand.
- Effective training time is shown at checkpoints and at the end; energy is that of the steps.
- Rows, attempts and hashes are no curves. A value that is not known is left out.

Alternatives considered:
- The keys of `metrics.jsonl` as they are: forty panels in one section, half of them junk.
"""

import math

from k2train.record.energy import Site
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord

OWN_SET = "held_out"
"""The set of `data.manifest`, whose loss is the loss of the run."""
OVER_TOKENS, OVER_HOURS = "loss_over_tokens", "loss_over_hours"
TRAIN, HELD_OUT = "train", "held_out"


DEVICE = {
    "cpu_cores": ("cpu_cores", 1.0),
    "utilization": ("utilization_percent", 100.0),
    "memory_bytes": ("memory_gib", 2.0**-30),
    "power_watts": ("power_watts", 1.0),
    "celsius": ("celsius", 1.0),
}
"""Key of a step's `device` -> its curve and the factor to its unit."""


def _of_device(record: StepRecord) -> dict[str, float | None]:
    use = record.device or {}
    return {
        f"device/{name}": use[key] * factor
        for key, (name, factor) in DEVICE.items()
        if isinstance(use.get(key), float | int)
    }


class Curves:
    """Names and values of the curves of a run, row by row.

    - `rank_flops_per_token`: planned FLOPs of one rank for a token of the batch; 0 where unknown.
    - `site`: power of a device where rank 0's GPU does not tell it; `devices` are all of the run.
    """

    def __init__(
        self, rank_flops_per_token: float = 0.0, site: Site | None = None, devices: int = 0
    ) -> None:
        self._flops = rank_flops_per_token
        self._site = site or Site()
        self.devices = devices
        self._watts = self._site.device_watts
        self.began: float | None = None
        """When the run began, in seconds since 1970; None until it is known."""
        self.joules: float = 0.0
        """Energy of all devices in the steps up to the last one, as `trained_seconds`."""
        self.tokens = 0
        """Tokens of the stage up to the last step."""
        self.trained_seconds = 0.0
        """Seconds of all steps up to the last one, those that were undone left out."""

    @property
    def hours(self) -> float:
        """Hours of training up to the last step, without pauses between steps."""
        return self.trained_seconds / 3600

    def begin(self, tokens: int, trained_seconds: float, joules: float = 0.0) -> None:
        """Continue behind steps that took so many tokens, seconds and joules."""
        self.tokens, self.trained_seconds, self.joules = tokens, trained_seconds, joules

    def add(self, record: StepRecord) -> None:
        """Count a step."""
        seconds = record.seconds if math.isfinite(record.seconds) else 0.0
        self.tokens = record.consumed_tokens
        self.trained_seconds += seconds
        # Short steps share a reading of the power.
        self._watts = (record.device or {}).get("power_watts", self._watts)
        self.joules += (self._watts or 0.0) * self.devices * seconds

    def of_time(self, now: float) -> dict[str, float]:
        """Return the share of the time since the run began that went into steps that count.

        `now` is in seconds since 1970. {} where it is not known when the run began.
        """
        if self.began is None or now <= self.began:
            return {}
        passed = now - self.began
        return {
            "time/effective_percent": 100 * self.trained_seconds / passed,
            "time/hours": passed / 3600,
            "time/lost_hours": (passed - self.trained_seconds) / 3600,
        }

    def of_step(self, record: StepRecord) -> dict[str, float]:
        """Return the values of a step by the name of their curve."""
        self.add(record)
        energy = self._site.megawatt_hours(self.joules) * 1000
        flops = record.tokens_per_second * self._flops if self._flops else None
        values: dict[str, float | None] = {
            f"loss/{TRAIN}": record.loss,
            f"{OVER_TOKENS}/{TRAIN}": record.loss,
            f"{OVER_HOURS}/{TRAIN}": record.loss,
            "optimizer/grad_norm": record.grad_norm,
            "optimizer/lr": record.lr,
            "optimizer/update_norm": record.update_norm,
            "optimizer/skipped": float(not record.applied),
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/seconds_per_step": record.seconds,
            "speed/mfu": record.mfu,
            "speed/tflops_per_rank": None if flops is None else flops / 1e12,
            "energy/kwh": energy or None,
            "memory/peak_gib": record.peak_memory_bytes / 2**30 or None,
        }
        values |= _of_device(record)
        for name, (_, loss) in (record.subsets or {}).items():
            values[f"loss_by_subset/{name}"] = loss
        return {name: value for name, value in values.items() if value is not None}

    def of_score(self, record: HeldOutRecord) -> dict[str, float]:
        """Return the held-out losses of a set by the name of their curve."""
        name = HELD_OUT if record.set == OWN_SET else f"{HELD_OUT}_{record.set}"
        groups = ("loss", OVER_TOKENS, OVER_HOURS)
        losses = {f"{group}/{name}": record.loss for group in groups}
        by_subset = f"{name}_by_subset"
        return losses | {f"{by_subset}/{part}": loss for part, loss in record.subsets.items()}
