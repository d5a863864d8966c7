"""Ledger against run directory: lines that were cut off, and checkpoints that are lost.

- Heads are in `ledger.head` and in the manifest of every checkpoint (see `record.ledger_head`).
- A start compares the manifest that it continues from, since its head covers all lines before it.
  `verify_run` reads all of them, those set aside included.
- A checkpoint that the ledger records, and that is not there, is told. Without any the run would
  begin anew: that is refused, since a disk may only not be mounted.
- Without torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.errors import CheckpointError, RunError
from k2train.record.events import CheckpointRemoved, CheckpointSaved, Entry, Resumed
from k2train.record.ledger import read_chain
from k2train.record.ledger_head import HEAD_FILE, LedgerHead, head_problems, read_head, remedy
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.text import counted


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, those set aside last."""
    found = list_checkpoints(folder)
    for aside in sorted(list_retried(folder)) if is_folder_retried(folder) else []:
        if aside.name.startswith("set_aside_by_attempt_"):
            found += list_checkpoints(aside)
    return found


def ledger_heads(ledger: Path) -> dict[str, LedgerHead]:
    """All heads that the run's directory keeps of its ledger, by the name of what holds them.

    Damaged checkpoints are left out.
    """
    folder = ledger.parent / "checkpoints"
    paths = all_checkpoints(folder)
    names = (path.relative_to(folder).as_posix() for path in paths)
    return _head_file(ledger) | {
        name: head for name, (_, head) in zip(names, _heads_of(paths), strict=True) if head
    }


def check_ledger_heads(
    ledger: Path, entries: Sequence[Entry], hashes: Sequence[str], newest: Path | None
) -> None:
    """Compare the ledger, read with the sha256 of its lines, with the heads kept of it.

    `newest` is the checkpoint to continue from, whose manifest is good; None for a fresh start.
    Raises RunError when lines were cut off, or it is another ledger.
    """
    heads = _head_file(ledger)
    for path, head in _heads_of([] if newest is None else [newest]):
        if head is not None:
            heads[path.name] = head

    if head_problems(ledger, entries, hashes, heads):
        # A start before this one may have written its last line since the ledger was read.
        entries, hashes = read_chain(ledger) if exists_retried(ledger) else ([], [])
    if problems := head_problems(ledger, entries, hashes, heads):
        raise RunError(f"{problems[0]}; {remedy(ledger)}")


def lost_checkpoints(entries: Sequence[Entry], folder: Path) -> list[CheckpointSaved]:
    """Checkpoints that should be in `folder` by the ledger and are not, oldest first.

    A kill may come between a checkpoint's move and its line, so those set aside are not lost.
    """
    known: dict[str, CheckpointSaved] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, CheckpointSaved):
            known[event.checkpoint] = event
        elif isinstance(event, CheckpointRemoved):
            known.pop(event.checkpoint, None)
        elif isinstance(event, Resumed):
            for name in event.set_aside:
                known.pop(name, None)

    there = {path.name for path in all_checkpoints(folder)}
    return sorted(
        (event for name, event in known.items() if name not in there), key=lambda e: e.step
    )


def check_checkpoints_are_there(
    entries: Sequence[Entry], folder: Path, newest_step: int | None
) -> list[str]:
    """Return lines on newer checkpoints than the one of `newest_step` that are lost.

    `newest_step` is None where there is no checkpoint to continue from. Raises RunError when the
    run then would begin anew, although its ledger records checkpoints.
    """
    lost = [e for e in lost_checkpoints(entries, folder) if e.step > (newest_step or 0)]
    if lost and newest_step is None:
        raise RunError(
            f"{folder} has no checkpoint, and the ledger records {counted(len(lost), 'checkpoint')}"
            f" up to {lost[-1].checkpoint}, step {lost[-1].step}: mount their disk or bring them "
            "back; to start anew choose another run.name"
        )
    return [
        f"{event.checkpoint}, step {event.step}: is in the ledger, but not in {folder}"
        for event in reversed(lost)
    ]


def _head_file(ledger: Path) -> dict[str, LedgerHead]:
    head = read_head(ledger)
    return {} if head is None else {HEAD_FILE: head}


def _heads_of(paths: Iterable[Path]) -> Iterator[tuple[Path, LedgerHead | None]]:
    """Yield each checkpoint with its head; None for a damaged one and for one of older versions."""
    for path in paths:
        head = None
        # A damaged checkpoint is refused elsewhere, with its reason.
        with suppress(CheckpointError):
            if (facts := read_manifest(path).ledger) is not None:
                head = LedgerHead(facts.events, facts.sha256)
        yield path, head
