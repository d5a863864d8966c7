"""Energy and emissions of a run: seconds or counted joules into kilowatt-hours and tonnes of CO2.

- *measured*: joules counted by the devices. *assumed*: power of a device x devices x seconds.
- `pue` (power usage effectiveness) is what the data center uses for a joule of its devices.
- Tonnes are those of the megawatt-hours as they are shown, with one decimal: so the arithmetic of
  a published pair holds. K2's 10.8 MWh are 4.2 t that way; 10.77 would be 4.1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from k2train.record.metrics import Record

JOULES_PER_KWH = 3.6e6
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class Site:
    """Where a run uses its energy.

    `device_watts`: power of a device where nothing is counted. `tonnes_per_mwh`: carbon intensity.
    """

    device_watts: float | None = None
    pue: float = 1.0
    tonnes_per_mwh: float | None = None

    def joules(self, device_seconds: float) -> float | None:
        """Joules of devices by their assumed power; None where none is known."""
        return None if self.device_watts is None else self.device_watts * device_seconds

    def megawatt_hours(self, joules: float) -> float:
        """Megawatt-hours of the data center for the joules of the devices."""
        return joules * self.pue / JOULES_PER_KWH / 1000.0

    def tonnes(self, joules: float) -> float | None:
        """Tonnes of CO2 of the megawatt-hours, as shown; None without a carbon intensity."""
        if self.tonnes_per_mwh is None:
            return None
        shown = self.megawatt_hours(joules)
        return (round(shown, 1) if shown >= 1 else shown) * self.tonnes_per_mwh


@dataclass(frozen=True)
class EnergyRecord(Record):
    """A line of `energy/rank_00003.jsonl`: joules of a device in an attempt so far, by phase."""

    joules: Mapping[str, float] | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        record = super().of(row)
        values = (record.joules or {}).values()
        if not all(isinstance(v, float | int) and math.isfinite(v) for v in values):
            raise ValueError("has joules that are no numbers")
        return record


def energy_text(site: Site, joules: float) -> str:
    """Format energy and emissions: `430.8 MWh, 165.9 t CO2`, `1.2 kWh`, `250 J, 0.03 g CO2`."""
    energy = site.megawatt_hours(joules)
    if energy >= 1:
        shown = f"{energy:,.1f} MWh"
    elif energy >= 1e-3:
        shown = f"{1e3 * energy:.1f} kWh"
    elif energy >= 1e-6:
        shown = f"{1e6 * energy:.1f} Wh"
    else:
        used = joules * site.pue
        shown = f"{used:,.0f} J" if used >= 100 else f"{used:.3g} J"
    tonnes = site.tonnes(joules)
    if tonnes is None:
        return shown
    mass = f"{tonnes:,.1f} t" if tonnes >= 1 else f"{1e3 * tonnes:.2f} kg"
    if tonnes < 1e-5:
        mass = f"{1e6 * tonnes:.2g} g"
    return f"{shown}, {mass} CO2"
