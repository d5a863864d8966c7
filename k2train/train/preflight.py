"""Preflight checks: everything about a start that can be decided without a device.

- Checks the data, the schedule, the checkpoint to resume from, and whether it is the same run.
- Runs on every rank before torch is imported, from the same files. A mistake is one line in about a
  second, and nothing has been written by then.
- Only the first rank of a machine hashes chunks here, and only as many as it reads in seconds. The
  others are verified one chunk ahead during the run.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from k2train.checkpoint.disk_space import CheckpointBytes, check_plan
from k2train.checkpoint.manifest import MANIFEST, is_thinned, list_checkpoints, read_manifest
from k2train.checkpoint.retention import is_on_demand
from k2train.config.load import Config, check_world, config_differences, num_microbatches
from k2train.data.chunk import check_files, verify_chunk
from k2train.data.manifest import Manifest, common_data, read_sources, require_borders
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import ChunkOrder, make_order
from k2train.errors import CheckpointError, DataError, RunError
from k2train.guard.control_files import ControlFiles
from k2train.guard.crash_loop import check_progress
from k2train.optim.lr_schedule import check_schedule, rate
from k2train.plan.cost import parameters, tensor_count
from k2train.plan.layout import Layout
from k2train.plan.schedule import build_programs, placement_of
from k2train.record.ledger import read_ledger
from k2train.train.memory_report import spec_of
from k2train.train.resume_check import check_same_run, files_read, identity_of

HASH_AT_START_BYTES = 1 << 30
"""Total size up to which all chunks are hashed before the start; above it only the next one is."""

CANDIDATES = 4
"""Checkpoints considered, newest first: reading the manifests of a large run takes time."""


@dataclass(frozen=True)
class Start:
    """Decisions of the preflight checks: how a run begins."""

    directory: Path
    layout: Layout
    manifest: Manifest
    order: ChunkOrder
    identity: dict[str, Any]
    """What may not change between restarts; stored in every checkpoint."""
    candidates: tuple[Path, ...] = ()
    """Checkpoints of this run to resume from, the wanted one first; empty for a fresh start."""
    refused: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    """Differences from the checkpoint's run that `run.allow` permits by name."""
    parent: Path | None = None
    """Checkpoint of another run whose weights and moments are loaded (fresh starts only)."""
    transition: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.directory / "checkpoints"


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Return the learning rate used in `step` (from 1) of this stage."""
    lr = config.lr
    return rate(step, lr.kind, lr.peak, lr.final, lr.warmup_steps, total_steps, lr.decay_steps)


def run_directory(config: Config) -> Path:
    """Return the run directory of a config."""
    return Path(config.run.directory) / config.run.name


def check_data(config: Config) -> tuple[Manifest, ChunkOrder]:
    """Read the manifest, fix the chunk order, and check the size and header of every file.

    With blocked attention document boundaries must exist too.
    Raises DataError when the data do not fit the run, ConfigError when order or schedule do not.
    """
    manifest = read_data_manifest(config.data.manifest)
    order = make_order(
        manifest, config.data.order, config.batch.global_sequences, config.data.sequence_length
    )

    if manifest.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size ({config.model.vocab_size}) must be at least that of the data "
            f"({manifest.vocab_size}, {manifest.path}): raise it"
        )

    if manifest.held_out and manifest.held_out.rows < config.batch.global_sequences:
        raise DataError(
            f"the held-out chunk of {manifest.path} has {manifest.held_out.rows} rows, "
            f"fewer than one batch of batch.global_sequences ({config.batch.global_sequences}): "
            "lower it, or prepare more held-out rows"
        )

    if config.data.cross_documents == "block":
        require_borders(manifest, files_read(manifest, order))
    # Sizes and headers only; hashing takes longer and is done by `verify_data`.
    check_files(manifest, files_read(manifest, order))
    check_schedule(config.lr.kind, config.lr.warmup_steps, order.total_steps, config.lr.decay_steps)
    return manifest, order


def verify_data(manifest: Manifest, order: ChunkOrder, step: int) -> None:
    """Verify hashes and token ids of the chunk read after `step` and of the held-out chunk.

    Verifies all chunks if they are small together. Raises DataError when one is damaged.
    """
    names = files_read(manifest, order)

    total_bytes = sum(
        (manifest.folder / manifest.chunk(name).file).stat().st_size for name in names
    )
    if total_bytes > HASH_AT_START_BYTES:
        # Large data: only the next chunk to be read and the held-out one.
        following = [order.position(step + 1).name] if step < order.total_steps else []
        names = following + names[len(order.names) :]

    for name in names:
        verify_chunk(manifest, manifest.chunk(name))


def layout_of(config: Config, world_size: int) -> Layout:
    """Return the layout of a config on `world_size` processes, stages placed for its schedule.

    Raises ConfigError when the processes do not fit the layout.
    """
    p = config.parallel
    return Layout.for_world(
        world_size,
        p.tensor,
        p.pipeline,
        p.stages_per_rank,
        placement_of(p.schedule),
        p.layers_per_stage,
    )


def prepare_start(config: Config, world_size: int, verify: bool) -> Start:
    """Decide how the run begins.

    `verify` also hashes chunks. Raises UserError for every mistake that is visible without a
    device.
    """
    check_world(config, world_size)
    parallel, layout = config.parallel, layout_of(config, world_size)
    # Raises ConfigError if the schedule cannot run with these micro-batches.
    build_programs(
        parallel.schedule,
        parallel.pipeline,
        num_microbatches(config, world_size),
        parallel.stages_per_rank,
    )

    manifest, order = check_data(config)

    directory = run_directory(config)

    identity = identity_of(config, manifest, order)
    base = Start(directory, layout, manifest, order, identity)
    # A STOP file from earlier, or too many starts without progress, refuse the start.
    ControlFiles(directory).refuse_start()
    check_progress(_ledger_events(directory), config.run.max_fruitless_starts, directory)

    wanted, refused = _wanted_checkpoints(config, directory)
    if not wanted:
        start, step = _fresh_start(config, base, refused), 0
    else:
        allowed = check_same_run(wanted[0], identity, config.run.allow)
        start = replace(
            base, candidates=tuple(wanted), refused=tuple(refused), allowed=tuple(allowed)
        )
        step = int(read_manifest(wanted[0])["step"])

    # What cannot fit on the disk is refused before anything is written.
    if "space" not in config.run.allow:
        _check_disk_space(config, start, step)
    if verify:
        verify_data(manifest, order, step)
    return start


def _wanted_checkpoints(config: Config, directory: Path) -> tuple[list[Path], list[str]]:
    """Return the readable checkpoints, best first, and why others were refused.

    Returns none for a fresh start.
    """
    folder, resume = directory / "checkpoints", config.run.resume
    found = list_checkpoints(folder)
    if resume == "never":
        if found or (directory / "ledger.jsonl").exists():
            raise RunError(
                f"run.resume is never, but {directory} holds a run; "
                "choose another run.name or run.resume=auto"
            )
        return [], []

    if isinstance(resume, int) and not _already_resumed_from(directory, resume):
        named = [path for path in found if path.name == f"ckpt_{resume:03d}"]
        readable, refused = _readable(named)
        if not readable:
            others = ", ".join(path.name for path in found if path not in named) or "none"
            why = f"; refused: {refused[0]}" if refused else ""
            raise CheckpointError(
                f"run.resume asks for ckpt_{resume:03d}, {folder} has: {others}{why}"
            )
        return readable, refused

    # A thinned checkpoint holds weights only and cannot be resumed.
    whole = [path for path in reversed(found) if not is_thinned(path)]
    usable, refused = _readable(whole)
    if (not found and resume == "must") or (refused and not usable):
        why = f"; refused: {'; '.join(refused)}" if refused else ""
        raise CheckpointError(
            f"run.resume is {resume}, but there is no checkpoint to continue from in "
            f"{folder}{why}; choose another run.name to start anew"
        )

    if found and not usable:
        raise CheckpointError(
            f"{found[-1]} and all before it were thinned to their weights: "
            "they can start another run (run.init_from), not continue this one"
        )
    return usable, refused


def _readable(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the first `CANDIDATES` with a readable manifest, and the problems of those between."""
    readable: list[Path] = []
    refused: list[str] = []
    for path in paths:
        if len(readable) == CANDIDATES:
            break
        try:
            _check_resumable(path, read_manifest(path))
            readable.append(path)
        except CheckpointError as error:
            refused.append(str(error))
    return readable, refused


