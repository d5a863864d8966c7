"""Verification of a run's merged checkpoints: their bytes, and the record of each. No torch.

- One that is gone is a note: it can be merged again, and nobody continues from it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from k2train.checkpoint.manifest import MANIFEST
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, RunError
from k2train.files import sha256_file
from k2train.record.events import CheckpointsMerged, of_kind
from k2train.record.ledger import read_ledger
from k2train.retry import exists_retried, is_folder_retried, list_retried

FOLDER = "merged"
"""Folder of a run's merged checkpoints."""
LEDGER = "ledger.jsonl"


def merged_problems(
    run: Path, events: Mapping[str, CheckpointsMerged], trusted: bool
) -> Iterator[tuple[str, bool]]:
    """Yield (finding, whether it is a note) for the merged checkpoints of a run.

    `events` are those of its ledger by checkpoint; `trusted` whether that ledger is whole.
    """
    folder = run / FOLDER
    there = sorted(list_retried(folder)) if is_folder_retried(folder) else []
    for path in there:
        if path.name.endswith(".tmp"):
            yield f"{path}: was never finished; the folder may be removed", True
            continue
        try:
            verify_checkpoint(path)
            event = events.get(f"{FOLDER}/{path.name}") or _own_event(path)
        except (CheckpointError, RunError) as error:
            yield str(error), False
            continue
        if event is None:
            if trusted:
                yield f"{path}: is in no ledger; its manifest alone says what was merged", True
        elif sha256_file(path / MANIFEST) != event.manifest_sha256:
            yield f"{path / MANIFEST}: is not the one that the ledger records", False

    for name in events:
        if not is_folder_retried(run / name):
            yield f"{run / name}: is gone, {LEDGER} records its merge", True


def _own_event(path: Path) -> CheckpointsMerged | None:
    """Event of a merge that was done while the run trained. Raises RunError."""
    if not exists_retried(path / LEDGER):
        return None
    found = of_kind(read_ledger(path / LEDGER), CheckpointsMerged)
    return found[-1] if found else None
