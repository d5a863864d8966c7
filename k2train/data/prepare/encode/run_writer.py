"""Write sorted runs: documents collected in memory, sorted by key, one file per pass and part.

- A file is written array by array, since the safetensors library wants a copy of everything in
  memory.
- The format is that of `sorted_runs`.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from k2train.data.document_keys import key_base, key_of
from k2train.data.prepare.encode.sorted_runs import DTYPE_NAMES, FORMAT, Numbers
from k2train.data.prepare.workspace import process_suffix
from k2train.files import AtomicFile

MAX_DOCUMENTS = 2**20
GATHER_TOKENS = 2**20

Longs = npt.NDArray[np.int64]


class RunWriter:
    """Collects the documents of one subset and writes them as sorted runs, one per pass.

    - Runs are written whenever `capacity` is reached. The division into parts never shows in the
      chunks.
    - Tokens are held once, whatever the number of passes.
    - `repeated_ids` counts documents within the share whose source and name occurred before. Equal
      names have equal keys and are therefore adjacent, but only within a part: two in different
      parts are not found.
    """

    def __init__(self, stem: Path, subset: str, passes: int, seed: int, dtype: str, capacity: int):
        """`stem` begins the paths of the files; `capacity` is in tokens."""
        self.stem, self.subset, self.passes, self.seed = stem, subset, passes, seed
        self.capacity = capacity
        self.runs: list[list[dict[str, Any]]] = [[] for _ in range(passes)]
        # Pages that are never written cost no memory.
        self._tokens = np.empty(capacity, dtype=dtype)
        self._part = 0
        self.repeated_ids = 0
        self._clear()

    def _clear(self) -> None:
        self._used = 0
        self._names = bytearray()
        self._columns = {"places": array("Q"), "texts": array("Q"), "name_ends": array("Q")}
        self._columns |= {
            "lengths": array("I"),
            "sources": array("I"),
            "ordinals": array("I"),
            "fim": array("B"),
        }
        self._keys = [bytearray() for _ in range(self.passes)]
        self._source_keys: list[str] = []
        self._bases: list[Any] = []

    def add(
        self,
        source_key: str,
        ordinal: int,
        name: bytes,
        ids: Sequence[npt.NDArray[np.integer[Any]]],
        position: int,
        text_hash: int = 0,
        fim: int = 0,
    ) -> None:
        """Add a document; `ids` are the arrays of its tokens, `</s>` included.

        `ids` is empty for a document outside the share. Documents must come in ascending order of
        (source key, ordinal).
        """
        if not self._source_keys or self._source_keys[-1] != source_key:
            self._begin_source(source_key)
        length = sum(len(piece) for piece in ids)
        # The buffer is full: write the part and continue the source in a new one.
        if self._used + length > len(self._tokens):
            self._make_room(length)
            self._begin_source(source_key)

        if length:
            # Ids fit, since the vocabulary decided the dtype.
            np.concatenate(
                ids, out=self._tokens[self._used : self._used + length], casting="unsafe"
            )
            self._used += length

        # One key per pass, since every pass has an order of its own.
        for keys, base in zip(self._keys, self._bases, strict=True):
            keys += key_of(base, name)

        self._names += name
        columns = self._columns
        columns["places"].append(position)
        columns["texts"].append(text_hash)
        columns["name_ends"].append(len(self._names))
        columns["lengths"].append(length)
        columns["sources"].append(len(self._source_keys) - 1)
        columns["ordinals"].append(ordinal)
        columns["fim"].append(fim)
        if len(columns["fim"]) >= MAX_DOCUMENTS:
            self.flush()

    def _begin_source(self, source_key: str) -> None:
        """Make `source_key` the current source, with its part of the keys for each pass."""
        assert not self._source_keys or source_key > self._source_keys[-1], (
            f"{source_key} does not ascend"
        )
        self._source_keys.append(source_key)
        self._bases = [key_base(self.seed, self.subset, i, source_key) for i in range(self.passes)]

    def _make_room(self, length: int) -> None:
        """Write all documents held; one longer than the buffer gets a buffer of its own size."""
        self.flush()
        if length > len(self._tokens) or len(self._tokens) > self.capacity:
            self._tokens = np.empty(max(length, self.capacity), dtype=self._tokens.dtype)

    def flush(self) -> None:
        """Write all documents held, one run per pass, and release them."""
        count = len(self._columns["fim"])
        if count:
            for number, run in enumerate(self.runs):
                name = f"{self.stem.name}_{number:03d}_{self._part:05d}.safetensors"
                run.append(self._write(self.stem.with_name(name), number))
            self._part += 1
        self._clear()

    def _write(self, path: Path, number: int) -> dict[str, Any]:
        """Write the run of pass `number`; returns its entry for the task's record."""
        arrays, slices = self._arrays(number)
        facts = {"format": FORMAT, "subset": self.subset, "pass": str(number)}

        header, size_bytes = run_header(arrays, facts | {"sources": json.dumps(self._source_keys)})
        with AtomicFile(path, process_suffix()) as stream:
            stream.write(header)
            for name, values in arrays.items():
                if name in slices:
                    _write_slices(stream, values, *slices[name])
                else:
                    stream.write(values.data)

        keys = arrays["keys"]
        entry = {
            "path": path.name,
            "documents": len(keys),
            "tokens": self._used,
            "bytes": size_bytes,
        }

        return entry | {"first_key": int(keys[0]), "last_key": int(keys[-1])}

    def _arrays(self, number: int) -> tuple[dict[str, Numbers], dict[str, tuple[Longs, Longs]]]:
        """The arrays of the run of pass `number`, in the order of the file.

        Tokens and names are still in the order in which they came. The second mapping says which
        slices of them to write: (starts, ends) in the order of the keys.
        """
        # Keys were collected as big-endian bytes.
        keys = np.frombuffer(self._keys[number], dtype=">u8").astype(np.uint64)
        columns = {
            name: np.frombuffer(values, dtype=values_dtype(values))
            for name, values in self._columns.items()
        }
        # Documents were added in order of source and ordinal, so a stable sort by key breaks ties
        # correctly.
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # Equal ids have equal keys, adjacent after the sort. All passes hold the same documents.
        if number == 0:
            repeated = (keys[1:] == keys[:-1]) & (columns["lengths"][order[1:]] > 0)
            self.repeated_ids += int(repeated.sum())

        # Start and end of names and tokens, in the order in which documents were added.
        name_starts = np.concatenate([np.zeros(1, np.uint64), columns["name_ends"][:-1]])
        name_lengths = (columns["name_ends"] - name_starts)[order]
        ends = np.cumsum(columns["lengths"], dtype=np.int64)
        starts = (ends - columns["lengths"])[order]
        arrays = {
            "keys": keys,
            "places": columns["places"][order],
            "texts": columns["texts"][order],
            "name_ends": np.cumsum(name_lengths, dtype=np.uint64),
            "lengths": columns["lengths"][order],
            "sources": columns["sources"][order],
            "ordinals": columns["ordinals"][order],
            "tokens": self._tokens[: self._used],
            "fim": columns["fim"][order],
            "names": np.frombuffer(self._names, dtype=np.uint8),
        }

        return arrays, {
            "tokens": (starts, ends[order]),
            "names": (
                name_starts[order].astype(np.int64),
                columns["name_ends"][order].astype(np.int64),
            ),
        }


