"""Write a numbered checkpoint: aside, hashed, synced, then renamed into place. Nothing is ever written over.

Every rank writes its own safetensors shards through torch.distributed.checkpoint, then the ranks share the hashing and
syncing of all files; rank 0 writes the manifest last and commits by one rename. A kill at any moment leaves either no
directory of that name or a whole one.

Asynchronous: training waits for the copy of the three optimizer lines only; one thread per rank does the rest over a gloo
group of its own. A second save waits for the first, and so does the end of the run.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from k2train.checkpoint.manifest import FORMAT, MANIFEST, NAME, THINNED, file_sha256, list_checkpoints
from k2train.checkpoint.tensors import STATES, describe, model_tensors, optimizer_tensors
from k2train.errors import CheckpointError
from k2train.parallel.gradients import SlotTable
from k2train.parallel.grid import ProcessGrid

Facts = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A frozen copy of this rank's state in host memory."""

    table: SlotTable
    lines: Mapping[str, Tensor]
    dtype: torch.dtype


def snapshot(table: SlotTable, lines: Mapping[str, Tensor], dtype: torch.dtype) -> Snapshot:
    """Copy the optimizer lines to host memory; `dtype` is that of the model's weights."""
    return Snapshot(table, {state: lines[state].detach().to("cpu", copy=True) for state in STATES}, dtype)


class CheckpointWriter:
    """Saves into `directory`; `keep_optimizer_states` newest numbered checkpoints keep theirs (0: all do)."""

    def __init__(self, directory: Path, grid: ProcessGrid, keep_optimizer_states: int, asynchronous: bool):
        self.directory, self.grid = directory, grid
        self.keep_optimizer_states, self.asynchronous = keep_optimizer_states, asynchronous
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, name: str, state: Snapshot, facts: Facts, committed: Callable[[Path, Facts], None]) -> None:
        """Save on all ranks. `facts` go into the manifest; rank 0 calls `committed(path, manifest)` after the rename."""
        self.wait()
        if not self.asynchronous:
            self._write(name, state, facts, committed)
            return

        def work() -> None:
            try:
                self._write(name, state, facts, committed)
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=work, name=f"save-{name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is committed; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, name: str, state: Snapshot, facts: Facts, committed: Callable[[Path, Facts], None]) -> None:
        final, aside = self.directory / name, self.directory / f"{name}.tmp"
        problem = ""
        if self.grid.rank == 0:
            if final.exists():
                problem = f"{final} exists already; a checkpoint is never written over"
            else:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / "model").mkdir(parents=True)
                (aside / "optimizer").mkdir()
        told = [problem]
        dist.broadcast_object_list(told, src=0, group=self.grid.background)
        if told[0]:
            raise CheckpointError(told[0])
        mesh = self.grid.host_mesh
        tensors = {
            "model": model_tensors(state.table, state.lines["master"].to(state.dtype), mesh),
            "optimizer": optimizer_tensors(state.table, dict(state.lines), mesh),
        }
        for folder, part in tensors.items():
            writer = dcp.HuggingFaceStorageWriter(str(aside / folder), save_distributed=True)
            dcp.save(dict(part), storage_writer=writer, process_group=self.grid.background)
        files = self._hash_and_sync(aside)
        described = self._gather({folder: describe(part) for folder, part in tensors.items()})
        if self.grid.rank == 0:
            manifest = {
                "format": FORMAT,
                "name": name,
                "saved": datetime.now(UTC).isoformat(timespec="seconds"),
                **facts,
                "tensors": {
                    folder: {key: part[folder][key] for part in described for key in part[folder]} for folder in tensors
                },
                "files": files,
            }
            write_synced(aside / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            for written in (aside / "model", aside / "optimizer", aside):
                sync_directory(written)
            aside.rename(final)
            sync_directory(self.directory)
            self._retire()
            committed(final, manifest)
        dist.barrier(group=self.grid.background)

    def _hash_and_sync(self, aside: Path) -> dict[str, dict[str, Any]]:
        """Each rank hashes and syncs its share of all files; the union on every rank."""
        dist.barrier(group=self.grid.background)
        paths = sorted(path for folder in ("model", "optimizer") for path in (aside / folder).iterdir())
        mine = {}
        for path in paths[self.grid.rank :: self.grid.layout.world_size]:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            mine[f"{path.parent.name}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return {name: facts for part in self._gather(mine) for name, facts in part.items()}

    def _gather(self, mine: Any) -> list[Any]:
        parts: list[Any] = [None] * self.grid.layout.world_size
        dist.all_gather_object(parts, mine, group=self.grid.background)
        return parts

    def _retire(self) -> None:
        """Thin old numbered checkpoints to their weights and drop saves on request that a newer checkpoint replaces."""
        paths = list_checkpoints(self.directory)
        for path in paths[:-1]:
            match = NAME.fullmatch(path.name)
            if match and match[2]:
                doomed = path.with_name(f"{path.name}.tmp")
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
                shutil.rmtree(doomed)
        numbered = [
            path for path in list_checkpoints(self.directory) if (match := NAME.fullmatch(path.name)) and not match[2]
        ]
        if self.keep_optimizer_states > 0:
            for path in numbered[: -self.keep_optimizer_states]:
                if not (path / THINNED).exists():
                    write_synced(path / THINNED, json.dumps({"removed": "optimizer"}) + "\n")
                    sync_directory(path)
                shutil.rmtree(path / "optimizer", ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
