"""Judge the spike detector, and the public rules, on generated series whose events are known.

    python tools/bench_spikes.py
    python tools/bench_spikes.py --seeds 2 --clean 20000
    python tools/bench_spikes.py --series FILE.csv
    python tools/bench_spikes.py --train

- Prints Markdown tables: the delay from the onset to the first flag, the steps flagged and the
  verdict; flags in clean steps with two kinds of noise; the delay of each channel alone.
- Each scenario runs with several seeds; a figure is the median, a verdict the most frequent one.
- `--series` counts the events of real series, which are clean as far as anybody knows.
- `--train` trains a tiny model with one thing wrong and tells the delay of each channel. It needs
  torch, in a process of its own, and takes about a minute.
- The generators are `spike_search.generators`, the rules of others
  `spike_search.public_rules`.

Exit codes: 0 done; 1 a training failed; 2 a mistake in usage, one line on stderr.
"""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from command_line import Parser, command, positive

from benchmarks.gpu.processes import command_of
from k2train.errors import EXIT_DONE, UnavailableError
from k2train.guard.spike_verdict import CHANNELS, SpikeVerdict
from k2train.guard.spikes import SpikeAlert
from k2train.text import markdown_table
from spike_search import generators
from spike_search.generators import NOISES, Point
from spike_search.public_rules import RULES
from spike_search.search import search
from spike_search.series import read_series

FIRST = 60_001
"""First step of a series with an event, where the learning curve is nearly flat."""
ONSET = 65_000
LENGTH = 9500
RESTART_EVERY = 500


@dataclass(frozen=True)
class Scenario:
    """A series with a known event at `ONSET`."""

    name: str
    make: Callable[[list[Point]], list[Point]]
    restart: bool = False


SCENARIOS = (
    Scenario("BLOOM's spike, benign", lambda p: generators.bloom(p, ONSET)),
    Scenario("plateau of 0.5 nat", lambda p: generators.plateau(p, ONSET, 0.5)),
    Scenario("plateau of 0.3 nat", lambda p: generators.plateau(p, ONSET, 0.3)),
    Scenario("drift, 0.001 a step", lambda p: generators.rising(p, ONSET, 0.001, 2.0)),
    Scenario(
        "drift, 0.47 in 4,000 steps", lambda p: generators.rising(p, ONSET, 0.47 / 4000, 0.47)
    ),
    Scenario("other data, 0.05 nat", lambda p: generators.level(p, ONSET, 0.05)),
    Scenario("one NaN", lambda p: generators.not_a_number(p, ONSET)),
    Scenario("restart without moments", lambda p: generators.lost_moments(p, ONSET), True),
)


@dataclass
class Outcome:
    """What a rule said about one series."""

    flagged: list[int] = field(default_factory=list)
    verdict: str = ""
    verdict_step: int | None = None
    channels: dict[str, int] = field(default_factory=dict)
    """First step at which each channel alone alarmed."""


def ours(points: Sequence[Point], restart_at: int | None = None) -> Outcome:
    """Run our detector as a run would; a step is flagged while an event is open."""
    alert, found = SpikeAlert(), Outcome()
    for point in points:
        if point.step == restart_at:
            alert.attempt_began(point.step)
        if not math.isfinite(point.loss):
            found.flagged.append(point.step)
            found.verdict, found.verdict_step = "skipped", point.step
            continue
        verdicts = alert.observe(point.step, point.loss, point.grad_norm, point.update_norm)
        if alert.open is not None or verdicts:
            found.flagged.append(point.step)
        for verdict in verdicts:
            if verdict.kind != "opened" and (not found.verdict or point.step >= ONSET):
                found.verdict = found.verdict or verdict.kind
                found.verdict_step = found.verdict_step or verdict.step
    return found


def others(name: str, points: Sequence[Point]) -> Outcome:
    """Run a public rule."""
    rule = RULES[name]()
    return Outcome([p.step for p in points if rule.flags(p.loss, p.grad_norm)])


def channel_delays(
    points: Sequence[Point], restart_at: int | None, onset: int = ONSET
) -> dict[str, int]:
    """First alarm of each channel by itself, in steps after the onset."""
    found: dict[str, int] = {}
    for index, name in enumerate(CHANNELS):
        alert = SpikeAlert()
        for point in points:
            if point.step == restart_at:
                alert.attempt_began(point.step)
            values = [point.loss if index == 0 else 0.0, point.grad_norm, point.update_norm]
            only = [value if at == index else None for at, value in enumerate(values)]
            verdicts = alert.observe(point.step, values[0], only[1], only[2])
            if point.step >= onset and any(name in v.channels for v in verdicts):
                found[name] = point.step - onset
                break
    return found


def cell(outcomes: Sequence[Outcome]) -> str:
    """Delay of the first flag after the onset, steps flagged, and the verdict if there is one."""
    delays, counts, verdicts = [], [], Counter[str]()
    for outcome in outcomes:
        after = [step - ONSET for step in outcome.flagged if step >= ONSET]
        if after:
            delays.append(after[0])
            counts.append(len(after))
        if outcome.verdict and outcome.verdict_step is not None:
            verdicts[f"{outcome.verdict} +{outcome.verdict_step - ONSET}"] += 1
    if not delays:
        return "missed"
    text = f"+{median(delays):.0f}, {median(counts):.0f}"
    if len(delays) < len(outcomes):
        text += f" ({len(delays)} of {len(outcomes)})"
    kinds = Counter(name.split(" ")[0] for name in verdicts.elements())
    if kinds:
        kind, times = kinds.most_common(1)[0]
        steps = [int(name.split("+")[1]) for name in verdicts.elements() if name.startswith(kind)]
        text += f": **{kind}** +{median(steps):.0f} ({times} of {len(outcomes)})"
    return text


