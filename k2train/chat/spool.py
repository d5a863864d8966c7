"""Spool: encoded conversations on disk while they are packed, with a few numbers each in memory.

- A file holds ids and learned flags of each conversation, in the order of reading.
- Memory holds length, origin, key and a digest of each, some 150 bytes.
- A conversation whose ids were there before is a copy, which could be held out and learned at once.
"""

import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.chat.encode import Encoded, Learned

IDS = np.dtype("<u4")


class Origin(NamedTuple):
    """Where a conversation is from: number of its source, and line or row."""

    source: int
    line: int


class Spool:
    """Writes conversations, then reads them in any order. A context manager."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed.to_bytes(16, "big", signed=True)
        self._stream = path.open("wb")
        self._map: npt.NDArray[np.uint8] | None = None
        self._lengths, self._sources, self._lines = array("Q"), array("Q"), array("Q")
        self._keys = array("Q")
        self._seen: set[bytes] = set()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._map = None
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, encoded: Encoded, origin: Origin) -> bool:
        """Keep a conversation; returns False for a copy of one that was there before."""
        ids = encoded.ids.astype(IDS).tobytes()
        digest = hashlib.sha256(ids).digest()
        if digest[:16] in self._seen:
            return False
        self._seen.add(digest[:16])

        self._stream.write(ids)
        self._stream.write(encoded.learned.astype(np.uint8).tobytes())
        self._lengths.append(len(encoded.ids))
        self._sources.append(origin.source)
        self._lines.append(origin.line)
        key = hashlib.sha256(b"k2train chat order\0" + self._seed + digest).digest()
        self._keys.append(int.from_bytes(key[:8], "big"))
        return True

    def close(self) -> None:
        """End the writing."""
        self._stream.close()
        self._seen.clear()
        ends = np.cumsum(self.lengths * (IDS.itemsize + 1))
        self._starts = np.concatenate([np.zeros(1, np.int64), ends])
        if len(self):
            self._map = np.memmap(self._path, dtype=np.uint8, mode="r")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each conversation, once the writing has ended."""
        return np.array(self._lengths, dtype=np.int64)

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """A number for each conversation that depends on it and the seed only, once written."""
        return np.array(self._keys, dtype=np.uint64)

    def origins(self, indices: Sequence[int]) -> list[Origin]:
        """Where these conversations are from."""
        return [Origin(self._sources[index], self._lines[index]) for index in indices]

    def read(self, index: int) -> tuple[npt.NDArray[np.uint32], Learned]:
        """Ids [n] and learned flags [n] of a conversation."""
        assert self._map is not None, "read after the writing has ended"
        start, length = int(self._starts[index]), self._lengths[index]
        middle = start + IDS.itemsize * length
        ids = self._map[start:middle].view(IDS)
        return ids, self._map[middle : middle + length].astype(bool)
