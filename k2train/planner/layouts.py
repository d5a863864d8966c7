"""Layouts of a config on a cluster: what a search is asked, and the layouts that a user names.

- Days, energy and emissions need the tokens of the whole run: of its data, or said by the user.

Alternatives considered:
- Asking a legal config of every candidate: a search would load thousands of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from k2train.config.load import Config
from k2train.config.messages import nearest
from k2train.errors import ConfigError
from k2train.guard.save_interval import PRIOR_DEVICE_SECONDS
from k2train.plan.goodput import Reliability
from k2train.plan.hardware import Cluster
from k2train.plan.search import (
    RECOMPUTE,
    Choice,
    Found,
    Ranked,
    Space,
    broken_rule,
    choices,
    fits,
    rank_of,
    search,
)
from k2train.text import counted
from k2train.train.setup import architecture_of

DAY = 86400.0
NEAR_NODES = 4
"""Nodes more or less that are tried for a number of devices without a legal layout."""
DOUBLINGS = 6
"""Times the devices are doubled for a model that does not fit."""
NAMES = {
    "tensor": "tensor",
    "pipeline": "pipeline",
    "stages": "stages_per_rank",
    "stages_per_rank": "stages_per_rank",
    "micro": "micro_sequences",
    "micro_sequences": "micro_sequences",
    "recompute": "recompute",
}


@dataclass(frozen=True)
class Question:
    """A config, where it is to run, and how long."""

    config: Config
    cluster: Cluster
    devices: int
    tokens: float | None = None
    """Tokens of the whole run; None: not known."""

    @property
    def space(self) -> Space:
        """What the search holds fixed."""
        precision: str = "bf16" if self.config.precision == "auto" else self.config.precision
        precision = "fp8" if self.config.kernels.matmul == "fp8" else precision
        return Space(
            architecture_of(self.config),
            self.config.data.sequence_length,
            self.config.batch.global_sequences,
            self.devices,
            self.cluster,
            precision,
        )

    @property
    def configured(self) -> Choice:
        """The layout that the config has."""
        p, batch = self.config.parallel, self.config.batch
        stages, recompute = p.stages_per_rank, self.config.kernels.recompute
        return Choice(p.tensor, p.pipeline, stages, batch.micro_sequences, recompute)

    def training_seconds(self, step_seconds: float) -> float | None:
        """Seconds of all steps, nothing lost."""
        if self.tokens is None:
            return None
        return self.tokens / self.space.global_sequences / self.space.sequence_length * step_seconds

    @property
    def reliability(self) -> Reliability:
        """Failures at the published rate for so many devices (see `guard.save_interval`)."""
        every = self.config.checkpoint.every_seconds
        fixed = float(every) if not isinstance(every, str) and every > 0 else None
        return Reliability(PRIOR_DEVICE_SECONDS / self.devices, interval=fixed)

    def cost(self, step_seconds: float) -> dict[str, float | None]:
        """Days, MWh and t CO2eq of the whole run; None where a number is missing."""
        training = self.training_seconds(step_seconds)
        if training is None:
            return {"days": None, "mwh": None, "tonnes": None}
        energy = self.config.energy
        days = training / self.reliability.goodput / DAY
        watts = energy.device_watts or self.cluster.device.watts
        mwh = days * 24 * self.devices * watts / 1e6 * energy.pue
        tonnes = None if energy.tonnes_per_mwh is None else mwh * energy.tonnes_per_mwh
        return {"days": days, "mwh": mwh, "tonnes": tonnes}


def parse_choice(text: str, base: Choice) -> Choice:
    """Read `tensor=8,pipeline=4`; what is not named is that of `base`. Raises ConfigError."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        name = name.removeprefix("parallel.").removeprefix("batch.").removeprefix("kernels.")
        if name not in NAMES:
            near = nearest(name, list(NAMES))
            raise ConfigError(
                f"layout {text!r}: unknown name {name!r}; "
                + (f"nearest is {near}" if near else f"names are {', '.join(NAMES)}")
            )
        if NAMES[name] in values:
            raise ConfigError(f"layout {text!r}: {name} is named twice")
        if name == "recompute":
            if value not in RECOMPUTE:
                raise ConfigError(
                    f"layout {text!r}: recompute must be one of {', '.join(RECOMPUTE)}"
                )
            values[NAMES[name]] = value
        elif not value.isdigit() or int(value) < 1:
            raise ConfigError(f"layout {text!r}: {name} ({value}) must be a whole number above 0")
        else:
            values[NAMES[name]] = int(value)
    return replace(base, **values)


