"""Energy and emissions: a factor of 1,000 or 3,600, and K2's published figures."""

import pytest

from k2train.record.energy import SECONDS_PER_DAY, EnergyRecord, Site, energy_text

K2 = Site(340.0, 1.1, 0.385)


@pytest.mark.parametrize(
    ("devices", "days", "published"),
    [
        (480, 100, "430.8 MWh, 165.9 t CO2"),
        (480, 30, "129.3 MWh, 49.8 t CO2"),
        (240, 5, "10.8 MWh, 4.2 t CO2"),
    ],
)
def test_the_published_figures_of_k2(devices: int, days: int, published: str) -> None:
    """Catches a wrong unit, a PUE left out, and tonnes that do not fit the energy beside them."""
    joules = K2.joules(devices * days * SECONDS_PER_DAY)
    assert joules is not None and energy_text(K2, joules) == published


def test_small_amounts_keep_their_digits() -> None:
    """Catches a laptop's run shown as 0.0 MWh: 3.6 kJ are 1 Wh."""
    assert energy_text(Site(), 3600.0) == "1.0 Wh"
    # The run of a test: neither 0.0 Wh nor 0.00 kg.
    assert energy_text(Site(tonnes_per_mwh=0.36), 2000.0) == "2,000 J, 0.2 g CO2"
    assert energy_text(Site(pue=1.5), 3.0) == "4.5 J"
    assert energy_text(Site(tonnes_per_mwh=0.5), 3.6e6 * 20) == "20.0 kWh, 10.00 kg CO2"
    assert Site().joules(5.0) is None and Site().tonnes(5.0) is None


def test_joules_that_are_no_numbers_are_refused() -> None:
    """Catches a sum of words, and nan in the energy of a run."""
    row = {"step": 3, "attempt": 1, "joules": {"step": 2.5}}
    assert EnergyRecord.of(row).joules == {"step": 2.5}
    for bad in ("2.5", float("nan")):
        with pytest.raises(ValueError, match="no numbers"):
            EnergyRecord.of({**row, "joules": {"step": bad}})
