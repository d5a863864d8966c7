"""Section `measured` of a cluster file: lines of kernels and collectives, read and written.

- `tools/calibrate.py` writes it, and a plan then takes it in place of fitted constants.
- Microseconds, picoseconds a FLOP and picoseconds a byte: numbers that a person can compare.
- Left out, as in all shipped files, nothing changes.

Alternatives considered:
- A second file beside the cluster's: two files of one machine would part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from k2train.config.section import Section
from k2train.errors import ConfigError
from k2train.plan.measured import Line, Measured, RankSpeed

NotNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
KERNELS = (
    *("product forward", "product input", "product weight"),
    *("attention forward", "attention backward", "norm forward", "norm backward"),
    *("rotary forward", "rotary backward", "swiglu forward", "swiglu backward"),
    *("add", "embedding", "loss"),
)
"""Kernels that a measured precision has, in the file's order."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "weight-gather", "send")
"""Kinds of collectives that are measured."""

EARLIER = "layer_forward_us"
"""A key of files that earlier versions have measured."""


class LineSection(Section):
    """One line: a start, and what each FLOP and each byte costs."""

    start_us: NotNegative
    ps_per_flop: NotNegative = 0.0
    ps_per_byte: NotNegative = 0.0

    def line(self) -> Line:
        """Return it in seconds."""
        return Line(self.start_us * 1e-6, self.ps_per_flop * 1e-12, self.ps_per_byte * 1e-12)


class SpeedSection(Section):
    """One entry of `speeds`: a rank while `ranks` ranks compute at the same time."""

    ranks: Count
    threads: Count
    in_layer: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
    layer_host_forward_us: NotNegative
    layer_host_backward_us: NotNegative
    stage_forward_us: NotNegative
    stage_backward_us: NotNegative
    step_us: NotNegative
    optimizer_ps_per_parameter: NotNegative
    wait_us: NotNegative = 0.0
    wait_share: NotNegative = 0.0
    uneven: NotNegative = 0.0
    reference_ms: NotNegative = 0.0
    kernels: dict[str, dict[str, LineSection]]

    def speed(self) -> RankSpeed:
        """Return it in seconds."""
        kernels = {
            precision: {name: one.line() for name, one in lines.items()}
            for precision, lines in self.kernels.items()
        }
        return RankSpeed(
            self.ranks,
            self.threads,
            kernels,
            self.in_layer,
            self.layer_host_forward_us * 1e-6,
            self.layer_host_backward_us * 1e-6,
            self.stage_forward_us * 1e-6,
            self.stage_backward_us * 1e-6,
            self.step_us * 1e-6,
            self.optimizer_ps_per_parameter * 1e-12,
            self.wait_us * 1e-6,
            self.wait_share,
            self.uneven,
            self.reference_ms * 1e-3,
        )