def _check_resumable(path: Path, manifest: Mapping[str, Any]) -> None:
    if not isinstance(manifest.get("identity"), dict):
        raise CheckpointError(
            f"{path / MANIFEST}: identity is missing, the run cannot continue from there"
        )


def _check_disk_space(config: Config, start: Start, step: int) -> None:
    """Raise RunError when the disk cannot hold the checkpoints that follow `step`."""
    order, layout, checkpoints = start.order, start.layout, start.checkpoints
    shape = spec_of(config, "cpu").shape
    consumed, every = order.consumed_chunks(step), config.checkpoint.every_chunks
    # Numbers of the chunks after which a checkpoint is due.
    ends = [
        n
        for n in range(consumed + 1, len(order.names) + 1)
        if n % every == 0 or n == len(order.names)
    ]

    found = list_checkpoints(checkpoints)
    # What follows the one that is taken is set aside, and gives nothing back.
    found = found[: found.index(start.candidates[0]) + 1] if start.candidates else found
    numbered = [path for path in found if not is_on_demand(path)]
    complete = sum(not is_thinned(path) for path in numbered)

    one = CheckpointBytes(
        parameters(shape),
        weight_bytes=2 if config.precision == "bf16" else 4,
        tensors=tensor_count(shape),
        parts=layout.tensor * layout.data,
    )
    remaining = len(ends) + (step == 0 and not numbered)
    check_plan(checkpoints, one, remaining, config.checkpoint.keep_optimizer_states, complete)


