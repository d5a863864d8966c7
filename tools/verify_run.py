"""Run verification: the files of a run against each other, and every checkpoint byte for byte.

    python tools/verify_run.py RUN [--data [MANIFEST]]

- Reads ledger, metrics, state roots and config completely, and hashes every checkpoint.
- Compares the files: the ledger's hashes of manifests and config.yaml, the order of the fencing
  tokens, the roots of saved states.
- Every step up to the newest checkpoint must be on record, with its root and its scores: the same
  ones in metrics, held_out.jsonl, ledger and manifests.
- `--data` also verifies the data folder (of config.yaml, or the named one), and that its rows are
  the ids that each step was fed.
- One line per problem on stderr, with file and line. Traces that a kill explains are notes, not
  problems.
- Needs no torch.

Exit codes: 0 no problem; 2 any.

Alternatives considered:
- Stopping at the first problem: then it stays unknown what else must be restored.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, EXIT_USAGE
from k2train.record.ledger import run_notes
from k2train.record.metrics import damaged_rows
from k2train.text import counted
from verify_run_parts.checkpoints import check_checkpoints, check_kept, check_merged
from verify_run_parts.data import check_data
from verify_run_parts.ledger import (
    check_config,
    check_heads,
    check_ledger,
    check_steps,
    check_tokens,
)
from verify_run_parts.problem import HELD_OUT, LEDGER, METRICS, ROOTS, Problem


def problems_of(directory: Path, data: str | None) -> Iterator[Problem]:
    """Yield every problem and note of a run.

    Raises UserError when the directory is not a run, or its data cannot be found.
    """
    ledger = directory / LEDGER
    entries, damage = check_ledger(ledger)
    problems = damage or check_heads(ledger)
    yield from problems
    for line in run_notes(entry for _, entry in entries):
        yield Problem(line, note=True)
    for name in (METRICS, ROOTS, HELD_OUT):
        if (directory / name).exists():
            yield from map(Problem, damaged_rows(directory / name))

    yield from check_config(directory, entries)
    if not damage:
        yield from check_tokens(ledger, entries)
        yield from check_steps(directory, entries)
    yield from check_checkpoints(directory, entries, trusted=not problems)
    yield from check_kept(directory, entries if not problems else ())
    yield from check_merged(directory, entries, trusted=not problems)
    if data is not None:
        yield from check_data(directory, data, entries)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="verify_run.py",
        description="Check the files of a run against each other, to the last bit.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--data",
        nargs="?",
        const="",
        metavar="MANIFEST",
        help="verify the data too: that of config.yaml, or this one",
    )
    given = parser.parse_args(arguments)

    count = 0
    for problem in problems_of(given.run, given.data):
        print(
            f"note: {problem.text}" if problem.note else problem.text,
            file=None if problem.note else sys.stderr,
        )
        count += not problem.note

    print(
        f"{given.run}: {counted(count, 'problem') if count else 'whole'}",
        file=sys.stderr if count else None,
    )
    return EXIT_USAGE if count else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
