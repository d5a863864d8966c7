"""Preflight checks: everything about a start that can be decided without a device.

- Checks the data, the schedule, the checkpoint to resume from, and whether it is the same run.
- Runs on every rank before torch is imported, from the same files. A mistake is one line in about a
  second, and nothing has been written by then.
- Only the first rank of a machine hashes chunks here, and only as many as it reads in seconds. The
  others are verified one chunk ahead during the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import read_manifest
from k2train.config.load import Config
from k2train.config.profile_rules import check_profile_steps
from k2train.data.chunk import check_files, verify_chunk
from k2train.data.held_out import HeldOutSet
from k2train.data.loss_mask import masked_as_asked
from k2train.data.manifest import Manifest, require_borders
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import ChunkOrder, apply_events, make_order
from k2train.errors import DataError
from k2train.guard.crash_loop import check_progress
from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import NAME, notes_of, unwritten_manifest
from k2train.optim.lr_schedule import check_schedule
from k2train.plan.layout import Layout
from k2train.record.events import Entry, StageTransition, of_kind
from k2train.record.ledger import read_chain
from k2train.record.rollback_events import RolledBack
from k2train.retry import exists_retried, retried
from k2train.train.checkpoints_ahead import CheckpointsAhead
from k2train.train.held_out_sets import held_out_limit, held_out_sets
from k2train.train.ledger_check import check_checkpoints_are_there, check_ledger_heads
from k2train.train.recorded_choices import (
    run_directory,
    with_recorded_pipeline,
    with_recorded_precision,
)
from k2train.train.resume_check import check_same_run, files_read, identity_of
from k2train.train.setup import Setup
from k2train.train.spike_history import check_decided, moves_of
from k2train.train.stage_transition import check_stage_transition, resolve_checkpoint
from k2train.train.start_point import ResumeCheck, wanted_checkpoints

HASH_AT_START_BYTES = 1 << 30
"""Total size up to which all chunks are hashed before the start; above it only the next one is."""


HUGGING_FACE = "hf:"
"""Begin of a `run.init_from` that names a Hugging Face folder."""


@dataclass(frozen=True)
class Start:
    """Decisions of the preflight checks: how a run begins."""

    directory: Path
    setup: Setup
    manifest: Manifest
    order: ChunkOrder
    identity: dict[str, Any]
    """What may not change between restarts; stored in every checkpoint."""
    held_out: tuple[HeldOutSet, ...] = ()
    """The rows that are scored at every numbered checkpoint."""
    candidates: tuple[Path, ...] = ()
    """Checkpoints of this run to try, the wanted one first; empty for a fresh start.

    Only the first one's manifest was read.
    """
    refused: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    """Differences from the checkpoint's run that `run.allow` permits by name."""
    parent: Path | None = None
    """Checkpoint of another run whose weights and moments are loaded (fresh starts only)."""
    transition: StageTransition | None = None
    """How this stage takes over from its parent."""
    hugging_face: HuggingFaceFolder | None = None
    """Folder that the parent is imported from, when the ranks have met."""
    warning: str = ""
    """What to tell of the starts before this one; "" for nothing."""
    precision_reason: str = ""
    """Why `precision: auto` means what the setup's config says; "" where the config said it."""
    room_inside_chunks: bool = True
    """Whether the disk has space for saves inside chunks, if those are left to the run."""
    config_order: ChunkOrder | None = None
    """The order before the moves of the ledger."""
    moves: tuple[Entry, ...] = ()
    """Entries of the ledger that moved chunks, or went back."""

    @property
    def layout(self) -> Layout:
        """Parallel layout of the run."""
        return self.setup.layout

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.directory / "checkpoints"

    @property
    def returns(self) -> list[RolledBack]:
        """Returns of this run to an earlier checkpoint, oldest first."""
        return of_kind(self.moves, RolledBack)

    def identity_at(self, path: Path) -> dict[str, Any] | None:
        """Identity of this run when it saved a checkpoint; None if no chunk was moved since."""
        ledger = read_manifest(path).ledger
        if ledger is None or self.config_order is None:
            return None
        before = [entry for entry in self.moves if entry.seq < ledger.events]
        if len(before) == len(self.moves):
            return None
        order = apply_events(self.config_order, before, str(self.directory / "ledger.jsonl"))
        return identity_of(self.setup.config, self.manifest, order)

    @property
    def resume_check(self) -> ResumeCheck:
        """What the manifest of a checkpoint must pass."""
        return ResumeCheck(self.identity, self.order, self.setup.step_tokens)


def _since_first_stage(config: Config) -> str:
    """What to add to advice on the vocabulary: a stage keeps the rows of its parent."""
    if config.run.init_from is None:
        return ""
    return f" from the first stage on; a later one keeps the rows of {config.run.init_from}"


