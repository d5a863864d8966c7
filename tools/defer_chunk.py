"""Defer a chunk by hand: a line in the ledger moves it to a later position of the run's order.

    python tools/defer_chunk.py RUN 160 --why "..."                    to the end of the order
    python tools/defer_chunk.py RUN 160 --why "..." --to 200           to position 200, from 0
    python tools/defer_chunk.py RUN 160 --why "..." --expect "loss under 2.1 within 200 steps"
    python tools/defer_chunk.py RUN 160 --why "..." --from 160         go back to ckpt_160 as well
    python tools/defer_chunk.py RUN 160 --why "..." --dry-run          the order before and after

- The next start follows the new order; the config need not change.
- A chunk that has begun at the newest checkpoint is refused. With `--from` the next start goes back
  to an older checkpoint, and sets the later ones aside.
- What is expected is measured by the run, and written into the ledger.
- The run must not be going on: the tool takes its lock. Needs no torch.

Exit codes: 0 done; 2 the chunk cannot be deferred, or the run is going on.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, RunError
from k2train.expectation import parse_expectation
from k2train.record.ledger import Ledger
from k2train.run_lock.lock import RunLock
from k2train.text import counted
from k2train.train.deferral import Deferral, Wish, check_deferral

AROUND = 2
"""Chunks of the order that are shown on each side of a change."""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="defer_chunk.py", description="Move a chunk to later in a run's order.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("chunk", metavar="CHUNK", help="a chunk by number or name")
    parser.add_argument("--why", required=True, metavar="TEXT", help="the reason; it is kept")
    parser.add_argument("--to", type=int, metavar="INDEX", help="position, from 0; default: last")
    parser.add_argument("--expect", metavar="TEXT", help="what is to come of it, as run.expect")
    parser.add_argument("--from", dest="start", metavar="N", help="go back to that checkpoint")
    parser.add_argument("--data", type=Path, metavar="DATA", help="the data, if it has moved")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    if not given.why.strip() or not given.why.isprintable():
        parser.error("--why must say why, on one line")
    expect = None
    if given.expect is not None:
        try:
            expect = parse_expectation(given.expect).text
        except ValueError as error:
            parser.error(f"--expect {error}")

    path = given.run / "ledger.jsonl"
    if not path.exists():
        raise RunError(f"{given.run} is not the directory of a run that has started")

    wish = Wish(given.chunk, given.why.strip(), expect, given.to, given.start)
    with RunLock(given.run):
        ledger = Ledger(path)
        found = check_deferral(given.run, ledger.entries, wish, given.data)
        if not given.dry_run:
            ledger.append(found.event)

    print("\n".join(_lines(found, given.dry_run)))
    return EXIT_DONE


def _lines(found: Deferral, dry_run: bool) -> Iterator[str]:
    event = found.event
    i, total = found.before.names.index(event.chunk), len(found.before.names)
    yield f"{event.chunk}: position {i} -> {event.order_index} of {counted(total, 'chunk')}"
    yield f"before: {_order(found.before.names, i, event.order_index)}"
    yield f"after:  {_order(found.after.names, i, event.order_index)}"
    yield (
        f"the next start continues from {found.checkpoint}, step {event.step}; the first step "
        f"that reads other rows is {found.before.first_step(i)}"
    )
    if event.expect is not None:
        yield f"expected: {event.expect} (after step {event.step}); the run measures it"
    yield "nothing was written (--dry-run)" if dry_run else "written into the ledger"


def _order(names: Sequence[str], *places: int) -> str:
    """The chunks around some positions of the order; `...` for those between."""
    shown = {i for at in places for i in range(at - AROUND, at + AROUND + 1)}
    shown = {i for i in shown if 0 <= i < len(names)}
    parts, before = [], -1
    for i in sorted(shown):
        parts += ["..."] if i > before + 1 else []
        parts.append(names[i])
        before = i
    return " ".join(parts + (["..."] if before < len(names) - 1 else []))


if __name__ == "__main__":
    sys.exit(main())
