"""Energy of a run by what it was spent on, for each attempt: counted by the devices, or assumed.

- Counted joules of a phase (steps, saves, evaluations, starts) are split over useful, redone and
  skipped steps by their seconds.
- Devices of an attempt are its processes. Time between attempts is not counted: nothing ran.
- Where only a part of the devices counted, the attempt is assumed as a whole: a sum of both would
  be neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from k2train.errors import RunError
from k2train.record.energy import EnergyRecord, Site
from k2train.record.events import Resumed, Started
from k2train.record.metrics import checked_records
from k2train.report.collect import RunView
from k2train.report.time_account import AttemptTime, Spent
from k2train.retry import is_folder_retried, list_retried

STEPS = ("useful", "redone", "skipped")
PHASES = {"save": "saving", "evaluate": "evaluating", "start": "starting", "other": "other"}
MEASURED, ASSUMED = "measured", "assumed"


@dataclass(frozen=True)
class AttemptEnergy:
    """Joules of the devices in an attempt, by what they were spent on; `how` they are known."""

    attempt: int
    devices: int
    how: str
    joules: Spent
    """Joules in place of seconds."""

    @property
    def total(self) -> float:
        """All joules of the attempt."""
        return self.joules.total


def site_of(run: RunView) -> Site:
    """Return what the config of the run says of its site."""
    if run.config is None:
        return Site()
    energy = run.config.energy
    return Site(energy.device_watts, energy.pue, energy.tonnes_per_mwh)


def energy_of(run: RunView, site: Site) -> list[AttemptEnergy]:
    """Account for the energy of every attempt that is measured, or has an assumed power.

    Raises RunError for a damaged file of a counter.
    """
    counted = _counted(run)
    worlds = {
        event.attempt: event.world_size
        for event in run.events
        if isinstance(event, Started | Resumed)
    }
    found = []
    for time in run.times:
        devices = worlds.get(time.attempt, 0)
        own = counted.get(time.attempt, {})
        if devices and len(own) == devices:
            joules = _measured(time, list(own.values()))
            found.append(AttemptEnergy(time.attempt, devices, MEASURED, joules))
        elif site.device_watts is not None:
            joules = _assumed(time, site, devices)
            found.append(AttemptEnergy(time.attempt, devices, ASSUMED, joules))
    return found


def summed(attempts: Sequence[AttemptEnergy]) -> Spent:
    """Add up the joules of all attempts, by what they were spent on."""
    names = [one.name for one in fields(Spent)]
    return Spent(
        **{name: math.fsum(getattr(one.joules, name) for one in attempts) for name in names}
    )


def _assumed(time: AttemptTime, site: Site, devices: int) -> Spent:
    values = {one.name: getattr(time.spent, one.name) for one in fields(Spent)}
    values["down"] = 0.0
    return Spent(
        **{name: site.joules(seconds * devices) or 0.0 for name, seconds in values.items()}
    )


def _measured(time: AttemptTime, ranks: Sequence[Mapping[str, float]]) -> Spent:
    total = {name: math.fsum(one.get(name, 0.0) for one in ranks) for name in ("step", *PHASES)}
    seconds = {name: getattr(time.spent, name) for name in STEPS}
    whole = math.fsum(seconds.values())
    values = {kind: total[phase] for phase, kind in PHASES.items()}
    for name in STEPS:
        values[name] = total["step"] * seconds[name] / whole if whole else 0.0
    # Joules of steps that are on no record: the step that was under way at the end.
    values["other"] += 0.0 if whole else total["step"]
    return Spent(**values)


def _counted(run: RunView) -> dict[int, dict[str, Mapping[str, float]]]:
    """Return attempt -> file of a rank -> its joules by phase at the end of the attempt."""
    found: dict[int, dict[str, Mapping[str, float]]] = {}
    folder = run.directory / "energy"
    for path in list_retried(folder) if is_folder_retried(folder) else ():
        if not path.name.startswith("rank_"):
            continue
        for _, record in checked_records(path, EnergyRecord):
            if isinstance(record, RunError):
                raise record
            found.setdefault(record.attempt, {})[path.name] = record.joules or {}
    return found
