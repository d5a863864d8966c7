"""Data that the stages before have trained on: by what was consumed, not by what was planned.

- Seen are the chunks that a checkpoint has consumed, and the one that it is inside. Chunks that
  were planned behind them, and held-out chunks, were not trained on. So branches from any
  checkpoint may read the rest, several of them side by side.
- The checkpoint's own ancestors count too, as long as they can be read.
- Texts, or else source files, are compared between different data folders only. A folder that was
  or will be read in part counts as a whole, and the record says so.
- A record of the earlier folder that is missing or damaged is passed over, and the record says so.

Alternatives considered:
- The order of the stage before: it refuses branches for chunks that nobody has read.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.manifest import CheckpointManifest, manifest_sha256, read_manifest
from k2train.data.manifest import Manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import ChunkOrder
from k2train.data.source_record import (
    CHUNKS_ALONE,
    CHUNKS_AND_FILES,
    compare_data,
    read_sources,
)
from k2train.data.text_record import open_texts
from k2train.errors import CheckpointError, DataError

MOST_STAGES = 64
"""Stages that are followed back; a longer chain goes in a circle."""


@dataclass(frozen=True)
class DataInCommon:
    """Data of this stage that a stage before has trained on, and what was compared, in words."""

    found: tuple[str, ...]
    compared: str

    @property
    def is_deep(self) -> bool:
        """Whether texts or source files were compared."""
        return not self.compared.startswith(CHUNKS_ALONE)


def data_in_common(
    before: CheckpointManifest, manifest: Manifest, order: ChunkOrder
) -> DataInCommon:
    """Compare the data of this stage with what was consumed up to the checkpoint `before`.

    Raises DataError when this stage's own record of sources or texts is damaged.
    """
    # Damage in this stage's own records is an error; only the earlier stage's may be missing.
    read_sources(manifest)
    open_texts(manifest)

    held_out = [manifest.held_out.name] if manifest.held_out else []
    found: dict[str, str] = {}
    for stage in _stages(before):
        where = "the stage before" if stage is before else f"an earlier stage ({_name(stage)})"
        # Chunks are compared by content, whatever their names.
        seen = {chunk.sha256: chunk.name for chunk in stage.chunks.begun()}
        for name in (*order.names, *held_out):
            if (other := seen.get(manifest.chunk(name).sha256)) is not None:
                found.setdefault(name, f"{name} is {other} of {where}")

    inside, compared = _folders_in_common(before, manifest, order)
    return DataInCommon((*found.values(), *inside), compared)


def _stages(before: CheckpointManifest) -> Iterator[CheckpointManifest]:
    """Yield the checkpoint, then the one that its stage started from, and so on."""
    stage = before
    for _ in range(MOST_STAGES):
        yield stage
        parent = stage.parent
        if parent is None or parent.parent_manifest_sha256 is None:
            return
        try:
            # Another checkpoint may be there by now.
            path = Path(parent.parent)
            if manifest_sha256(path) != parent.parent_manifest_sha256:
                return
            stage = read_manifest(path)
        except CheckpointError:
            return


def _name(stage: CheckpointManifest) -> str:
    run = stage.config.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    return f"{name}, {stage.name}" if isinstance(name, str) else stage.name


def earlier_data(before: CheckpointManifest) -> Manifest | None:
    """Return the very data folder that a checkpoint's stage read; None when it is not there."""
    data = before.config.get("data")
    path = data.get("manifest") if isinstance(data, dict) else None
    if not isinstance(path, str):
        return None
    try:
        found = read_data_manifest(path)
    except DataError:
        # The files may be gone. Their hashes are in the checkpoint.
        return None
    names = (before.data.manifest_sha256, before.data.content_sha256)
    return found if found.is_named(names) else None


def _folders_in_common(
    before: CheckpointManifest, manifest: Manifest, order: ChunkOrder
) -> tuple[list[str], str]:
    """Compare the texts or source files of two data folders; also what was compared, in words."""
    earlier = earlier_data(before)
    if earlier is None:
        return [], CHUNKS_ALONE
    begun = {chunk.sha256 for chunk in before.chunks.begun()}
    return _shared(earlier, begun, manifest, order)


def planned_in_common(
    earlier: Manifest, planned: ChunkOrder, manifest: Manifest, order: ChunkOrder
) -> DataInCommon:
    """As `data_in_common`, for a stage before that is still to read all chunks of `planned`.

    Raises DataError when this stage's own record of sources or texts is damaged.
    """
    read_sources(manifest)
    open_texts(manifest)

    seen = {earlier.chunk(name).sha256: name for name in planned.names}
    held_out = [manifest.held_out.name] if manifest.held_out else []
    found = [
        f"{name} is {seen[sha256]} of the stage before"
        for name in dict.fromkeys((*order.names, *held_out))
        if (sha256 := manifest.chunk(name).sha256) in seen
    ]
    inside, compared = _shared(earlier, set(seen), manifest, order)
    return DataInCommon((*found, *inside), compared)


def _shared(
    earlier: Manifest, begun: Set[str], manifest: Manifest, order: ChunkOrder
) -> tuple[list[str], str]:
    """Compare two folders, of whose earlier one the chunks with hashes in `begun` count."""
    if manifest.is_named((earlier.sha256, earlier.content_sha256)):
        # Within one folder the chunks are what parts its documents.
        return [], "chunks of one folder"

    read = tuple(info for info in earlier.chunks if info.sha256 in begun)
    mine = tuple(manifest.chunk(name) for name in dict.fromkeys(order.names))
    compared = compare_data(
        earlier.model_copy(update={"chunks": read, "held_out": None}),
        manifest.model_copy(update={"chunks": mine}),
    )

    part = _part("its data", len(read), len(earlier.chunks), "were read")
    part += _part("this stage's data", len(mine), len(manifest.chunks), "will be read")
    # Equal chunks are named by the checkpoint already.
    found = [f"{line}{part}" for line in compared.shared if not line.endswith(": same bytes")]
    method = compared.method
    if not all(data.facts.sources_sha256 or data.facts.texts for data in (earlier, manifest)):
        method = CHUNKS_ALONE
    elif not all(data.facts.sources_sha256 for data in (earlier, manifest)):
        # A folder without a list of files has none that could be compared.
        method = method.replace(CHUNKS_AND_FILES, CHUNKS_ALONE, 1)
    return found, method


def _part(data: str, read: int, chunks: int, verb: str) -> str:
    """Say that a folder was compared as a whole though only some of its chunks count."""
    return "" if read == chunks else f" (of {data} as a whole, {read} of {chunks} chunks {verb})"
