"""Checkpoints of a run, byte for byte, against its ledger, its state roots and its scores.

- Numbered ones, those kept beside spikes, and merged ones.
- What the ledger records must be there, unless a start set it aside.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from k2train.checkpoint.manifest import MANIFEST, CheckpointManifest, checkpoint_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.files import sha256_file
from k2train.merge.verify import merged_problems
from k2train.record.events import (
    CheckpointRemoved,
    CheckpointSaved,
    CheckpointsMerged,
    Resumed,
    Started,
)
from k2train.record.metrics import RootRecord
from k2train.record.rollback_events import SpikeCheckpoint
from k2train.record.score_files import file_differences
from k2train.record.step_gaps import KnownScore, score_problems, whole_records
from k2train.train.ledger_check import all_checkpoints
from verify_run_parts.problem import HELD_OUT, LEDGER, METRICS, ROOTS, Entries, Problem, events_of

SET_ASIDE = "set_aside_by_attempt_"

Save = tuple[int, CheckpointSaved, int]
"""Line, event and fencing token of a recorded checkpoint."""


class Saves:
    """Checkpoints that should exist by the ledger, by name."""

    def __init__(self, entries: Entries) -> None:
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


def check_checkpoints(directory: Path, entries: Entries, trusted: bool) -> Iterator[Problem]:
    """Verify every checkpoint, then compare it with the ledger, unless that is damaged."""
    folder = directory / "checkpoints"
    there = all_checkpoints(folder)
    saves = Saves(entries).all()
    roots = _roots(directory / ROOTS)
    scores: list[KnownScore] = []

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
                scores += [
                    KnownScore(name, manifest.step, s.name, s.loss, s.rows)
                    for s in manifest.held_out or ()
                ]
            if trusted and name in saves:
                yield from _against_ledger(path, manifest, directory / LEDGER, *saves[name])

        if trusted and name not in saves:
            yield Problem(f"{path}: is not in the ledger; the next start will record it", note=True)

    scores += _scores_of_ledger(saves if trusted else {}, scores)
    yield from map(Problem, score_problems(directory / HELD_OUT, scores))
    for text, note in file_differences(directory / METRICS, directory / HELD_OUT):
        yield Problem(text, note)

    # Recorded checkpoints that are neither present nor set aside.
    missing = [name for name in saves if trusted and folder / name not in there]
    for name in missing:
        line = saves[name][0]
        # Older versions removed those inside chunks without a line in the ledger.
        yield Problem(
            f"{folder / name}: is missing, {LEDGER}, line {line} records it", note="_step_" in name
        )


def _scores_of_ledger(
    saves: Mapping[str, Save], known: Sequence[KnownScore]
) -> Iterator[KnownScore]:
    """Scores that the ledger has of numbered checkpoints, without those that are `known` alike."""
    same = {(score.step, score.set, str(score.loss), score.rows) for score in known}
    for line, event, _ in saves.values():
        if event.checkpoint != checkpoint_name(event.chunks_consumed):
            continue
        for score in event.held_out or ():
            if (event.step, score.name, str(score.loss), score.rows) not in same:
                where = f"{LEDGER}, line {line}"
                yield KnownScore(where, event.step, score.name, score.loss, score.rows)


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


def check_kept(directory: Path, entries: Entries) -> Iterator[Problem]:
    """Verify the checkpoints kept beside spikes, and compare them with the ledger."""
    for line, event in events_of(entries):
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


def check_merged(directory: Path, entries: Entries, trusted: bool) -> Iterator[Problem]:
    """Verify the run's merged checkpoints, and compare them with their ledgers."""
    merges = {
        event.checkpoint: event
        for _, event in events_of(entries)
        if isinstance(event, CheckpointsMerged)
    }
    for text, note in merged_problems(directory, merges if trusted else {}, trusted):
        yield Problem(text, note)


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
