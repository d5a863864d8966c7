"""Merging: a weighted sum of checkpoints, tensor by tensor, written as a checkpoint of its own.

- Each tensor is w1 * x1 + w2 * x2 + ... in fp32, added in the order of the parents; each product
  and each sum is rounded once. So the bits depend on no layout, thread or machine.
- `optimizer/` holds the sums as master weights, `model/` the same rounded to the precision of the
  newest parent, as a run saves them. There are no moments: it can only start another run.
- Memory holds two tensors. Every byte that is read is checked against its hash.
- It gets its name by one rename when all of it is on the disk.

Alternatives considered:
- `torch.add` with a factor: it may fuse product and sum, and the bits then depend on the processor.
- Loading whole checkpoints: n times the model in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2train.checkpoint.blocks import MASTER, TORCH_DTYPES, tensor_bytes
from k2train.checkpoint.disk_space import BLOCK_FACTS_BYTES, MANIFEST_BYTES, free_bytes
from k2train.checkpoint.gathered_files import shard_name
from k2train.checkpoint.manifest import (
    FACTS,
    FOLDERS,
    FORMAT,
    MANIFEST,
    DataPosition,
    FileFacts,
    PieceFacts,
    SaveFacts,
    TensorFacts,
    manifest_text,
    seal,
)
from k2train.checkpoint.piece_check import ShardReader, pieces_of
from k2train.checkpoint.run_facts import ChunkFacts, MergeFacts
from k2train.checkpoint.shards import DTYPES, Block, Extent, read_header, write_shard
from k2train.checkpoint.side_files import write_pieces
from k2train.data.inspect.trained_tokenizer import read_beside, write_beside
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.files import OwnFolder, remove_empty, sync_directory, write_synced
from k2train.merge.parents import Parent
from k2train.merge.weights import Kind
from k2train.plan.cost import parameters
from k2train.retry import exists_retried, reason
from k2train.state_digest import block_sums, digest_text, state_root
from k2train.text import bytes_text

FILE_BYTES = 5 * 10**9
"""Bytes of master weights in a shard file; a tensor that is larger has a file of its own."""


class Merge:
    """A merge of `parents` into the checkpoint `path`; `write`, then `commit` or `discard`.

    `progress` is called with the name of each tensor before it is computed.
    Raises RunError when `path` exists or there is no room.
    """

    def __init__(
        self,
        parents: Sequence[Parent],
        path: Path,
        kind: Kind,
        progress: Callable[[str], None] = lambda name: None,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.parents, self.path, self.kind = parents, path, kind
        self.progress, self.file_bytes = progress, file_bytes
        self.newest = parents[-1]
        self.shapes = self.newest.source.shapes
        stored = {facts["dtype"] for facts in self.newest.manifest.tensors["model"].values()}
        self.dtype = "float32" if "float32" in stored else "bfloat16"
        """Dtype of `model/`."""
        self.temporary = path.parent / f"{path.name}.merge.tmp"
        self._digests: dict[str, str] = {}
        self._own: OwnFolder | None = None
        self._made = [one for one in path.parents if not exists_retried(one)]
        self._check_room()

    def _check_room(self) -> None:
        if exists_retried(self.path):
            raise RunError(
                f"{self.path} exists; a checkpoint is never overwritten, name another with --to"
            )
        size = parameters(self.newest.source.architecture) * (4 + DTYPES[self.dtype][1])
        needed = size + MANIFEST_BYTES + 2 * BLOCK_FACTS_BYTES * len(self.shapes)
        free = free_bytes(self.path.parent.absolute())
        if needed > free:
            raise RunError(
                f"{self.path} needs {bytes_text(needed)}, {bytes_text(free)} are free: free space, "
                "or name a place on another disk with --to"
            )

    def write(self) -> dict[str, Any]:
        """Write all files under the temporary name; returns the content of the manifest.

        Raises CheckpointError when a byte of a parent is not what was saved or a value is not
        finite, UnavailableError when a disk refuses.
        """
        try:
            self._own = OwnFolder(self.temporary)
            for inner in (*FOLDERS, FACTS):
                (self.temporary / inner).mkdir()
            content = self._content(dict(self._write_files()))
            if (tokenizer := read_beside(self.newest.path)) is not None:
                write_beside(self.temporary, tokenizer)
            write_synced(self.temporary / MANIFEST, manifest_text(content))
        except BlockingIOError:
            raise RunError(
                f"{self.path} is being written by another merge: wait for it, or name another "
                "place with --to"
            ) from None
        except OSError as error:
            raise UnavailableError(
                f"{self.path} could not be written ({reason(error, self.path.parent)}); nothing "
                "was left"
            ) from None
        return content

    def commit(self) -> None:
        """Sync the files and give them their name. Raises OSError."""
        for inner in (*FOLDERS, FACTS):
            sync_directory(self.temporary / inner)
        sync_directory(self.temporary)
        self.temporary.rename(self.path)
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove what was written and not committed."""
        if self._own is not None:
            self._own.close()
            self._own = None
        remove_empty(self._made)

    def _write_files(self) -> Iterator[tuple[str, FileFacts]]:
        """Write the sums as files of master weights, then each rounded; yield names and facts."""
        for number, names in enumerate(self._groups()):
            masters = [
                Block(f"{name}.{MASTER}", _origin(shape), shape, "float32", self._summed(name))
                for name, shape in names.items()
            ]
            optimizer, model = (shard_name(folder, number) for folder in ("optimizer", "model"))
            # No block waits for its hash: the next one is made of two tensors.
            facts, pieces = write_shard(self.temporary / optimizer, masters, most_waiting=0)
            yield optimizer, write_pieces(self.temporary, optimizer, facts, pieces)

            file = self.temporary / optimizer
            extents = {extent.name: extent for extent in read_header(file)[1]}
            weights = [
                Block(
                    name,
                    _origin(shape),
                    shape,
                    self.dtype,
                    partial(_rounded, file, extents[f"{name}.{MASTER}"], pieces, self.dtype),
                )
                for name, shape in names.items()
            ]
            facts, pieces = write_shard(self.temporary / model, weights, most_waiting=0)
            yield model, write_pieces(self.temporary, model, facts, pieces)

    def _groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Cut the tensors, in their order, into files of a bounded size."""
        groups: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, shape in self.shapes.items():
            size = Block(name, (), shape, "float32", lambda: memoryview(b"")).num_bytes
            if groups[-1] and filled + size > self.file_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = shape
            filled += size
        return groups

    def _summed(self, name: str) -> Callable[[], memoryview]:
        def content() -> memoryview:
            self.progress(name)
            values = weighted_sum(self.parents, name)
            sums = block_sums(values.numpy(), _origin(values.shape), values.shape)
            self._digests[f"{name}.{MASTER}"] = digest_text(sums)
            return tensor_bytes(values)

        return content

    def _content(self, files: Mapping[str, FileFacts]) -> dict[str, Any]:
        facts = _save_facts(self.parents, self.kind)
        tables = {
            "model": {
                name: TensorFacts(shape=list(shape), dtype=self.dtype)
                for name, shape in self.shapes.items()
            },
            "optimizer": {
                f"{name}.{MASTER}": TensorFacts(shape=list(shape), dtype="float32")
                for name, shape in self.shapes.items()
            },
        }
        return seal(
            {
                "format": FORMAT,
                "name": self.path.name,
                "saved": datetime.now(UTC).isoformat(timespec="seconds"),
                **facts.model_dump(exclude_unset=True),
                "tensors": tables,
                "files": dict(files),
                "state": {
                    "root": state_root(self._digests, facts.step, facts.adam_steps),
                    "digests": dict(self._digests),
                },
            }
        )


def _origin(shape: Sequence[int]) -> tuple[int, ...]:
    return (0,) * len(shape)


def weighted_sum(parents: Sequence[Parent], name: str) -> Tensor:
    """Return the sum of weight times tensor `name` over the parents, in their order, fp32.

    Raises CheckpointError for bytes that are not those saved, and for values that are not finite.
    """
    total: Tensor | None = None
    for parent in parents:
        values = parent.source.read(name)
        _check_finite(values, f"{parent.path}: {name}")
        values.mul_(parent.weight)
        total = values if total is None else total.add_(values)
        # Released before the next one is read.
        del values
    assert total is not None, "a merge has parents"
    _check_finite(total, f"the sum of {name}")
    return total


def _check_finite(values: Tensor, what: str) -> None:
    low, high = values.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{what} has values that are not finite; leave that checkpoint out, or take an "
            "earlier one"
        )


def _rounded(file: Path, extent: Extent, pieces: PieceFacts, dtype: str) -> memoryview:
    """Read master weights that were just written, checked, and round them."""
    values = torch.empty(extent.shape, dtype=torch.float32)
    view = tensor_bytes(values)
    with closing(ShardReader(file)) as reader:
        for start, stop, wanted in pieces_of(pieces, extent, extent.start, extent.stop):
            part = view[start - extent.start : stop - extent.start]
            reader.read_piece(part, start, wanted, extent.name)
    return tensor_bytes(values.to(TORCH_DTYPES[dtype]))


def _save_facts(parents: Sequence[Parent], kind: Kind) -> SaveFacts:
    """Return what the manifest says: step, config and data are those of the newest parent."""
    newest = parents[-1].manifest
    facts = {
        "step": newest.step,
        "adam_steps": newest.adam_steps,
        "consumed_tokens": newest.consumed_tokens,
        "chunks": _chunks(parents),
        "config": newest.config,
        "data": newest.data,
        "merged": MergeFacts(weights=kind, parents=tuple(parent.facts for parent in parents)),
    }
    kept = {"lr": newest.lr, "parent": newest.parent}
    return SaveFacts.model_validate(facts | {k: v for k, v in kept.items() if v is not None})


def _chunks(parents: Sequence[Parent]) -> DataPosition:
    """Return the newest parent's position, or all chunks that any of them has begun.

    A stage that starts from here must find whatever was trained on.
    """
    newest = parents[-1].manifest.chunks
    begun: dict[str, ChunkFacts] = {chunk.sha256: chunk for chunk in newest.begun()}
    before = len(begun)
    for parent in parents:
        for chunk in parent.manifest.chunks.begun():
            begun.setdefault(chunk.sha256, chunk)
    if len(begun) == before:
        return newest
    return DataPosition(consumed=len(begun), order=tuple(begun.values()))
