"""Show the energy and the emissions of runs: by start, and by what they were spent on.

    python tools/energy.py RUN [RUN ...] [--device-watts W] [--pue P] [--tonnes-per-mwh T]
    python tools/energy.py --devices N --days D --device-watts W [...]

- A run whose devices have a counter was measured; any other one is computed from the power of a
  device. Each line says which.
- Without options the values are those of the run's config (section `energy`).
- With `--devices` and `--days` no run is needed: energy of a plan, or of a published figure.

Exit codes: 0 done; 2 a mistake in usage, or a run without a known power.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from command_line import Parser, command, positive

from k2train.errors import EXIT_DONE, RunError, UserError
from k2train.record.energy import SECONDS_PER_DAY, Site, energy_text
from k2train.report.collect import RunView, read_run
from k2train.report.energy import energy_of, site_of, summed
from k2train.report.time_account import KINDS, Spent
from k2train.report.time_account import summed as summed_time
from k2train.text import counted, duration, table

HEADINGS = (
    "start",
    "devices",
    "how",
    "seconds",
    *(f"{kind} J" for kind in KINDS[:-1]),
    "all J",
    "energy",
)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _options(arguments)
    if options.devices is not None:
        site = _site(options, Site())
        joules = site.joules(options.devices * options.days * SECONDS_PER_DAY)
        if joules is None:
            raise UserError("the power of a device is not known: give --device-watts")
        print(
            f"{counted(options.devices, 'device')}, {options.days:g} "
            f"day{'' if options.days == 1 else 's'}: {energy_text(site, joules)}"
        )
        return EXIT_DONE

    # Read everything before printing, so an error is one line and not half a table.
    runs = [read_run(run) for run in options.runs]
    print("\n\n".join("\n".join(lines_of(run, _site(options, site_of(run)))) for run in runs))
    return EXIT_DONE


def lines_of(run: RunView, site: Site) -> list[str]:
    """Lines of output for one run. Raises RunError where no power is known."""
    found = energy_of(run, site)
    if not found:
        raise RunError(
            f"{run.directory}: its devices have no counter, and energy.device_watts is not set: "
            "give --device-watts, the power of a device in watts"
        )
    times = {one.attempt: one for one in run.times}
    rows = [
        [
            str(one.attempt),
            f"{one.devices:,}",
            one.how,
            duration(times[one.attempt].seconds),
            *_joules(one.joules),
            energy_text(site, one.total),
        ]
        for one in found
    ]
    whole = summed(found)
    if len(rows) > 1:
        spent = summed_time([times[one.attempt] for one in found])
        rows.append(["all", "", "", duration(spent.total - spent.down), *_joules(whole), ""])
    lost = whole.redone + whole.skipped
    share = 100 * whole.useful / whole.total if whole.total else 0.0
    return [
        f"{run.name}: {energy_text(site, whole.total)}; PUE {site.pue:g}"
        + (f", {site.tonnes_per_mwh:g} t a MWh" if site.tonnes_per_mwh is not None else ""),
        f"useful {share:.1f}%, redone or left out {energy_text(site, lost)}",
        "",
        *table(HEADINGS, rows, ("start", "how")),
    ]


def _joules(spent: Spent) -> list[str]:
    """Joules by kind, and their sum. Devices use nothing of it between two starts."""
    assert fields(Spent)[-1].name == "down", "the last kind is the one without energy"
    values = [getattr(spent, name) for name in KINDS[:-1]]
    return [*(f"{value:,.0f}" if value else "-" for value in values), f"{sum(values):,.0f}"]


def _options(arguments: Sequence[str]) -> Namespace:
    parser = Parser(prog="energy.py", description="Energy and emissions of runs.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--device-watts", type=_amount, metavar="W", help="power of a device")
    parser.add_argument("--pue", type=_amount, metavar="P", help="power usage effectiveness")
    parser.add_argument("--tonnes-per-mwh", type=_amount, metavar="T", help="carbon intensity")
    parser.add_argument("--devices", type=positive, metavar="N", help="of a plan")
    parser.add_argument("--days", type=_amount, metavar="D", help="of a plan")
    options = parser.parse_args(arguments)
    if (options.devices is None) != (options.days is None):
        parser.error("--devices and --days belong together")
    if (options.devices is None) != bool(options.runs):
        parser.error("give runs, or --devices and --days")
    if options.pue is not None and options.pue < 1:
        parser.error(f"--pue must be at least 1, not {options.pue:g}")
    return options


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"must be a number above 0, not {text!r:.60}")
    return value


def _site(options: Namespace, known: Site) -> Site:
    given = (options.device_watts, options.pue, options.tonnes_per_mwh)
    had = (known.device_watts, known.pue, known.tonnes_per_mwh)
    watts, pue, tonnes = (h if g is None else g for g, h in zip(given, had, strict=True))
    return Site(watts, known.pue if pue is None else pue, tonnes)


if __name__ == "__main__":
    sys.exit(main())
