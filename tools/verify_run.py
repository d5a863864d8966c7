"""Run verification: the files of a run against each other, and every checkpoint byte for byte.

    python tools/verify_run.py RUN [--data [MANIFEST]]

- Reads ledger, metrics, state roots and config completely, and hashes every checkpoint.
- Compares the files: the ledger's hashes of manifests and config.yaml, the order of the fencing
  tokens, the roots of saved states.
- Every step up to the newest checkpoint must be on record, with its root and its scores.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command_line import Parser, command

from k2train.checkpoint.manifest import MANIFEST, CheckpointManifest, checkpoint_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.config.load import load_config
from k2train.data.inspect.fed_steps import fed_problems
from k2train.data.manifest import MANIFEST_NAME, read_manifest
from k2train.data.verify.chunks import verify_chunks
from k2train.data.verify.folder import verify_folder
from k2train.errors import EXIT_DONE, EXIT_USAGE, CheckpointError, RunError
from k2train.files import sha256_file
from k2train.record.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Entry,
    Event,
    Resumed,
    Started,
)
from k2train.record.jsonl import read_lines
from k2train.record.ledger import checked_entries, read_chain, run_notes
from k2train.record.ledger_head import head_problems
from k2train.record.metrics import RootRecord, StepRecord, checked_records, damaged_rows
from k2train.record.rollback_events import RolledBack, SpikeCheckpoint
from k2train.record.step_gaps import score_problems, step_problems, whole_records
from k2train.train.ledger_check import all_checkpoints, ledger_heads

LEDGER, METRICS, ROOTS, CONFIG = "ledger.jsonl", "metrics.jsonl", "state_roots.jsonl", "config.yaml"
HELD_OUT = "held_out.jsonl"
SET_ASIDE = "set_aside_by_attempt_"

Facts = Mapping[str, Any]


class Problem(NamedTuple):
    """One finding; `note` when a kill explains it."""

    text: str
    note: bool = False


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
        problems.append(Problem(f"a run goes on after tools/mend_ledger.py {path.parent}", True))
    return [(line, entry) for line, entry in found if not isinstance(entry, RunError)], problems


def check_heads(path: Path) -> list[Problem]:
    """What the heads of a ledger that are kept elsewhere say against it."""
    # First the heads: a run that goes on appends to its ledger meanwhile.
    heads = ledger_heads(path)
    entries, hashes = read_chain(path)
    return [Problem(text) for text in head_problems(path, entries, hashes, heads)]


def starts_of(entries: Sequence[tuple[int, Entry]]) -> list[tuple[int, Started | Resumed]]:
    """Starts of the run, with their lines."""
    events = _events(entries)
    return [(line, event) for line, event in events if isinstance(event, Started | Resumed)]


def check_config(directory: Path, entries: Sequence[tuple[int, Entry]]) -> Iterator[Problem]:
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


def check_tokens(path: Path, entries: Sequence[tuple[int, Entry]]) -> Iterator[Problem]:
    """Check that every start had a higher fencing token than the previous one.

    A run that goes back starts again in its process, under the token that it has.
    """
    before, line_before = 0, 0
    returns = [line for line, event in _events(entries) if isinstance(event, RolledBack)]
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


Save = tuple[int, CheckpointSaved, int]
"""Line, event and fencing token of a recorded checkpoint."""


class Saves:
    """Checkpoints that should exist by the ledger, by name."""

    def __init__(self, entries: Sequence[tuple[int, Entry]]) -> None:
        self.saved: dict[str, Save] = {}
        self.set_aside: dict[str, Save] = {}

        token = 0
        for line, event in ((line, entry.event) for line, entry in entries):
            if isinstance(event, Started | Resumed):
                token = event.fencing_token or 0
                for name in event.set_aside if isinstance(event, Resumed) else ():
                    if name in self.saved:
                        self.set_aside[f"set_aside_by_attempt_{event.attempt}/{name}"] = (
                            self.saved.pop(name)
                        )
            elif isinstance(event, CheckpointSaved):
                self.saved[event.checkpoint] = (line, event, token)
            elif isinstance(event, CheckpointRemoved):
                self.saved.pop(event.checkpoint, None)

    def all(self) -> dict[str, Save]:
        """Records by path below `checkpoints`."""
        return {**self.saved, **self.set_aside}


def check_checkpoints(
    directory: Path, entries: Sequence[tuple[int, Entry]], trusted: bool
) -> Iterator[Problem]:
    """Verify every checkpoint, then compare it with the ledger, unless that is damaged."""
    folder = directory / "checkpoints"
    there = all_checkpoints(folder)
    saves = Saves(entries).all()
    roots = _roots(directory / ROOTS)
    scores: list[tuple[str, int, str]] = []

    for path in there:
        name = path.relative_to(folder).as_posix()
        try:
            manifest = verify_checkpoint(path)
        except CheckpointError as error:
            # What a start found damaged and set aside is no part of the run any more.
            aside = name.startswith(SET_ASIDE)
            rest = "; a start set it aside, and the folder may be removed" if aside else ""
            yield Problem(f"{error}{rest}", note=aside)
        else:
            yield from _against_roots(path, manifest, roots)
            # One inside a chunk has the scores of the checkpoint before it.
            if manifest.name == checkpoint_name(manifest.chunks.consumed):
                scores += [(name, manifest.step, s.name) for s in manifest.held_out or ()]
            if trusted and name in saves:
                yield from _against_ledger(path, manifest, directory / LEDGER, *saves[name])

        if trusted and name not in saves:
            yield Problem(f"{path}: is not in the ledger; the next start will record it", note=True)

    yield from map(Problem, score_problems(directory / HELD_OUT, scores))

    # Recorded checkpoints that are neither present nor set aside.
    missing = [name for name in saves if trusted and folder / name not in there]
    for name in missing:
        line = saves[name][0]
        # Older versions removed those inside chunks without a line in the ledger.
        yield Problem(
            f"{folder / name}: is missing, {LEDGER}, line {line} records it", note="_step_" in name
        )


def _against_ledger(
    path: Path,
    manifest: CheckpointManifest,
    ledger: Path,
    line: int,
    event: CheckpointSaved,
    token: int,
) -> Iterator[Problem]:
    if sha256_file(path / MANIFEST) != event.manifest_sha256:
        yield Problem(f"{path / MANIFEST}: is not the one that {ledger}, line {line} records")
    if manifest.step != event.step:
        yield Problem(
            f"{path}: is of step {manifest.step}, {ledger}, line {line} says {event.step}"
        )

    own = manifest.fencing_token or 0
    # A save recorded by a later start was written under an earlier token.
    wrong = own and token and (own > token if event.recovered else own != token)
    if wrong:
        yield Problem(
            f"{path}: was written under fencing token {own}, {ledger}, line {line} was under "
            f"{token}: two runs wrote to it"
        )


def check_kept(directory: Path, entries: Sequence[tuple[int, Entry]]) -> Iterator[Problem]:
    """Verify the checkpoints kept beside spikes, and compare them with the ledger."""
    for line, event in _events(entries):
        if not isinstance(event, SpikeCheckpoint):
            continue
        path = directory / event.checkpoint
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            yield Problem(str(error))
            continue
        if sha256_file(path / MANIFEST) != event.manifest_sha256:
            yield Problem(f"{path}: is not the one that {directory / LEDGER}, line {line} records")


def check_steps(directory: Path, entries: Sequence[tuple[int, Entry]]) -> Iterator[Problem]:
    """Check that every step up to the newest checkpoint is on record."""
    saved = [event.step for _, event in _events(entries) if isinstance(event, CheckpointSaved)]
    found = step_problems(directory / METRICS, directory / ROOTS, max(saved, default=0))
    yield from map(Problem, found)


def _events(entries: Sequence[tuple[int, Entry]]) -> list[tuple[int, Event]]:
    return [(line, entry.event) for line, entry in entries]


def _roots(path: Path) -> dict[tuple[int, int], tuple[int, str]]:
    """State roots by (attempt, step), as (line, root)."""
    return {
        (record.attempt, record.step): (line, record.root)
        for line, record in whole_records(path, RootRecord)
        if record.root
    }


def _against_roots(
    path: Path, manifest: CheckpointManifest, roots: Mapping[tuple[int, int], tuple[int, str]]
) -> Iterator[Problem]:
    state = manifest.state
    known = roots.get((manifest.attempt, manifest.step))
    if state is not None and known is not None and state.root != known[1]:
        yield Problem(
            f"{path}: its state has root {state.root[:16]}, {ROOTS}, line {known[0]} says "
            f"{known[1][:16]}"
        )


def check_data(
    directory: Path, named: str, entries: Sequence[tuple[int, Entry]]
) -> Iterator[Problem]:
    """Check that the data folder is the run's, and whole.

    Raises UserError when it cannot be read.
    """
    path = Path(named) if named else Path(load_config(str(directory / CONFIG)).data.manifest)

    if not named and not path.is_absolute():
        # The path is relative to where the run was started, which is above its directory.
        above = [base / path for base in directory.resolve().parents]
        path = next(
            (found for found in above if (found / MANIFEST_NAME).is_file() or found.is_file()), path
        )

    manifest = read_manifest(path)
    for line, event in starts_of(entries):
        if isinstance(event, Started) and not manifest.is_named(
            (event.data_manifest_sha256, event.data_content_sha256)
        ):
            yield Problem(
                f"{manifest.path}: is not the data that {directory / LEDGER}, line {line} started "
                "with"
            )

    for report in verify_chunks(manifest, manifest.all_chunks()):
        yield from map(Problem, report.problems)
    yield from map(Problem, verify_folder(manifest))

    # Damaged lines have been told already.
    if (metrics := directory / METRICS).exists():
        records = (record for _, record in checked_records(metrics, StepRecord))
        whole = [record for record in records if not isinstance(record, RunError)]
        yield from map(Problem, fed_problems(manifest, whole))
        if any(record.ids is None for record in whole):
            yield Problem(
                f"{metrics}: steps without a hash of their ids, from an older version, cannot be "
                "compared with the data",
                note=True,
            )


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
        f"{given.run}: {f'{count} problems' if count else 'whole'}",
        file=sys.stderr if count else None,
    )
    return EXIT_USAGE if count else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
