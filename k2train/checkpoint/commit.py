"""One attempt to write a checkpoint on all ranks: space check, shard files, manifest, one rename.

- Every rank writes and syncs its own shard files, hashes them from memory meanwhile, and describes
  them in side files. Rank 0 gathers only the hashes of those.
- Rank 0 writes the manifest last and commits by one rename. A kill at any moment leaves either no
  directory of that name or a complete one.
- The temporary name carries the fencing token of the lease, where there is one. A process that lost
  its lease therefore cannot delete what the next holder writes.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from k2train import fault_injection
from k2train.checkpoint.blocks import MASTER, describe_tensors, model_blocks, optimizer_blocks
from k2train.checkpoint.disk_space import BLOCK_FACTS_BYTES, MANIFEST_BYTES, room_problem
from k2train.checkpoint.gathered_files import GatheredFiles, pack_files, shard_name
from k2train.checkpoint.manifest import (
    FACTS,
    FOLDERS,
    FORMAT,
    MANIFEST,
    CheckpointManifest,
    FileFacts,
    SaveFacts,
    TensorTable,
    manifest_text,
    seal,
)
from k2train.checkpoint.retention import KEEP
from k2train.checkpoint.save_events import SaveEvents
from k2train.checkpoint.shards import write_shard
from k2train.checkpoint.side_files import group_files, write_pieces
from k2train.checkpoint.snapshot import Snapshot
from k2train.errors import CheckpointError
from k2train.files import sync_directory, write_synced
from k2train.parallel.agreement import Agreement, DiskRefused, SaveError
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import Axis
from k2train.retry import exists, reason
from k2train.state_digest import state_root

Tables = dict[str, TensorTable]
"""Whole tensors by folder."""
_TABLES: TypeAdapter[Tables] = TypeAdapter(Tables)


@dataclass
class SaveJob:
    """One checkpoint to save: its state, its target directory, and who is told on rank 0."""

    directory: Path
    name: str
    snapshot: Snapshot
    facts: SaveFacts
    digest: StateDigest
    sums: Future[torch.Tensor]
    """This rank's part of the state digest, computed while files are written."""
    events: SaveEvents

    @property
    def final(self) -> Path:
        """Directory of the committed checkpoint."""
        return self.directory / self.name

    @property
    def temporary(self) -> Path:
        """Directory written to before the commit."""
        token = self.facts.fencing_token
        return self.directory / (
            f"{self.name}.tmp" if token is None else f"{self.name}.{token}.tmp"
        )

    def disk_error(self, error: OSError) -> SaveError:
        """Turn an OSError of the disk into a DiskRefused that says what to do."""
        return DiskRefused(
            f"{self.name} could not be saved in {self.directory}: {reason(error, self.directory)}; "
            "earlier checkpoints are intact; free space or make the directory writable, then run "
            "the same command again"
        )


def write_checkpoint(job: SaveJob, agreement: Agreement, tp: Axis) -> None:
    """Write and commit a checkpoint on all ranks. Collective.

    Raises DiskRefused when a retry may help, SaveError when it cannot, and UserError when the name
    is taken or the run has another owner. Every rank raises the same error.
    """
    agreement.do(lambda: _begin(job, agreement.rank), job.disk_error)
    blocks = {
        "model": model_blocks(
            job.snapshot.layout, job.snapshot.flat_shards[MASTER], job.snapshot.dtype, tp
        ),
        "optimizer": optimizer_blocks(job.snapshot.layout, job.snapshot.flat_shards, tp),
    }

    # Every rank knows the size of its own blocks only.
    needed = sum(block.num_bytes + BLOCK_FACTS_BYTES for part in blocks.values() for block in part)
    total = int(agreement.sum(torch.tensor([needed]))[0]) + MANIFEST_BYTES
    agreement.do(lambda: _check_room(job, total, agreement.rank), job.disk_error)

    def write() -> tuple[dict[str, FileFacts], torch.Tensor]:
        files = {}
        for folder in FOLDERS:
            if blocks[folder]:
                name = shard_name(folder, agreement.rank)
                on_written = partial(fault_injection.point, f"save.{folder}")
                facts, pieces = write_shard(job.temporary / name, blocks[folder], on_written)
                files[name] = write_pieces(job.temporary, name, facts, pieces)

        fault_injection.point("save.hashed")
        return files, job.sums.result().clone()

    files, sums = agreement.do(write, job.disk_error)
    # Most ranks hold slices of the same tensors.
    tables = agreement.distinct(
        describe_tensors(job.snapshot.layout, job.snapshot.dtype, job.snapshot.flat_shards),
        _TABLES,
    )
    gathered = GatheredFiles(agreement.to_first(pack_files(files, agreement.rank)))
    digests = job.digest.digests(agreement.sum(sums))
    agreement.do(lambda: _commit(job, gathered, tables, digests, agreement.rank), job.disk_error)


def _begin(job: SaveJob, rank: int) -> None:
    fault_injection.point("save.begin")
    if rank != 0:
        return
    if exists(job.final):
        raise CheckpointError(f"{job.final} already exists; a checkpoint is never overwritten")
    shutil.rmtree(job.temporary, ignore_errors=True)
    for folder in (*FOLDERS, FACTS):
        (job.temporary / folder).mkdir(parents=True)


def _check_room(job: SaveJob, needed: int, rank: int) -> None:
    fault_injection.point("save.room")
    if rank == 0 and (problem := room_problem(job.directory, job.name, needed)) is not None:
        raise DiskRefused(problem)


def manifest_content(
    directory: Path,
    name: str,
    facts: SaveFacts,
    files: GatheredFiles,
    tables: Sequence[Tables],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Build the manifest of a checkpoint that is written in `directory`, sealed.

    Writes side files there, if there are many shard files. Raises OSError.
    """
    inline, groups = group_files(directory, len(files), files.items)
    return seal(
        {
            "format": FORMAT,
            "name": name,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts.model_dump(exclude_unset=True),
            "tensors": {
                folder: {key: tensor for table in tables for key, tensor in table[folder].items()}
                for folder in FOLDERS
            },
            "files": inline,
            **({"groups": groups} if groups else {}),
            "state": {
                "root": state_root(digests, facts.step, facts.adam_steps),
                "digests": dict(digests),
            },
        }
    )


def _commit(
    job: SaveJob,
    files: GatheredFiles,
    tables: Sequence[Tables],
    digests: Mapping[str, str],
    rank: int,
) -> None:
    fault_injection.point("save.manifest")
    if rank != 0:
        # Only rank 0 commits; the others pass its fault points.
        for point in ("save.synced", "save.renamed", "save.committed"):
            fault_injection.point(point)
        return

    content = manifest_content(job.temporary, job.name, job.facts, files, tables, digests)
    manifest = CheckpointManifest.model_validate(content)
    if job.facts.asked is not None:
        write_synced(job.temporary / KEEP, f"{job.facts.asked}\n")
    write_synced(job.temporary / MANIFEST, manifest_text(content))
    for written in (*(job.temporary / folder for folder in (*FOLDERS, FACTS)), job.temporary):
        sync_directory(written)

    fault_injection.point("save.synced")
    # The last moment at which a lost lease can still prevent the commit.
    job.events.check_owner()
    job.temporary.rename(job.final)

    try:
        fault_injection.point("save.renamed")
        sync_directory(job.directory)
        job.events.committed(job.final, manifest)
        fault_injection.point("save.committed")
    except OSError as error:
        raise SaveError(
            f"{job.name} is in {job.directory}, but it could not be recorded: "
            f"{reason(error, job.directory)}; free space or make the directory writable, then run "
            "the same command again"
        ) from None
