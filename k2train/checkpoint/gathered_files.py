"""Facts of all ranks' shard files, gathered on rank 0 as one tensor of integers.

- Objects are made when their text is written, a few hundred at a time. A hundred thousand of them
  would set off a full garbage collection, which stops every thread.

Alternatives considered:
- Gathering pickled objects: each is padded to the longest, and all are unpickled at once.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from k2train.checkpoint.manifest import FOLDERS, FileFacts

HASH_WORDS = 4
"""A SHA-256 as 64-bit integers."""
NONE = -1
"""Size of a file that a rank did not write."""


def shard_name(folder: str, rank: int) -> str:
    """Name of the shard file that `rank` writes in `folder`."""
    return f"{folder}/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def pack_files(files: Mapping[str, FileFacts], rank: int) -> Tensor:
    """Facts of a rank's files as int64 [folders, 9]: size, and both hashes."""
    return torch.stack([_pack(files.get(shard_name(folder, rank))) for folder in FOLDERS])


def _pack(facts: FileFacts | None) -> Tensor:
    row = torch.full((1 + 2 * HASH_WORDS,), NONE, dtype=torch.int64)
    if facts is not None:
        row[0] = facts.bytes
        hashes = bytes.fromhex(facts.sha256) + bytes.fromhex(facts.facts_sha256 or "")
        row[1:] = torch.frombuffer(bytearray(hashes), dtype=torch.int64)
    return row


class GatheredFiles:
    """Shard files of all ranks from int64 [world, folders, 9], see `pack_files`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return int((self.rows[:, :, 0] != NONE).sum())

    def items(self, folder: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield (name, facts) of every file of `folder`, in the order of ranks."""
        for rank, row in enumerate(self.rows[:, FOLDERS.index(folder)].numpy()):
            if row[0] != NONE:
                hashes = row[1:].tobytes()
                facts = FileFacts(
                    bytes=int(row[0]), sha256=hashes[:32].hex(), facts_sha256=hashes[32:].hex()
                )
                yield shard_name(folder, rank), facts
