"""A stage of a release: what is known of a run before anything is written, and its promises.

- Everything a user can get wrong is found here, before torch is imported and a byte is written.

Alternatives considered:
- Finding it while writing: the missing data folder would be told after the hour of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.verify import verify_checkpoint
from k2train.data.manifest import Manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.errors import CheckpointError, RunError, UserError
from k2train.record.events import Entry, Started, of_kind
from k2train.release.choice import Line, Wanted, chosen, index_of
from k2train.report.collect import RunView, read_run
from k2train.retry import exists_retried, is_folder_retried


@dataclass(frozen=True)
class Artefact:
    """Something that a release promises: where it is, or why it is not there."""

    name: str
    stage: str
    place: str | None = None
    """Relative to the release; None: not released."""
    reason: str = ""


@dataclass(frozen=True)
class Stage:
    """A run that is released, and which of its checkpoints."""

    run: Path
    view: RunView
    checkpoints: Sequence[Path]
    lines: Sequence[Line]
    data: Manifest | None
    states: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.run.resolve().name

    @property
    def entries(self) -> Sequence[Entry]:
        """Its ledger."""
        return self.view.entries

    @property
    def model_bytes(self) -> int:
        """Bytes of the weights of its checkpoints in Hugging Face's form."""
        total = 0
        for path in self.checkpoints:
            facts = read_manifest(path).tensors.get("model", {}).values()
            width = 4 if any(one["dtype"] == "float32" for one in facts) else 2
            total += sum(prod(one["shape"]) * width for one in facts)
        return total

    def bytes_to_write(self, chunks: bool) -> int:
        """Return the bytes of models, states and data, as far as they are known before."""
        total = self.model_bytes
        if self.states:
            total += sum(read_manifest(path).total_bytes for path in self.checkpoints)
        if self.data is not None and chunks:
            total += sum(info.tokens * 4 for info in self.data.all_chunks())
        return total


def read_stage(run: Path, wanted: Wanted, data: Sequence[Path]) -> Stage:
    """Read what is released of a run.

    Raises RunError for what is no run, CheckpointError for a checkpoint that is not whole.
    """
    view = read_run(run)
    checkpoints = chosen(run, wanted)
    for path in checkpoints:
        verify_checkpoint(path)
    lines = index_of(run, view.entries, checkpoints, wanted.states)
    unknown = {path.name for path in checkpoints} - {
        one.checkpoint for one in lines if one.released
    }
    if unknown:
        name = min(unknown)
        raise CheckpointError(
            f"{run / 'checkpoints' / name}: is not the one that the ledger records; release others "
            "(--checkpoints), or restore it"
        )
    return Stage(run, view, checkpoints, lines, _data_of(run, view, data), wanted.states)


def refuse_same_names(stages: Sequence[Stage]) -> None:
    """Raise RunError where two runs would share a folder."""
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two runs are named {name}; a release has a folder for each name")


def _data_of(run: Path, view: RunView, given: Sequence[Path]) -> Manifest | None:
    """Return the manifest of the run's data: the given one that fits, else that of its config."""
    wanted = {started.data_manifest_sha256 for started in of_kind(view.entries, Started)}
    for place in given:
        found = read_data_manifest(place)
        if found.sha256 in wanted:
            return found
    if view.config is None:
        return None
    named = Path(view.config.data.manifest)
    for place in (named, run.resolve().parent.parent / named):
        if not exists_retried(place):
            continue
        try:
            found = read_data_manifest(place)
        except UserError:
            continue
        if found.sha256 in wanted:
            return found
    return None


def require_folder(out: Path) -> None:
    """Raise RunError where a release cannot be written to `out`."""
    if exists_retried(out):
        raise RunError(f"{out} exists; name a new folder, a release never overwrites one")
    parent = out.absolute().parent
    if not is_folder_retried(parent):
        raise RunError(f"{parent} is not a folder; make it, or name another place")
