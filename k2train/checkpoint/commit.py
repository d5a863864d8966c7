"""One attempt to write a checkpoint on all ranks: space check, shard files, manifest, one rename.

- Every rank writes and syncs its own shard files and hashes them from memory meanwhile.
- Rank 0 writes the manifest last and commits by one rename. A kill at any moment leaves either no
  directory of that name or a complete one.
- The temporary name carries the fencing token of the lease, where there is one. A process that lost
  its lease therefore cannot delete what the next holder writes.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k2train import fault_injection
from k2train.checkpoint.blocks import MASTER, describe_tensors, model_blocks, optimizer_blocks
from k2train.checkpoint.disk_space import BLOCK_FACTS_BYTES, MANIFEST_BYTES, room_problem
from k2train.checkpoint.manifest import (
    FOLDERS,
    FORMAT,
    MANIFEST,
    CheckpointManifest,
    FileFacts,
    SaveFacts,
    ShardFacts,
    TensorFacts,
    manifest_text,
    seal,
)
from k2train.checkpoint.save_events import SaveEvents
from k2train.checkpoint.shards import write_shard
from k2train.checkpoint.snapshot import Snapshot
from k2train.errors import CheckpointError
from k2train.files import sync_directory, write_synced
from k2train.parallel.agreement import Agreement, DiskRefused, SaveError
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import Axis
from k2train.state_digest import state_root

Part = tuple[dict[str, FileFacts], dict[str, ShardFacts], dict[str, dict[str, TensorFacts]]]
"""What one rank wrote: its files, what they hold, and its whole tensors by folder."""


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
            f"{self.name} could not be saved in {self.directory}: {error.strerror or error}; "
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

    def write() -> tuple[dict[str, FileFacts], dict[str, ShardFacts], torch.Tensor]:
        files, shards = {}, {}
        for folder in FOLDERS:
            if blocks[folder]:
                name = f"{folder}/shard-{agreement.rank + 1:05d}-model-00001-of-00001.safetensors"
                on_written = partial(fault_injection.point, f"save.{folder}")
                files[name], shards[name] = write_shard(
                    job.temporary / name, blocks[folder], on_written
                )

        fault_injection.point("save.hashed")
        return files, shards, job.sums.result().clone()

    files, shards, sums = agreement.do(write, job.disk_error)
    parts = agreement.to_first(
        (
            files,
            shards,
            describe_tensors(job.snapshot.layout, job.snapshot.dtype, job.snapshot.flat_shards),
        )
    )
    digests = job.digest.digests(agreement.sum(sums))
    agreement.do(lambda: _commit(job, parts, digests, agreement.rank), job.disk_error)


def _begin(job: SaveJob, rank: int) -> None:
    fault_injection.point("save.begin")
    if rank != 0:
        return
    if job.final.exists():
        raise CheckpointError(f"{job.final} already exists; a checkpoint is never overwritten")
    shutil.rmtree(job.temporary, ignore_errors=True)
    for folder in FOLDERS:
        (job.temporary / folder).mkdir(parents=True)


def _check_room(job: SaveJob, needed: int, rank: int) -> None:
    fault_injection.point("save.room")
    if rank == 0 and (problem := room_problem(job.directory, job.name, needed)) is not None:
        raise DiskRefused(problem)


def _content(job: SaveJob, parts: list[Part], digests: Mapping[str, str]) -> dict[str, Any]:
    tensors = {
        folder: {k: v for part in parts for k, v in part[2][folder].items()} for folder in FOLDERS
    }
    return seal(
        {
            "format": FORMAT,
            "name": job.name,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            **job.facts.model_dump(exclude_unset=True),
            "tensors": tensors,
            "files": {name: facts for part in parts for name, facts in part[0].items()},
            "shards": {name: facts for part in parts for name, facts in part[1].items()},
            "state": {
                "root": state_root(digests, job.facts.step, job.facts.adam_steps),
                "digests": dict(digests),
            },
        }
    )


def _commit(job: SaveJob, parts: list[Part], digests: Mapping[str, str], rank: int) -> None:
    fault_injection.point("save.manifest")
    if rank != 0:
        # Only rank 0 commits; the others pass its fault points.
        for point in ("save.synced", "save.renamed", "save.committed"):
            fault_injection.point(point)
        return

    content = _content(job, parts, digests)
    manifest = CheckpointManifest.model_validate(content)
    write_synced(job.temporary / MANIFEST, manifest_text(content))
    for written in (*(job.temporary / folder for folder in FOLDERS), job.temporary):
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
            f"{error.strerror or error}; free space or make the directory writable, then run the "
            "same command again"
        ) from None
