"""Whole tensors of a checkpoint in one precision, one at a time, whatever layout saved it.

- Every byte is checked against the manifest's hashes on the way, so no value is used that is not
  what was saved. Formats 1 and 2, which have no hashes of pieces, are verified before.
- fp32 comes from the master weights, as long as the checkpoint has them. bf16 comes from the
  weights, which are the master weights rounded.

Alternatives considered:
- The loader of a run: it fills an optimizer, and needs the memory of one.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from k2train.checkpoint.blocks import MASTER, TORCH_DTYPES
from k2train.checkpoint.manifest import (
    MANIFEST,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.piece_check import Damage
from k2train.checkpoint.reshard_read import Read, Target, execute_reads, plan_reads
from k2train.checkpoint.retention import is_on_demand
from k2train.checkpoint.side_files import FileTable
from k2train.checkpoint.verify import check_folders, check_headers, verify_checkpoint
from k2train.errors import CheckpointError, UnavailableError
from k2train.hf.config_file import DTYPE_NAMES
from k2train.hf.shapes import architecture_of, tensor_shapes
from k2train.retry import is_file_retried, is_passing


def checkpoints_to_try(path: Path) -> list[Path]:
    """Return a checkpoint itself, or the numbered ones of a run directory, newest first.

    Raises CheckpointError for neither.
    """
    if is_file_retried(path / MANIFEST):
        return [path]
    found = [path for path in list_checkpoints(path / "checkpoints") if not is_on_demand(path)]
    if not found:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run directory with a numbered one"
        )
    return found[::-1]


def newer_save(run: Path) -> Path | None:
    """Return a save inside a chunk that is newer than every numbered checkpoint of a run."""
    newest = list_checkpoints(run / "checkpoints")[-1:]
    return newest[0] if newest and is_on_demand(newest[0]) else None


class CheckpointSource:
    """Tensors of the checkpoint at `path` in a `precision`; opening it reads no value.

    Raises CheckpointError when the checkpoint is not whole, and UnavailableError.
    """

    def __init__(self, path: Path, precision: str | None = None) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.architecture = architecture_of(path, self.manifest)
        self.shapes = tensor_shapes(self.architecture)
        self.thinned = is_thinned(path)
        stored = self._stored = {
            facts["dtype"] for facts in self.manifest.tensors.get("model", {}).values()
        }
        own = "fp32" if "float32" in stored else "bf16"
        self.precision = precision or own
        self.dtype = TORCH_DTYPES[DTYPE_NAMES[self.precision]]

        masters = self.precision == "fp32" and own != "fp32" and not self.thinned
        self.folder = "optimizer" if masters else "model"
        """Where the values are read."""
        self._suffix = f".{MASTER}" if masters else ""
        self._check_tensors()
        with _one_line(path):
            self._reads = self._plan()

    @property
    def values(self) -> str:
        """Where the values are read, in words."""
        rounded = self.precision == "fp32" and "float32" not in self._stored
        removed = self.folder == "model" and rounded
        return f"{self.folder}/" + (", its master weights were removed" if removed else "")

    def _check_tensors(self) -> None:
        found = self.manifest.shapes(self.folder)
        for name, shape in self.shapes.items():
            key = f"{name}{self._suffix}"
            if tuple(found.get(key, ())) != shape:
                raise CheckpointError(
                    f"{self.path}: {key} has shape {found.get(key)}, config.model makes it "
                    f"{list(shape)}"
                )

    def _plan(self) -> dict[str, list[Read]]:
        table = FileTable(self.path, self.manifest)
        if self.manifest.format < 3:
            verify_checkpoint(self.path)
        else:
            check_folders(self.path, self.manifest, table)
            check_headers(self.path, self.manifest, table.all(self.folder))

        # Memory is only taken when a tensor is read.
        targets = [
            Target(
                f"{name}{self._suffix}",
                (0,) * len(shape),
                shape,
                torch.empty(shape, dtype=self.dtype, device="meta"),
            )
            for name, shape in self.shapes.items()
        ]
        found: dict[str, list[Read]] = defaultdict(list)
        for read in plan_reads(self.path, self.folder, self.manifest, targets):
            found[read.target.name.removesuffix(self._suffix)].append(read)
        return found

    def read(self, name: str) -> Tensor:
        """Read a whole tensor. Raises CheckpointError when its bytes are not those saved."""
        values = torch.empty(self.shapes[name], dtype=self.dtype)
        reads = [
            replace(read, target=replace(read.target, values=values)) for read in self._reads[name]
        ]
        # Every stored dtype is exact in fp32: a copy converts it, without a tensor in between.
        same = all(TORCH_DTYPES[read.extent.dtype] == self.dtype for read in reads)
        exact = same or self.dtype == torch.float32
        with _one_line(self.path):
            execute_reads(reads, round_to=None if exact else self.dtype)
        return values


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Say on one line what is wrong with the files of a checkpoint."""
    try:
        yield
    except Damage as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        if is_passing(error):
            raise UnavailableError(f"{path} cannot be read ({error.strerror})") from None
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except EOFError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error})") from None
