"""Record of a merge: in the run's ledger, or beside the merged checkpoint while the run trains.

- A trainer holds the lock of its run and is the only writer of its ledger. A merge that finds the
  lock taken writes its event into `ledger.jsonl` inside the merged checkpoint instead, with a chain
  of its own.
- A checkpoint outside the run has no line anywhere: its manifest names what it was made of.

Alternatives considered:
- Refusing while the run trains: merged windows are looked at during a training.
- Waiting for the lock: it is held for weeks.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from k2train.errors import RunError, UnavailableError
from k2train.files import sha256_file
from k2train.merge.merge import Merge
from k2train.merge.verify import FOLDER, LEDGER
from k2train.record.events import CheckpointsMerged
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.merge_events import MergedFrom
from k2train.retry import exists_retried, reason
from k2train.run_lock.lock import RunLock


def is_inside(run: Path, path: Path) -> bool:
    """Whether a path lies in a run's directory."""
    return path.absolute().resolve().is_relative_to(run.resolve())


def check_place(run: Path, path: Path) -> None:
    """Raise RunError where a merged checkpoint must not lie, or its record cannot be kept.

    In the `checkpoints` of a run that has started it would stand for a state of that run.
    """
    ledger = path.parent.parent / LEDGER
    if path.parent.name == "checkpoints" and exists_retried(ledger):
        raise RunError(
            f"{path} would lie among the checkpoints of a run; leave --to out for "
            f"{run / FOLDER}, or name another place"
        )
    if is_inside(run, path) and exists_retried(run / LEDGER):
        # A broken chain is said before hours of work.
        read_ledger(run / LEDGER)


def commit_recorded(merge: Merge, run: Path, content: dict[str, Any]) -> Path | None:
    """Give a written merge its name, and record it; returns the ledger that has it.

    None for one outside of `run`. Raises RunError for a broken ledger, UnavailableError when the
    disk refuses.
    """
    try:
        if not is_inside(run, merge.path):
            merge.commit()
            return None
        return _commit_inside(merge, run, content)
    except OSError as error:
        raise UnavailableError(
            f"{merge.path} could not be written or recorded ({reason(error, run)})"
        ) from None


def _commit_inside(merge: Merge, run: Path, content: dict[str, Any]) -> Path:
    event = merged_event(merge, run, content)
    lock = RunLock(run)
    if exists_retried(run / LEDGER):
        # Refused where somebody trains the run: its ledger is theirs.
        with suppress(RunError):
            lock.acquire()
    if not lock.held:
        Ledger(merge.temporary / LEDGER).append(event)
        merge.commit()
        return merge.path / LEDGER
    try:
        ledger = Ledger(run / LEDGER)
        merge.commit()
        ledger.append(event)
    finally:
        lock.release()
    return run / LEDGER


def merged_event(merge: Merge, run: Path, content: dict[str, Any]) -> CheckpointsMerged:
    """Return the event of a written merge."""
    facts = [parent.facts for parent in merge.parents]
    return CheckpointsMerged(
        checkpoint=merge.path.resolve().relative_to(run.resolve()).as_posix(),
        step=content["step"],
        weights=merge.kind,
        parents=tuple(
            MergedFrom(
                path=part.path,
                step=part.step,
                weight=part.weight,
                manifest_sha256=part.manifest_sha256,
                root=part.root,
            )
            for part in facts
        ),
        bytes=sum(part.bytes for part in content["files"].values()),
        manifest_sha256=sha256_file(merge.temporary / "manifest.json"),
        root=content["state"]["root"],
    )