def scenario_rows(seeds: int) -> Iterator[list[str]]:
    """One row a scenario: our detector, then each public rule."""
    for scenario in SCENARIOS:
        series = [
            scenario.make(generators.clean(LENGTH, seed, first=FIRST)) for seed in range(seeds)
        ]
        restart_at = ONSET if scenario.restart else None
        yield [
            scenario.name,
            cell([ours(points, restart_at) for points in series]),
            *(cell([others(name, points) for points in series]) for name in RULES),
        ]


def clean_rows(steps: int, seeds: int) -> Iterator[list[str]]:
    """Flags in 10,000 clean steps with each kind of noise, and our verdicts.

    In the last row the run starts again every `RESTART_EVERY` steps.
    """
    for noise, restarts in [*((noise, False) for noise in NOISES), ("gaussian", True)]:
        counts: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for seed in range(seeds):
            points = generators.clean(steps, seed, noise)
            kinds.update(kinds_in(points, RESTART_EVERY if restarts else None))
            for name in RULES:
                counts[name] += 0 if restarts else len(others(name, points).flagged)
        total = steps * seeds
        shown = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds)) or "none"
        rate = (kinds["opened"] + kinds["restart"]) * 10_000 / total
        yield [
            f"{noise}, {total:,} steps" + f", {total // RESTART_EVERY:,} starts" * restarts,
            f"{rate:.2f} ({shown})",
            *("" if restarts else f"{counts[name] * 10_000 / total:.2f}" for name in RULES),
        ]


def kinds_in(points: Sequence[Point], restart_every: int | None) -> Iterator[str]:
    """Kinds of the verdicts of our detector."""
    alert = SpikeAlert()
    for point in points:
        if restart_every and point.step % restart_every == 0:
            alert.attempt_began(point.step)
        values = point.loss, point.grad_norm, point.update_norm
        yield from (verdict.kind for verdict in alert.observe(point.step, *values))


def channel_rows(seeds: int) -> Iterator[list[str]]:
    """Delay of each channel alone, in steps after the onset."""
    for scenario in SCENARIOS:
        if scenario.name == "one NaN":
            continue
        restart_at = ONSET if scenario.restart else None
        found = [
            channel_delays(scenario.make(generators.clean(LENGTH, seed, first=FIRST)), restart_at)
            for seed in range(seeds)
        ]
        row = [scenario.name]
        for name in CHANNELS:
            delays = [one[name] for one in found if name in one]
            row.append(f"+{median(delays):.0f}" if delays else "silent")
        yield row


def trained_rows() -> Iterator[list[str]]:
    """Delay of each channel alone in real trainings, and what all of them say together."""
    command = command_of("spike_search.tiny_runs", [], {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise UnavailableError(f"a training ended with exit code {done.returncode}: {last}")

    for line in done.stdout.splitlines():
        run = json.loads(line)
        points = [Point(step, *values) for step, values in enumerate(run["steps"], 1)]
        restart_at = run["onset"] if run["name"].startswith("restart") else None
        delays = channel_delays(points, restart_at, run["onset"])
        said = [
            f"{verdict.kind} +{verdict.step - run['onset']}"
            for verdict in verdicts_of(points, restart_at)
        ]
        row = [f"+{delays[name]}" if name in delays else "silent" for name in CHANNELS]
        yield [run["name"], *row, ", ".join(said) or "nothing"]


def verdicts_of(points: Sequence[Point], restart_at: int | None) -> Iterator[SpikeVerdict]:
    """Verdicts of our detector on a series."""
    alert = SpikeAlert()
    for point in points:
        if point.step == restart_at:
            alert.attempt_began(point.step)
        yield from alert.observe(point.step, point.loss, point.grad_norm, point.update_norm)


def series_rows(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Events of real series by kind, and how many steps a second were read and searched."""
    for path in paths:
        began = time.process_time()
        series = read_series(path)
        found = [*search(series)]
        seconds = time.process_time() - began
        steps = sum(len(attempt.rows) for attempt in series.attempts)
        kinds = Counter(event.kind for event in found)
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
        yield [path.name, f"{steps:,}", shown, f"{steps / seconds:,.0f}"]


@command
def main(arguments: Sequence[str]) -> int:
    """Print the tables; the exit code."""
    parser = Parser(description="Judge the spike detector on series whose events are known.")
    parser.add_argument("--seeds", type=positive, default=10, metavar="N", help="series a figure")
    parser.add_argument(
        "--clean", type=positive, default=100_000, metavar="STEPS", help="clean steps a seed"
    )
    parser.add_argument(
        "--series", nargs="+", type=Path, metavar="FILE", help="count the events of these instead"
    )
    parser.add_argument("--train", action="store_true", help="train a tiny model instead")
    options = parser.parse_args(arguments)

    if options.train:
        heads = ["what is wrong", *CHANNELS, "together"]
        print(*markdown_table(heads, trained_rows()), sep="\n")
        return EXIT_DONE
    if options.series:
        heads = ["series", "steps", "events", "steps a second"]
        print(*markdown_table(heads, series_rows(options.series)), sep="\n")
        return EXIT_DONE

    print(f"Onset at step {ONSET}, seeds 0 to {options.seeds - 1}. First flag, steps flagged.\n")
    heads = ["k2train", *RULES]
    print(*markdown_table(["series", *heads], scenario_rows(options.seeds)), sep="\n")
    print("\nFlags in 10,000 clean steps.\n")
    print(*markdown_table(["noise", *heads], clean_rows(options.clean, options.seeds)), sep="\n")
    print("\nFirst alarm of each channel alone, after the onset.\n")
    print(*markdown_table(["series", *CHANNELS], channel_rows(options.seeds)), sep="\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
