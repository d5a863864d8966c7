"""Ledger, config and metrics of a run against each other.

- Damaged lines, the hash chain, and the heads of it that are kept elsewhere.
- The config of the last start, the order of the fencing tokens, a record of every step.
"""

from collections.abc import Iterator
from pathlib import Path

from k2train.commands import program_text
from k2train.errors import RunError
from k2train.files import sha256_file
from k2train.record.events import CheckpointSaved, Entry, Resumed, Started
from k2train.record.jsonl import read_lines
from k2train.record.ledger import checked_entries, read_chain
from k2train.record.ledger_head import head_problems
from k2train.record.rollback_events import RolledBack
from k2train.record.step_gaps import step_problems
from k2train.train.ledger_check import ledger_heads
from verify_run_parts.problem import CONFIG, LEDGER, METRICS, ROOTS, Entries, Problem, events_of


def check_ledger(path: Path) -> tuple[list[tuple[int, Entry]], list[Problem]]:
    """Readable entries with their lines.

    Damaged lines, or else the first break of the hash chain.
    """
    found = list(checked_entries(path, *read_lines(path)))
    problems = [Problem(str(entry)) for _, entry in found if isinstance(entry, RunError)]
    # With a damaged line the chain is broken anyway.
    if not problems:
        try:
            read_chain(path)
        except RunError as error:
            problems = [Problem(str(error))]
    if problems:
        problems.append(
            Problem(f"a run goes on after {program_text('mend_ledger')} {path.parent}", True)
        )
    return [(line, entry) for line, entry in found if not isinstance(entry, RunError)], problems


def check_heads(path: Path) -> list[Problem]:
    """What the heads of a ledger that are kept elsewhere say against it."""
    # First the heads: a run that goes on appends to its ledger meanwhile.
    heads = ledger_heads(path)
    entries, hashes = read_chain(path)
    return [Problem(text) for text in head_problems(path, entries, hashes, heads)]


def starts_of(entries: Entries) -> list[tuple[int, Started | Resumed]]:
    """Starts of the run, with their lines."""
    events = events_of(entries)
    return [(line, event) for line, event in events if isinstance(event, Started | Resumed)]


def check_config(directory: Path, entries: Entries) -> Iterator[Problem]:
    """Check that config.yaml is the one of the last start."""
    path = directory / CONFIG
    starts = [(line, event) for line, event in starts_of(entries) if event.config_sha256]

    if not path.is_file():
        yield Problem(f"{path}: is missing")
    elif not starts:
        yield Problem(
            f"{path}: cannot be checked, the ledger is older than the record of its hash", note=True
        )
    elif sha256_file(path) != starts[-1][1].config_sha256:
        yield Problem(
            f"{path}: is not the config of the last start, whose hash is in {LEDGER}, line "
            f"{starts[-1][0]}; restore it, or start the run again, which rewrites it"
        )


def check_tokens(path: Path, entries: Entries) -> Iterator[Problem]:
    """Check that every start had a higher fencing token than the previous one.

    A run that goes back starts again in its process, under the token that it has.
    """
    before, line_before = 0, 0
    returns = [line for line, event in events_of(entries) if isinstance(event, RolledBack)]
    for line, event in starts_of(entries):
        token = event.fencing_token
        if not token:
            continue
        went_back = any(line_before < at < line for at in returns)
        if token < before or (token == before and not went_back):
            yield Problem(
                f"{path}: line {line} has fencing token {token}, line {line_before} had {before} "
                "before it"
            )
        before, line_before = token, line


def check_steps(directory: Path, entries: Entries) -> Iterator[Problem]:
    """Check that every step up to the newest checkpoint is on record."""
    saved = [event.step for _, event in events_of(entries) if isinstance(event, CheckpointSaved)]
    found = step_problems(directory / METRICS, directory / ROOTS, max(saved, default=0))
    yield from map(Problem, found)
