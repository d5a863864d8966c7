"""Write a numbered checkpoint: aside, hashed, synced, then renamed into place. Nothing is ever written over.

Every rank writes its own safetensors shards through torch.distributed.checkpoint, then the ranks share the hashing and
syncing of all files; rank 0 writes the manifest last and commits by one rename. A kill at any moment leaves either no
directory of that name or a whole one.

Asynchronous: training waits for the copy of the three optimizer lines only; one thread per rank does the rest over a gloo
group of its own. A second save waits for the first, and so does the end of the run. What the disk refuses on one rank is
raised on all of them as the same SaveError: a rank that fails alone would leave the others waiting in a collective.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from k2train.checkpoint.manifest import FORMAT, MANIFEST, NAME, THINNED, list_checkpoints, seal
from k2train.checkpoint.tensors import MASTER, describe, model_tensors, optimizer_tensors
from k2train.errors import CheckpointError, UserError
from k2train.files import sha256_file, sync_directory, sync_file, write_synced
from k2train.parallel.gradients import SlotTable
from k2train.parallel.grid import ProcessGrid

Facts = dict[str, Any]
T = TypeVar("T")


class SaveError(RuntimeError):
    """The disk refused a checkpoint; raised on every rank alike. Those saved before are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """A frozen copy of this rank's state in host memory."""

    table: SlotTable
    lines: Mapping[str, Tensor]
    dtype: torch.dtype


def snapshot(table: SlotTable, lines: Mapping[str, Tensor], dtype: torch.dtype) -> Snapshot:
    """Copy the optimizer lines to host memory; `dtype` is that of the model's weights."""
    return Snapshot(table, {state: line.detach().to("cpu", copy=True) for state, line in lines.items()}, dtype)


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

    @property
    def failed(self) -> bool:
        """Whether the save in the background has gone wrong; `wait` raises it."""
        return self._error is not None

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
        self._together(name, lambda: self._make_room(final, aside))
        mesh = self.grid.host_mesh
        tensors = {
            "model": model_tensors(state.table, state.lines[MASTER].to(state.dtype), mesh),
            "optimizer": optimizer_tensors(state.table, dict(state.lines), mesh),
        }
        for folder, part in tensors.items():
            writer = dcp.HuggingFaceStorageWriter(str(aside / folder), save_distributed=True)
            try:
                dcp.save(dict(part), storage_writer=writer, process_group=self.grid.background)
            except CheckpointException as error:
                raise self._refused(name, _first_cause(error)) from None
        files = self._together(name, lambda: self._hash_and_sync(aside))
        described = self._together(name, lambda: {folder: describe(part) for folder, part in tensors.items()})
        manifest = seal(
            {
                "format": FORMAT,
                "name": name,
                "saved": datetime.now(UTC).isoformat(timespec="seconds"),
                **facts,
                "tensors": {
                    folder: {key: part[folder][key] for part in described for key in part[folder]} for folder in tensors
                },
                "files": {key: value for part in files for key, value in part.items()},
            }
        )
        self._together(name, lambda: self._commit(aside, final, manifest, committed))

    def _make_room(self, final: Path, aside: Path) -> None:
        if self.grid.rank != 0:
            return
        if final.exists():
            raise CheckpointError(f"{final} exists already; a checkpoint is never written over")
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "model").mkdir(parents=True)
        (aside / "optimizer").mkdir()

    def _hash_and_sync(self, aside: Path) -> dict[str, dict[str, Any]]:
        """Each rank hashes and syncs its share of all files."""
        paths = sorted(path for folder in ("model", "optimizer") for path in (aside / folder).iterdir())
        mine = {}
        for path in paths[self.grid.rank :: self.grid.layout.world_size]:
            sync_file(path)
            mine[f"{path.parent.name}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        return mine

    def _commit(self, aside: Path, final: Path, manifest: Facts, committed: Callable[[Path, Facts], None]) -> None:
        if self.grid.rank != 0:
            return
        write_synced(aside / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for written in (aside / "model", aside / "optimizer", aside):
            sync_directory(written)
        aside.rename(final)
        sync_directory(self.directory)
        committed(final, manifest)
        try:
            self._retire()
        except OSError as error:
            raise SaveError(
                f"{final.name} is saved, but older checkpoints in {self.directory} could not be thinned: "
                f"{error.strerror or error}; make the directory writable, then start the same command again"
            ) from None

    def _together(self, name: str, part: Callable[[], T]) -> list[T]:
        """Do a part of the save on every rank; all results on every rank, or the first rank's error on every rank."""
        mine: T | None = None
        problem: Exception | None = None
        try:
            mine = part()
        except Exception as error:
            # Whatever it is: a rank that left here alone would keep the others in the exchange below.
            problem = error if isinstance(error, (OSError, UserError, SaveError)) else RuntimeError(repr(error))
        parts: list[Any] = [None] * self.grid.layout.world_size
        dist.all_gather_object(parts, (mine, problem), group=self.grid.background)
        for _, found in parts:
            if isinstance(found, (UserError, SaveError)):
                raise found
            if found is not None:
                raise self._refused(name, found)
        return [value for value, _ in parts]

    def _refused(self, name: str, error: BaseException) -> SaveError:
        if not isinstance(error, OSError):
            return SaveError(f"{name} could not be saved in {self.directory}: {error!r}")
        return SaveError(
            f"{name} could not be saved in {self.directory}: {error.strerror or error}; earlier checkpoints are "
            "whole; make room or the directory writable, then start the same command again"
        )

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
                shutil.rmtree(path / "optimizer", ignore_errors=True)


def remove_unfinished(directory: Path) -> list[str]:
    """Delete what a dead run never finished writing (the caller holds the run's lock); their names."""
    found = sorted(directory.glob("ckpt_*.tmp"))
    for path in found:
        shutil.rmtree(path)
    return [path.name for path in found]


def set_aside_later(path: Path, attempt: int) -> list[str]:
    """Checkpoints after `path` would be in the way of the new ones: moved aside, never deleted; their names."""
    found = list_checkpoints(path.parent)
    later = found[found.index(path) + 1 :]
    aside = path.parent / f"set_aside_by_attempt_{attempt}"
    for checkpoint in later:
        aside.mkdir(exist_ok=True)
        checkpoint.rename(aside / checkpoint.name)
    return [checkpoint.name for checkpoint in later]


def _first_cause(error: CheckpointException) -> BaseException:
    return next((cause for _, (cause, _) in sorted(error.failures.items())), error)
