"""What the record of a run knows, for documents about it: config, code, checkpoints, data, energy.

- Names of people, machines and paths stay out: keys of the config that hold them are named, and
  their values withheld.
- What a record does not know is a line of the open points, never a guess.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from k2train.checkpoint.manifest import manifest_sha256, read_manifest
from k2train.config.schema import flat_values
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.errors import RunError, UserError
from k2train.evaluation.results import TaskResult, read_results
from k2train.record.events import CheckpointSaved, Finished, StageTransition, Started, of_kind
from k2train.report.collect import RunView, read_run
from k2train.report.energy import energy_of, site_of, summed
from k2train.retry import is_folder_retried

WITHHELD = frozenset({"run.directory", "run.init_from", "run.why", "run.expect", "data.manifest"})
"""Keys of the config whose values are paths, or words of a person."""
WITHHELD_SECTIONS = ("wandb.",)
"""Sections that name people, teams and accounts."""
SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"[/\\~]")


class CheckpointFact(NamedTuple):
    """A checkpoint on record; without `state_root` where it is no longer on the disk."""

    event: CheckpointSaved
    state_root: str | None


class Energy(NamedTuple):
    """Energy of a run's devices, with what its data center adds, and emissions."""

    kwh: float
    tonnes: float | None
    how: str
    """"measured", "assumed", or both."""


def is_sha256(text: str | None) -> bool:
    """Return whether a text is a SHA-256 in hexadecimal; hand-made folders have other names."""
    return text is not None and SHA256.fullmatch(text) is not None


def is_path(value: Any) -> bool:
    """Return whether a text may name a place on a machine."""
    return isinstance(value, str) and _PATH.search(value) is not None and "://" not in value


