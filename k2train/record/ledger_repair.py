"""Ledger repair: a new chain over what is intact, with the damaged file kept and the reason told.

- Lines before the damage stay, byte for byte. A `ledger_mended` event follows: what was wrong, why
  it was mended, the name and hash of the file as it was.
- Intact events from behind the damage follow it, with their own times and new links. Lines that
  cannot be read are in the kept file only.
- Heads that checkpoints hold of lines behind the damage are accepted by name in that event: they
  stay evidence, and stop no start.

Alternatives considered:
- Correcting a line in place: a ledger in which lines can be corrected proves nothing.
- Cutting off everything behind the damage: it loses events that are intact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from k2train.errors import RunError
from k2train.files import AtomicFile
from k2train.record.events import Entry, LedgerMended
from k2train.record.jsonl import read_lines
from k2train.record.ledger import chain_problem, checked_entries, encode_entry
from k2train.record.ledger_head import LedgerHead, head_problems, write_head
from k2train.retry import exists_retried


@dataclass(frozen=True)
class Examined:
    """What is left of a ledger, and what is wrong with it."""

    path: Path
    kept: tuple[bytes, ...]
    """Lines before the damage."""
    entries: tuple[Entry, ...]
    """Their events."""
    carried: tuple[Entry, ...]
    """Intact events from behind the damage."""
    lost: int
    """Lines that cannot be read."""
    problems: tuple[str, ...]
    heads: Mapping[str, LedgerHead]
    content: bytes | None
    """The whole file, None when it is missing."""


def examine(path: Path, heads: Mapping[str, LedgerHead]) -> Examined:
    """Examine the ledger at `path` against itself and the heads that others hold of it.

    Raises RunError when it cannot be read.
    """
    there = exists_retried(path)
    lines, rest = read_lines(path) if there else ([], b"")
    content = b"".join(line + b"\n" for line in lines) + rest if there else None
    found = [entry for _, entry in checked_entries(path, lines, rest)]
    problems = [str(entry) for entry in found if isinstance(entry, RunError)]

    entries: list[Entry] = []
    hashes: list[str] = []
    for line, entry in zip(lines, found, strict=False):
        if isinstance(entry, RunError):
            break
        if problem := chain_problem(path, entry, hashes):
            problems.append(problem)
            break
        entries.append(entry)
        hashes.append(sha256(line).hexdigest())

    behind = found[len(entries) :]
    carried = [entry for entry in behind if not isinstance(entry, RunError)]
    problems += head_problems(path, entries, hashes, heads) if not problems else []
    return Examined(
        path,
        tuple(lines[: len(entries)]),
        tuple(entries),
        tuple(carried),
        len(behind) - len(carried),
        tuple(problems),
        heads,
        content,
    )


def mend(found: Examined, reason: str) -> LedgerMended:
    """Write the mended ledger and return the event that says so.

    The damaged file is on disk under another name before anything is replaced. Raises OSError.
    """
    assert found.problems, "there is nothing to mend"
    kept = None if found.content is None else _keep(found.path, found.content)

    before = [sha256(line).hexdigest() for line in found.kept]
    unknown = [
        head
        for source, head in found.heads.items()
        if head_problems(found.path, found.entries, before, {source: head})
    ]
    event = LedgerMended(
        problem="; ".join(found.problems[:8]),
        reason=reason,
        kept=None if kept is None else kept.name,
        kept_sha256=None if found.content is None else sha256(found.content).hexdigest(),
        carried=len(found.carried),
        lost=found.lost,
        accepted=tuple(dict.fromkeys(head.sha256 for head in unknown)),
    )

    lines = list(_lines(found, event))
    with AtomicFile(found.path) as stream:
        stream.write(b"".join(line + b"\n" for line in lines))
    write_head(found.path, LedgerHead(len(lines), sha256(lines[-1]).hexdigest()))
    return event


def _lines(found: Examined, event: LedgerMended) -> Iterator[bytes]:
    yield from found.kept
    previous = sha256(found.kept[-1]).hexdigest() if found.kept else ""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    new = [(now, event), *((entry.time, entry.event) for entry in found.carried)]
    for number, (time, item) in enumerate(new, len(found.kept)):
        line = encode_entry(number, time, item, previous)[:-1]
        previous = sha256(line).hexdigest()
        yield line


def _keep(path: Path, content: bytes) -> Path:
    """Copy the damaged ledger to a name that is free."""
    number = 1
    while exists_retried(kept := path.with_name(f"ledger.damaged_{number}.jsonl")):
        number += 1
    with AtomicFile(kept) as stream:
        stream.write(content)
    return kept