def check_data(config: Config) -> tuple[Manifest, ChunkOrder]:
    """Read the manifest, fix the chunk order, and check the size and header of every file.

    With blocked attention document boundaries must exist too, with `data.loss_mask` loss masks.
    Raises DataError when the data do not fit the run, ConfigError when order or schedule do not.
    """
    manifest = read_data_manifest(config.data.manifest)
    manifest = masked_as_asked(manifest, config.data.loss_mask)
    order = make_order(
        manifest, config.data.order, config.batch.global_sequences, config.data.sequence_length
    )

    if manifest.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size ({config.model.vocab_size}) must be at least that of the data "
            f"({manifest.vocab_size}, {manifest.path}): raise it{_since_first_stage(config)}"
        )

    # The held-out chunk too, unless no row of it is scored.
    scored = held_out_limit(config) != 0
    names = files_read(manifest, order) if scored else order.names
    if config.data.cross_documents == "block":
        require_borders(manifest, names)
    # Sizes and headers only; hashing takes longer and is done by `verify_data`.
    check_files(manifest, names)
    check_schedule(config.lr.kind, config.lr.warmup_steps, order.total_steps, config.lr.decay_steps)
    check_profile_steps(config.profile.steps, order.total_steps)
    check_profile_steps(config.profile.actions, order.total_steps, "profile.actions")
    return manifest, order


def verify_data(
    manifest: Manifest, order: ChunkOrder, step: int, held_out: Sequence[HeldOutSet]
) -> None:
    """Verify hashes and token ids of the chunk read after `step` and of the held-out chunk.

    Verifies all chunks, and all held-out sets, if they are small together. Raises DataError when
    one is damaged.
    """
    read = [(manifest, manifest.chunk(name)) for name in order.names]
    scored = [(part.manifest, info) for part in held_out for info, _ in part.scored()]

    files = [data.folder / info.file for data, info in (*read, *scored)]
    total_bytes = sum(retried(file.stat, file).st_size for file in files)
    if total_bytes > HASH_AT_START_BYTES:
        # Large data: only the next chunk to be read and the held-out one. Each rank that verifies
        # hashes the others before it uses them.
        following = [order.position(step + 1).name] if step < order.total_steps else []
        read = [(manifest, manifest.chunk(name)) for name in following]
        scored = [(data, info) for data, info in scored if data is manifest]

    for data, info in (*read, *scored):
        verify_chunk(data, info)


def prepare_start(config: Config, world_size: int, verify: bool) -> Start:
    """Decide how the run begins.

    `verify` also hashes chunks. Raises UserError for every mistake that is visible without a
    device.
    """
    config, precision_reason = with_recorded_precision(config)
    config, pipeline_reason = with_recorded_pipeline(config, world_size)
    setup = Setup.of(config, world_size)
    setup = replace(setup, pipeline_reason=pipeline_reason or setup.pipeline_reason)
    config = setup.config
    manifest, order = check_data(config)

    directory = run_directory(config)
    ledger = directory / "ledger.jsonl"
    entries, hashes = read_chain(ledger) if exists_retried(ledger) else ([], [])
    check_decided(config, entries)
    config_order, order = order, apply_events(order, entries, str(ledger))

    identity = identity_of(config, manifest, order)
    base = Start(
        directory,
        setup,
        manifest,
        order,
        identity,
        held_out_sets(config, manifest),
        precision_reason=precision_reason,
        config_order=config_order,
        moves=moves_of(entries),
    )
    # Too many starts without progress refuse the start.
    warning = check_progress(entries, config.run.max_fruitless_starts, directory)
    if warning and config.checkpoint.every_seconds != "auto":
        warning += "; set checkpoint.every_seconds=auto, or lower it"
    base = replace(base, warning=warning)

    wanted, refused = wanted_checkpoints(config, directory, entries, base.resume_check)
    check_ledger_heads(ledger, entries, hashes, wanted[0] if wanted else None)
    newest_step = read_manifest(wanted[0]).step if wanted else None
    refused += check_checkpoints_are_there(entries, base.checkpoints, newest_step)
    if not wanted:
        start, step = _fresh_start(config, base, refused), 0
    else:
        then = base.identity_at(wanted[0])
        allowed = check_same_run(wanted[0], identity, config.run.allow, then)
        start = replace(
            base, candidates=tuple(wanted), refused=tuple(refused), allowed=tuple(allowed)
        )
        step = read_manifest(wanted[0]).step

    taken = start.candidates[0] if start.candidates else None
    ahead = CheckpointsAhead(setup, start.checkpoints, len(order.names), taken, step)
    ahead.check_names()
    # What cannot fit on the disk is refused before anything is written.
    if "space" not in config.run.allow:
        start = replace(start, room_inside_chunks=ahead.check_space())
    if verify:
        verify_data(manifest, order, step, start.held_out)
    return start


def _fresh_start(config: Config, base: Start, refused: list[str]) -> Start:
    if config.run.init_from is None:
        return replace(base, refused=tuple(refused))
    if config.run.init_from.startswith(HUGGING_FACE):
        return replace(_imported_start(config, base), refused=tuple(refused))
    parent = resolve_checkpoint(Path(config.run.init_from), config.run.allow)
    transition = check_stage_transition(base.setup, parent, base.manifest, base.order)
    return replace(base, refused=tuple(refused), parent=parent, transition=transition)


def _imported_start(config: Config, base: Start) -> Start:
    """Describe a start from a Hugging Face folder, which is imported later."""
    folder = HuggingFaceFolder(Path(str(config.run.init_from).removeprefix(HUGGING_FACE)))
    parent = base.directory / "imported" / NAME
    transition = check_stage_transition(
        base.setup, parent, base.manifest, base.order, unwritten_manifest(folder)
    )
    warning = "; ".join(filter(None, (base.warning, *notes_of(folder))))
    return replace(base, parent=parent, transition=transition, hugging_face=folder, warning=warning)
