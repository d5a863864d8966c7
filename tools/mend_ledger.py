"""Ledger repair: see what is wrong with a run's ledger, and go on from what is intact.

    python tools/mend_ledger.py RUN                      what is wrong, and what would be done
    python tools/mend_ledger.py RUN --reason "..."       do it

- A start refuses a ledger with a damaged line, one whose end was cut off, and one of another run.
  A copy of the right file is the best remedy. This tool is for the case that there is none.
- The file as it was stays beside the new one. The new one says what was wrong, and why it was
  mended; intact events from behind the damage follow.
- The run must not be going on: the tool takes its lock.
- Needs no torch.

Exit codes: 0 nothing to mend, or mended; 2 something is wrong and no reason was given, or the run
is going on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, EXIT_USAGE, RunError
from k2train.record.ledger_head import HEAD_FILE
from k2train.record.ledger_repair import Examined, examine, mend
from k2train.run_lock.lock import RunLock
from k2train.text import counted
from k2train.train.ledger_check import ledger_heads


def plan_of(found: Examined) -> str:
    """Say what mending would do."""
    kept = (
        "a new ledger begins"
        if found.content is None
        else f"{counted(len(found.entries), 'event')} before the damage stay as they are"
    )
    carried = f", {counted(len(found.carried), 'intact event')} from behind it follow"
    lost = f", {counted(found.lost, 'line')} cannot be read"
    return kept + (carried if found.carried else "") + (lost if found.lost else "")


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="mend_ledger.py", description="Mend the damaged ledger of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--reason", metavar="TEXT", help="do it; the ledger keeps this reason for its readers"
    )
    given = parser.parse_args(arguments)
    if given.reason is not None and not given.reason.strip():
        parser.error("--reason must say why")

    ledger = given.run / "ledger.jsonl"
    traces = (ledger, given.run / HEAD_FILE, given.run / "checkpoints")
    if not any(path.exists() for path in traces):
        raise RunError(f"{given.run} is not the directory of a run")

    with RunLock(given.run):
        found = examine(ledger, ledger_heads(ledger))
        if not found.problems:
            print(f"{ledger}: {counted(len(found.entries), 'event')}, whole; nothing to mend")
            return EXIT_DONE

        for problem in found.problems:
            print(problem, file=sys.stderr)
        if given.reason is None:
            print(
                f"{plan_of(found)}; restore the file from a copy if there is one, else do this "
                "with --reason TEXT",
                file=sys.stderr,
            )
            return EXIT_USAGE

        event = mend(found, given.reason.strip())
        was = "" if event.kept is None else f"; the file as it was is {event.kept}"
        print(f"{ledger}: mended: {plan_of(found)}{was}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