class MeasuredSection(Section):
    """Section `measured`."""

    when: str
    processor: str
    torch: str
    cores: Count | None = None
    spread: Share
    error: Share
    speeds: Annotated[list[SpeedSection], Field(min_length=1)]
    collectives: dict[str, dict[int, LineSection]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _is_of_now(cls, given: Any) -> Any:
        """Refuse what was measured otherwise: under the new names it would be other times."""
        if EARLIER in json.dumps(given, default=str):
            raise ValueError(
                f"{EARLIER} is of an earlier calibration, without the starts of a layer's kernels; "
                "measure the machine again: tools/calibrate.py --out FILE.yaml"
            )
        return given

    def measured(self, path: str) -> Measured:
        """Return what a plan takes. Raises ConfigError for what is missing."""
        counts = [one.ranks for one in self.speeds]
        if counts != sorted(set(counts)):
            raise ConfigError(
                f"{path}: measured.speeds: ranks ({', '.join(map(str, counts))}) must grow"
            )
        for speed in self.speeds:
            for precision, lines in speed.kernels.items():
                missing = [name for name in KERNELS if name not in lines]
                if missing:
                    raise ConfigError(
                        f"{path}: measured.speeds of {speed.ranks} ranks, {precision}: "
                        f"{', '.join(missing)} missing; calibrate the machine again"
                    )
                free = [name for name, one in lines.items() if not any(vars(one).values())]
                if free:
                    raise ConfigError(
                        f"{path}: measured.speeds of {speed.ranks} ranks, {precision}: "
                        f"{free[0]} takes no time; calibrate the machine again"
                    )
        # One that nothing looks up would leave its place to the links, without a word.
        unknown = [kind for kind in self.collectives if kind not in COLLECTIVES]
        if unknown:
            raise ConfigError(
                f"{path}: measured.collectives.{unknown[0]}: no such kind; there are "
                f"{', '.join(COLLECTIVES)}"
            )
        return Measured(
            self.when,
            self.processor,
            self.torch,
            self.cores,
            self.spread,
            self.error,
            tuple(one.speed() for one in self.speeds),
            {
                kind: {size: one.line() for size, one in lines.items()}
                for kind, lines in self.collectives.items()
            },
        )


def measured_lines(measured: Measured) -> list[str]:
    """Section `measured` as YAML."""
    found = [
        "measured:  # by tools/calibrate.py; a plan takes these lines, and no fitted constants",
        f"  when: {json.dumps(measured.when)}",
        f"  processor: {json.dumps(measured.processor)}",
        f"  torch: {json.dumps(measured.torch)}",
    ]
    if measured.cores is not None:
        found.append(f"  cores: {measured.cores}  # that all ranks share; more ranks take turns")
    noise = "; NOISY: other programs ran, intervals are wider" if measured.noisy else ""
    found += [
        f"  spread: {measured.spread:.3f}  # quartiles of repeated times, for their median{noise}",
        f"  error: {measured.error:.3f}  # of the times around their lines",
        "  speeds:  # seconds = start + FLOPs and bytes at their rates",
    ]
    for speed in measured.speeds:
        found += _speed_lines(speed)
    if measured.collectives:
        found.append("  collectives:  # by number of ranks; bytes of the whole tensor")
    for kind, lines in measured.collectives.items():
        found.append(f"    {kind}:")
        found += [f"      {size}: {_flow(line)}" for size, line in lines.items()]
    return found


def _speed_lines(speed: RankSpeed) -> list[str]:
    numbers: Mapping[str, Any] = {
        "layer_host_forward_us": speed.layer_forward_seconds * 1e6,
        "layer_host_backward_us": speed.layer_backward_seconds * 1e6,
        "stage_forward_us": speed.stage_forward_seconds * 1e6,
        "stage_backward_us": speed.stage_backward_seconds * 1e6,
        "step_us": speed.step_seconds * 1e6,
        "optimizer_ps_per_parameter": speed.optimizer_seconds * 1e12,
    }
    found = [f"    - ranks: {speed.ranks}", f"      threads: {speed.threads}  # of each"]
    found.append(f"      in_layer: {digits(speed.in_layer)}  # of the lines below, in a layer")
    found += [f"      {name}: {digits(value)}" for name, value in numbers.items()]
    found += [
        f"      wait_us: {digits(speed.wait_seconds * 1e6)}  # of a layer's collective",
        f"      wait_share: {digits(speed.wait_share)}  # of a layer's work, besides",
        f"      uneven: {digits(speed.uneven)}  # the slowest rank's time beyond the mean",
        f"      reference_ms: {digits(speed.reference_seconds * 1e3)}  # a round of all kernels",
    ]
    found.append("      kernels:")
    for precision, lines in speed.kernels.items():
        found.append(f"        {precision}:")
        found += [f"          {name}: {_flow(line)}" for name, line in lines.items()]
    return found


def digits(number: float) -> str:
    """Format a number with five digits that count: a GPU's rates are thousandths of a CPU's."""
    return f"{number:.5g}"


def _flow(line: Line) -> str:
    parts = [f"start_us: {digits(line.start_seconds * 1e6)}"]
    if line.seconds_per_flop:
        parts.append(f"ps_per_flop: {digits(line.seconds_per_flop * 1e12)}")
    if line.seconds_per_byte:
        parts.append(f"ps_per_byte: {digits(line.seconds_per_byte * 1e12)}")
    return "{" + ", ".join(parts) + "}"
