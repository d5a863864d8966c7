"""Head of the ledger, kept outside of it: shows that lines were cut off, or that it is another one.

- A head is the number of events and the sha256 of the last line. `ledger.head` has that of the last
  append, and each checkpoint's manifest that of its save.
- A ledger may be longer than a head: events follow a save, and a kill can come between the append
  and the head. It may not be shorter, and its line of that number must be the same.
- The chain of hashes then covers every line before.
- An old head that a mended ledger cannot have is named in its `ledger_mended` event.

Alternatives considered:
- Heads in the checkpoints alone: what follows the newest one could be cut off without a trace.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from k2train.commands import program_text
from k2train.errors import RunError
from k2train.files import write_synced
from k2train.record.events import Entry, LedgerMended, of_kind
from k2train.record.jsonl import encode_line, parse_line
from k2train.record.line_check import has_check, line_problem, with_check
from k2train.safe_json import read_plain_file

HEAD_FILE = "ledger.head"
MAX_BYTES = 4096


class LedgerHead(NamedTuple):
    """State of a ledger after one of its events."""

    events: int
    sha256: str
    """That of the last line, "" where there is none."""


def remedy(ledger: Path) -> str:
    """What to do about a damaged ledger."""
    return f"restore it from a copy, or see `{program_text('mend_ledger')} {ledger.parent}`"


def write_head(ledger: Path, head: LedgerHead) -> None:
    """Write the head file beside a ledger. Raises OSError."""
    write_synced(ledger.with_name(HEAD_FILE), with_check(encode_line(head._asdict())).decode())


def read_head(ledger: Path) -> LedgerHead | None:
    """Read the head file beside a ledger; None when there is none, or it holds no head.

    Raises OSError and UnavailableError when it cannot be read.
    """
    try:
        path = ledger.with_name(HEAD_FILE)
        line = read_plain_file(path, MAX_BYTES).removesuffix(b"\n")
        row = parse_line(path, 1, line)
    except (FileNotFoundError, ValueError, RunError):
        # Without it the checkpoints' heads are left.
        return None

    # A damaged bit in it must not speak against a ledger that is whole.
    events, sha256 = row.get("events"), row.get("sha256")
    if not has_check(line) or line_problem(line, True):
        return None
    if type(events) is not int or events < 1 or type(sha256) is not str:
        return None
    return LedgerHead(events, sha256)


def head_problems(
    ledger: Path,
    entries: Sequence[Entry],
    hashes: Sequence[str],
    heads: Mapping[str, LedgerHead],
) -> list[str]:
    """Describe what `heads`, by the name of what holds them, say against a ledger.

    `hashes` has the sha256 of each line; both are empty for a missing ledger.
    """
    accepted = {head for mended in of_kind(entries, LedgerMended) for head in mended.accepted}
    found = []
    for source, head in heads.items():
        if head.events < 1 or head.sha256 in accepted:
            continue
        if not hashes:
            found.append(
                f"{ledger}: is missing or empty, {source} is of a run with {head.events} events"
            )
        elif head.events > len(hashes):
            found.append(
                f"{ledger}: has {len(hashes)} events, {source} is of a time when it had "
                f"{head.events}: its last lines were cut off, it was copied while the run went on, "
                "or it is that of another run"
            )
        elif hashes[head.events - 1] != head.sha256:
            found.append(
                f"{ledger}: line {head.events} is not the one that {source} names "
                f"({head.sha256[:12]}): it was changed, or it is the ledger of another run"
            )
    return found
