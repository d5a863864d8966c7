"""Runs as recorded, opened by a tool: ledger, newest readable checkpoint, data; and earlier stages.

- Not a command. Tools that ask what a run has read, or search in it, share it.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from k2train.checkpoint.manifest import checkpoint_name, list_checkpoints
from k2train.checkpoint.manifest import read_manifest as read_checkpoint
from k2train.data.inspect.run_progress import RecordedCheckpoint
from k2train.data.inspect.run_usage import Run
from k2train.data.manifest import read_manifest as read_data
from k2train.data.manifest import short_list
from k2train.data.trace.build import Index, open_index
from k2train.data.trace.exposures import Stage
from k2train.data.trace.findings import Corpus
from k2train.errors import CheckpointError, DataError, RunError
from k2train.record.events import StageTransition, of_kind
from k2train.record.ledger import read_ledger
from k2train.retry import exists_retried, is_folder_retried
from k2train.train.deferral import recorded_checkpoint

MOST_STAGES = 64
"""Stages that are followed back; a longer chain goes in a circle."""


def open_run(directory: Path, checkpoint: str | None = None, data: Path | None = None) -> Run:
    """Open a run from its ledger and a checkpoint; `data` if it has moved.

    With `checkpoint`, a number or name, that one's record alone answers.
    Raises RunError, CheckpointError or DataError.
    """
    if not is_folder_retried(directory):
        raise RunError(
            f"{directory} is not a directory; give that of a run, such as runs/demo-stage1"
        )
    entries = read_ledger(directory / "ledger.jsonl")
    asked = _checkpoint(directory, checkpoint) if checkpoint is not None else None
    return Run(directory, entries, asked or _newest_checkpoint(directory), asked, data)


def earlier_stages(run: Run) -> Iterator[Run | str]:
    """Yield the runs that a run's weights come from, each up to the checkpoint it was left at.

    Yields a note, and ends, where one cannot be read.
    """
    for _ in range(MOST_STAGES):
        moves = of_kind(run.entries, StageTransition)
        if not moves:
            return
        checkpoint = _located(Path(moves[-1].parent), run.directory)
        try:
            run = open_run(checkpoint.parents[1], checkpoint.name)
        except (RunError, CheckpointError, DataError, IndexError) as error:
            yield f"the stage before ({moves[-1].parent}) was not searched: {error}"
            return
        yield run


def corpora_of(path: Path, data: Path | None) -> tuple[list[Corpus], list[str]]:
    """Open a run's data and that of its earlier stages, or a data folder; notes of what lacks."""
    if not exists_retried(path / "ledger.jsonl"):
        return [Corpus(read_data(path), [])], []

    first = open_run(path, data=data)
    stages, notes = [Stage(first)], []
    for found in earlier_stages(first):
        if isinstance(found, Run):
            stages.append(Stage(found, branch=True))
        else:
            notes.append(found)

    corpora: dict[str, Corpus] = {}
    for stage in stages:
        manifest = stage.run.manifest
        known = corpora.setdefault(manifest.sha256, Corpus(manifest, []))
        corpora[manifest.sha256] = Corpus(known.manifest, [*known.stages, stage])
    return list(corpora.values()), notes


def indexes_of(corpora: Sequence[Corpus], folder: Path | None, check: bool = False) -> list[Index]:
    """Open the index of each corpus; with several, each has a folder of its own in `folder`."""
    found = []
    for corpus in corpora:
        own = (
            folder if folder is None or len(corpora) == 1 else folder / corpus.manifest.sha256[:12]
        )
        found.append(open_index(corpus.manifest, own, message=_tell, check=check))
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _located(written: Path, directory: Path) -> Path:
    """Locate a path of a config, which is relative to the directory where the run was started."""
    for base in (*directory.resolve().parents, Path()):
        if is_folder_retried(base / written):
            return base / written
    return written


def _newest_checkpoint(directory: Path) -> RecordedCheckpoint | None:
    for path in reversed(list_checkpoints(directory / "checkpoints")):
        try:
            return _recorded(path)
        except CheckpointError:
            # All checkpoints have the same order up to deferrals, which the ledger has too.
            continue
    return None


def _checkpoint(directory: Path, wanted: str) -> RecordedCheckpoint:
    folder = directory / "checkpoints"
    paths = {path.name: path for path in list_checkpoints(folder)}
    number = wanted.isascii() and wanted.isdigit()
    name = checkpoint_name(int(wanted)) if number else wanted
    if name not in paths:
        raise CheckpointError(
            f"{folder} has no {name}: it has {short_list(paths) if paths else 'none'}"
        )
    return _recorded(paths[name])


def _recorded(path: Path) -> RecordedCheckpoint:
    return recorded_checkpoint(read_checkpoint(path))