def values_dtype(values: "array[int]") -> np.dtype[Any]:
    """NumPy dtype of an array's items."""
    return np.dtype(f"u{values.itemsize}")


def run_header(arrays: Mapping[str, Numbers], facts: Mapping[str, str]) -> tuple[bytes, int]:
    """Safetensors header for arrays concatenated in this order, and the file's size in bytes."""
    tensors: dict[str, Any] = {"__metadata__": facts}
    offset = 0
    for name, values in arrays.items():
        offsets = [offset, offset + values.nbytes]
        tensors[name] = {
            "dtype": DTYPE_NAMES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        offset += values.nbytes

    content = json.dumps(tensors, separators=(",", ":")).encode()
    # Data starts at a multiple of 8 bytes.
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content, 8 + len(content) + offset


def _write_slices(stream: IO[bytes], values: Numbers, starts: Longs, ends: Longs) -> None:
    """Write the slices `starts[i]:ends[i]` one after another, in blocks.

    Avoids a sorted copy of everything.
    """
    block: list[Numbers] = []
    held = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        # Collect slices until a block is worth a write.
        block.append(values[start:end])
        held += end - start
        if held >= GATHER_TOKENS or len(block) >= GATHER_TOKENS:
            stream.write(np.concatenate(block).data)
            block, held = [], 0
    if block:
        stream.write(np.concatenate(block).data)