def checked(space: Space, choice: Choice) -> Ranked:
    """Rank a layout that a user names. Raises ConfigError for one that cannot be."""
    ranks = choice.tensor * choice.pipeline
    if space.devices % ranks:
        near = [count for count in (space.devices // ranks * ranks,) if count]
        near.append(space.devices // ranks * ranks + ranks)
        raise ConfigError(
            f"{choice.text()}: {space.devices} devices must be divisible by tensor "
            f"({choice.tensor}) x pipeline ({choice.pipeline}) = {ranks}; nearest that are: "
            f"{', '.join(map(str, near))}"
        )
    broken = broken_rule(space, choice)
    if broken and broken[0] != "tensor within a node":
        raise ConfigError(
            f"{choice.text()}: {broken[0]}: {broken[1]}{_nearest_text(space, choice)}"
        )
    return rank_of(space, choice)


def _nearest_text(space: Space, choice: Choice) -> str:
    """Name the legal layout that differs least."""
    legal = [one.choice for one in search(space).candidates]
    if not legal:
        return ""

    def distance(other: Choice) -> tuple[int, int]:
        pairs = zip(vars(choice).values(), vars(other).values(), strict=True)
        differences = [(a, b) for a, b in pairs if a != b]
        numbers = [abs(a - b) for a, b in differences if isinstance(a, int)]
        return len(differences), sum(numbers)

    return f"; nearest that can: {min(legal, key=distance).text()}"


def none_fits(found: Found) -> ConfigError:
    """Error for a model that fits nowhere, with the layout and the devices that are nearest."""
    space = found.space
    if found.nearest is None:
        rules = ", ".join(f"{rule} ({len(ones)})" for rule, ones in found.excluded.items())
        near = [count for count in _near_counts(space) if _has_legal(space, count)]
        counts = " and ".join(map(str, sorted(near[:2])))
        return ConfigError(
            f"no layout of {counted(space.devices, 'device')} is legal; excluded by: {rules}"
            + (f"; nearest numbers that have one: {counts}" if near else "")
        )
    choice, numbers = found.nearest
    return ConfigError(
        f"no layout fits {space.cluster.device.name} on {counted(space.devices, 'device')}: the "
        f"nearest is {choice.text()}, which needs {numbers}; {_enough_text(space)}"
    )


def _near_counts(space: Space) -> list[int]:
    """Numbers of devices around the asked one, whole nodes too, nearest first."""
    asked, node = space.devices, space.cluster.node
    nodes = {asked // node * node + step * node for step in range(-NEAR_NODES, NEAR_NODES + 1)}
    counts = nodes | set(range(asked - node, asked + node + 1))
    return sorted((one for one in counts if one > 0), key=lambda one: abs(one - asked))


def _has_legal(space: Space, devices: int) -> bool:
    """Whether any layout of so many devices is legal, whatever it needs."""
    other = replace(space, devices=devices)
    return any(broken_rule(other, choice) is None for choice in choices(other))


def _enough_text(space: Space) -> str:
    """Name the first doubling of the devices on which something fits."""
    for doubling in range(1, DOUBLINGS + 1):
        larger = replace(space, devices=space.devices << doubling)
        # What needs least: one sequence at a time, everything computed again.
        for choice in choices(larger):
            least = (choice.stages_per_rank, choice.micro_sequences, choice.recompute)
            if least == (1, 1, "full") and fits(larger, choice):
                return f"nearest that can: {larger.devices:,} devices with {choice.text()}"
    return (
        f"{space.devices << DOUBLINGS:,} devices are not enough either: take ones with more memory"
    )