@dataclass(frozen=True)
class Stage:
    """A run of a model, with what documents say of it."""

    view: RunView
    open: list[str] = field(default_factory=list)
    """Open points of the record, a line each."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.started.run

    @cached_property
    def started(self) -> Started:
        """First start. Raises RunError."""
        starts = of_kind(self.view.entries, Started)
        if not starts:
            raise RunError(f"{self.view.directory}: the ledger has no start; train the run first")
        return starts[0]

    @property
    def data(self) -> Manifest | None:
        """Manifest of the data that the run began with; None where another one is there now."""
        begun = (self.started.data_manifest_sha256, self.started.data_content_sha256)
        data = self.view.data
        return data if data is not None and data.is_named({*begun} - {None}) else None

    @cached_property
    def chunks(self) -> list[ChunkInfo]:
        """Chunks that the run read and kept, in the order of the manifest; none without one."""
        read = {event.chunk for event in self.view.chunks}
        return [] if self.data is None else [i for i in self.data.chunks if i.name in read]

    @property
    def held_out(self) -> ChunkInfo | None:
        """Held-out chunk, where a checkpoint was scored on it."""
        scored = any(event.held_out_loss is not None for event in self.view.checkpoints)
        return self.data.held_out if self.data is not None and scored else None

    @property
    def began(self) -> str:
        """Time of the first event, UTC."""
        return self.view.entries[0].time

    @property
    def ended(self) -> str:
        """Time of the last event, UTC."""
        return self.view.entries[-1].time

    @cached_property
    def transition(self) -> StageTransition | None:
        """How the run began from another one; None for weights of its own."""
        found = of_kind(self.view.entries, StageTransition)
        return found[0] if found else None

    @property
    def packages(self) -> dict[str, str]:
        """Versions of software by package, at the first start."""
        known = self.started.environment.get("packages") or {}
        found = {str(name): str(version) for name, version in known.items() if version}
        python = self.started.environment.get("python")
        return {"python": str(python), **found} if python else found

    @property
    def commit(self) -> tuple[str | None, bool | None]:
        """Commit of the code, and whether files differed from it; None where unknown."""
        code = self.started.environment.get("code") or {}
        return code.get("commit"), code.get("dirty")

    @cached_property
    def config(self) -> tuple[dict[str, Any], list[str]]:
        """Dotted key -> value of the resolved config, and the keys whose values are withheld."""
        shown: dict[str, Any] = {}
        withheld = []
        values = flat_values(self.view.config) if self.view.config else {}
        for key, value in values.items():
            named = key in WITHHELD or key.startswith(WITHHELD_SECTIONS)
            listed = value if isinstance(value, list | tuple) else [value]
            if named or any(map(is_path, listed)):
                if value:
                    withheld.append(key)
            else:
                shown[key] = list(value) if isinstance(value, tuple) else value
        return shown, withheld

    @cached_property
    def checkpoints(self) -> list[CheckpointFact]:
        """Checkpoints on record, by step, with the roots of their states where they are kept."""
        return [CheckpointFact(event, self._root(event)) for event in self.view.checkpoints]

    def _root(self, event: CheckpointSaved) -> str | None:
        path = self.view.directory / "checkpoints" / event.checkpoint
        try:
            if not is_folder_retried(path) or manifest_sha256(path) != event.manifest_sha256:
                return None
            state = read_manifest(path).state
        except UserError:
            return None
        return None if state is None else state.root

    @cached_property
    def energy(self) -> Energy | None:
        """Energy of the run; None where nothing was counted or assumed."""
        site = site_of(self.view)
        try:
            attempts = energy_of(self.view, site)
        except RunError:
            return None
        if not attempts:
            return None
        joules = summed(attempts).total
        how = " and ".join(sorted({attempt.how for attempt in attempts}))
        return Energy(1000.0 * site.megawatt_hours(joules), site.tonnes(joules), how)

    @cached_property
    def results(self) -> list[TaskResult]:
        """Results of tasks. Raises RunError for a damaged one."""
        return read_results(self.view.directory)


def chunk_files(stage: Stage) -> Iterator[tuple[ChunkInfo, str, str]]:
    """Yield (chunk, file name, SHA-256) of every file of the chunks that a run read."""
    for info in (*stage.chunks, *filter(None, [stage.held_out])):
        for name, digest in (
            (info.file, info.sha256),
            (info.provenance, info.provenance_sha256),
            (info.borders, info.borders_sha256),
            (info.loss_mask, info.loss_mask_sha256),
        ):
            if name is not None and digest is not None:
                yield info, name, digest


def read_stages(runs: list[Path]) -> list[Stage]:
    """Read the runs of a model, in the order of its stages, and note what their records lack.

    Raises RunError for a run that is none or has a broken ledger.
    """
    stages = [Stage(read_run(run)) for run in runs]
    for stage in stages:
        stage.open.extend(f"{stage.name}: {line}" for line in _gaps(stage))
    return stages


def _gaps(stage: Stage) -> Iterator[str]:
    commit, dirty = stage.commit
    if commit is None:
        yield "the commit of the code is not on record"
    elif dirty is not False:
        yield f"files differed from commit {commit[:12]} when the run began, or nothing says not"
    if stage.view.config is None:
        yield "the config cannot be read"
    if stage.data is None:
        yield "the data manifest is gone, or another one than at the start: no hashes of chunks"
    elif unread := len(stage.data.chunks) - len(stage.chunks):
        yield f"{unread} of {len(stage.data.chunks)} chunks of the data were not read: left out"
    if stage.energy is None:
        yield "energy was neither counted nor assumed (energy.device_watts)"
    else:
        yield "the provider of the energy and its source are not on record"
    if stage.transition is not None and stage.transition.parent_manifest_sha256 is None:
        yield "the weights that it began from have no hash on record"
    if not of_kind(stage.view.entries, Finished):
        yield "the run had not finished"
    if any(record.attempt != stage.started.attempt for record in stage.view.records):
        yield "the environment of starts after the first is not on record"
    without = [one.event.checkpoint for one in stage.checkpoints if one.state_root is None]
    if without:
        yield f"no state root of checkpoints that are gone or changed: {', '.join(without)}"