def _ledger_events(directory: Path) -> list[dict[str, Any]]:
    ledger = directory / "ledger.jsonl"
    return read_ledger(ledger) if ledger.exists() else []


def _already_resumed_from(directory: Path, number: int) -> bool:
    """Return whether the last start already resumed from this checkpoint number.

    The same command started again then continues the run, instead of going back once more.
    """
    starts = [
        event for event in _ledger_events(directory) if event["event"] in ("started", "resumed")
    ]
    return bool(starts) and starts[-1].get("requested") == number


def _fresh_start(config: Config, base: Start, refused: list[str]) -> Start:
    if config.run.init_from is None:
        return replace(base, refused=tuple(refused))
    parent = resolve_checkpoint(Path(config.run.init_from))
    transition = check_stage_transition(config, parent, base.manifest, base.order)
    return replace(base, refused=tuple(refused), parent=parent, transition=transition)


def resolve_checkpoint(path: Path) -> Path:
    """Return a checkpoint directory unchanged, or the last checkpoint of a run directory.

    Raises CheckpointError when `path` is neither.
    """
    # A data folder has a manifest.json too.
    if (path / MANIFEST).is_file() and (path / "model").is_dir():
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"run.init_from ({path}) is neither a checkpoint nor a run directory with one"
        )
    return found[-1]


def check_stage_transition(
    config: Config, parent: Path, manifest: Manifest, order: ChunkOrder
) -> dict[str, Any]:
    """Check the transition between two stages and describe it for the ledger.

    Both stages need the same model, the same tokenizer and, unless allowed, disjoint data.
    Raises CheckpointError when the model differs, DataError when tokenizer or data do not fit.
    """
    facts = read_manifest(parent)

    before, now = facts["config"], config.model_dump(mode="json")
    if differences := config_differences({"model": before["model"]}, {"model": now["model"]}):
        raise CheckpointError(
            f"run.init_from ({parent}) holds another model: {'; '.join(differences)}"
        )

    tokenizer = facts["data"].get("tokenizer_sha256")
    if tokenizer != manifest.tokenizer_sha256:
        raise DataError(
            f"{manifest.path} was made with tokenizer {manifest.tokenizer_sha256[:12]}, "
            f"run.init_from ({parent}) was trained with {str(tokenizer)[:12]}; "
            "prepare the data with the same one"
        )

    # Chunks are compared by content, whatever their names.
    seen = {entry["sha256"]: entry["name"] for entry in facts["chunks"]["order"]}
    mine = [name for name in order.names if manifest.chunk(name).sha256 in seen]
    shared = [f"{name} is {seen[manifest.chunk(name).sha256]} of the stage before" for name in mine]
    # Damage in this stage's own list is an error; only the earlier stage's may be missing.
    read_sources(manifest)

    sources_compared = False
    try:
        earlier = read_data_manifest(before["data"]["manifest"])
        # Sources count as compared only against the very data that the earlier stage read.
        if earlier.sha256 == facts["data"].get("manifest_sha256"):
            shared += common_data(earlier, manifest)
            sources_compared = all("sources_sha256" in data.facts for data in (earlier, manifest))
    except DataError:
        # The earlier stage's files may be gone. Their hashes are in its checkpoint, compared above.
        pass

    if shared and config.data.seen_before == "refuse":
        raise DataError(
            f"{manifest.path} shares data with the stage before: {'; '.join(shared[:3])}"
            f"{f' and {len(shared) - 3} more' if len(shared) > 3 else ''}; "
            f"prepare it disjoint, or allow it with data.seen_before: allow"
        )

    last = facts.get("lr")
    return {
        "parent": str(parent),
        "parent_manifest_sha256": hashlib.sha256((parent / MANIFEST).read_bytes()).hexdigest(),
        "parent_step": facts["step"],
        "parent_adam_steps": facts["adam_steps"],
        "parent_consumed_tokens": facts["consumed_tokens"],
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "same_model": True,
        "same_tokenizer": True,
        "data_in_common": shared,
        "sources_compared": sources_compared,
        "rate_before": last,
        "rate_after": learning_rate(config, 1, order.total_steps),
    }
