"""Hang diagnosis from outside: find the rank that blocks a run, from its heartbeat files.

    python tools/who_is_stuck.py RUN [--wait S] [--rows N]

- Works on any machine that can read the run's directory.
- Reads the heartbeats in RUN/watch for a few seconds, and applies the rules of the run's own
  watchdog. For a run that has ended, it shows the final report.
- The first line is the result; then the ranks, the most suspicious first.
- Needs no torch, contacts no process and writes nothing, so it cannot make anything worse.

Exit codes: 0 no rank is stuck; 1 one is; 2 no such run.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, EXIT_FAILED, RunError
from k2train.processes import this_process
from k2train.text import counted
from k2train.watchdog.failure_report import read_report
from k2train.watchdog.hang_analysis import (
    DEAD,
    FaultyRank,
    blame_order,
    fault_kind,
    find_dead_ranks,
    find_faulty_ranks,
)
from k2train.watchdog.heartbeat import Heartbeat, Observer, RankStatus, read_heartbeat

WAIT_SECONDS = 3.0
SLOW_SECONDS = 10.0
"""A shorter time in a phase is no reason for suspicion, unless a rank does not respond."""
HEADER = (
    f"{'rank':>5} {'host':<20} {'pid':>8} {'alive':<12} {'step':>8} {'phase':<18} {'for':>8} "
    " collective"
)


def ranks_of(directory: Path) -> int:
    """Number of ranks of the newest attempt. Raises FileNotFoundError without a heartbeat."""
    numbers = [int(path.stem.removeprefix("rank_")) for path in directory.glob("rank_*.json")]
    records = [
        record for rank in numbers if (record := read_heartbeat(directory, rank)) is not None
    ]
    if not records:
        raise FileNotFoundError(directory)
    return max(records, key=lambda record: (record.attempt, record.wall)).world_size


def look(directory: Path, wait: float) -> dict[int, RankStatus]:
    """Observe every rank for `wait` seconds."""
    observer = Observer(directory, ranks_of(directory), this_process(), time.monotonic)
    until = time.monotonic() + wait

    while True:
        observer.sample()
        left = until - time.monotonic()
        if left <= 0:
            return observer.statuses()
        time.sleep(min(0.25, left))


def blocking_ranks(seen: dict[int, RankStatus], silent_after: float) -> list[FaultyRank]:
    """Ranks that block the run; empty where ranks advance, or have waited for a short time only."""
    found = find_faulty_ranks(seen, silent_after)
    if not found or found[0].kind in DEAD:
        return found

    at_work = [one for one in seen.values() if one.record is not None and one.record.at_work]
    if any(one.moving for one in at_work):
        return []

    # The run's own watchdog may have decided already.
    stalled = any(one.record is not None and one.record.state == "stalled" for one in at_work)
    longest = max(one.record.seconds for one in at_work if one.record is not None)
    return found if stalled or longest >= SLOW_SECONDS else []


def row(rank: int, seen: RankStatus, silent_after: float) -> str:
    """One line of the table."""
    record = seen.record
    if record is None:
        return f"{rank:>5} {'-':<20} {'-':>8} no heartbeat"

    kind = fault_kind(seen, silent_after)
    alive = kind or record.state or "yes"
    return (
        f"{rank:>5} {record.process.host[:20]:<20} {record.process.pid:>8} {alive:<12} "
        f"{record.step:>8} {record.phase:<18} {record.seconds:>6.0f} s  "
        f"{'' if record.current else 'after '}{record.count} {record.current or record.last}"
    )


def ordered(seen: dict[int, RankStatus], silent_after: float) -> Iterable[int]:
    """Ranks, the most suspicious first."""
    lost = [one.rank for one in find_dead_ranks(seen, silent_after)]

    def key(rank: int) -> tuple[int, tuple[bool, bool, int, int], int]:
        record: Heartbeat | None = seen[rank].record
        if record is None or rank in lost:
            return (0, (False, False, lost.index(rank) if rank in lost else 0, 0), rank)
        return (1 if record.at_work else 2, blame_order(record, seen[rank].moving), rank)

    return sorted(seen, key=key)


def headline(
    found: list[FaultyRank], seen: dict[int, RankStatus], report: dict[str, object] | None
) -> str:
    """The result in one line."""
    working = [one for one in seen.values() if one.record is not None and one.record.at_work]

    if report is not None:
        return f"the run has ended: {report['line']}"
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return found[0].line() + others
    if not working:
        alone = "itself" if len(seen) == 1 else "themselves"
        return f"the run has ended: {counted(len(seen), 'rank')} exited by {alone}"
    steps = [one.record.step for one in working if one.record is not None]
    return f"no rank is stuck: {counted(len(working), 'rank')} at step {min(steps)}" + (
        f" to {max(steps)}" if max(steps) > min(steps) else ""
    )


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="who_is_stuck.py", description="Find the rank that blocks a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_SECONDS,
        metavar="S",
        help="seconds to observe (default: 3)",
    )
    parser.add_argument(
        "--rows", type=int, default=20, metavar="N", help="rows of the table (default: 20; 0: all)"
    )
    options = parser.parse_args(arguments)
    directory = options.run / "watch"

    try:
        seen = look(directory, max(options.wait, 0.5))
    except FileNotFoundError:
        raise RunError(
            f"{directory} has no heartbeat: give the directory of a run that was started with the "
            "watchdog on"
        ) from None
    # Heartbeats come once a second by default; one late beat does not count as silence.
    silent_after = 0.8 * max(options.wait, 0.5)

    report = read_report(directory)
    found = blocking_ranks(seen, silent_after)
    print(headline(found, seen, report))
    print(HEADER)

    shown = list(ordered(seen, silent_after))
    for rank in shown[: options.rows or None]:
        print(row(rank, seen[rank], silent_after))
    if options.rows and len(shown) > options.rows:
        print(f"... and {len(shown) - options.rows} more (--rows 0 shows all)")
    return EXIT_FAILED if report is not None or found else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
