"""Sorted runs: encoded documents on disk, one file per (encode task, subset, pass, part).

- A run holds documents sorted by key. A chunk takes a range of keys, so it reads one slice of each
  run.
- A run is a safetensors file: plain arrays that other tools can open.
- `run_writer` writes it, this module reads it.
- It is opened for several reads at most: a merge reads more runs than a process may hold open, and
  a file server answers an open more slowly than a read.

    keys uint64 [n]        ascending; ties by source, then ordinal
    places uint64 [n]      split position, see `source`
    texts uint64 [n]       first bits of the text's sha256, see `source.text_hash`
    name_ends uint64 [n]   ends of the documents' names in `names`
    lengths uint32 [n]     tokens, </s> included; 0: outside the share, kept for its text hash only
    sources uint32 [n]     index into the metadata's `sources`, which are sorted
    ordinals uint32 [n]    number of the document in its source
    tokens uint16 | uint32 [sum of lengths]
    fim uint8 [n]          0 none, 1 psm, 2 spm
    names uint8 [...]      UTF-8, concatenated
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError
from k2train.retry import OpenFile, open_retried, read_retried, retried

Numbers = npt.NDArray[np.unsignedinteger[Any]]

FORMAT = "k2train-run-1"
DTYPE_NAMES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64"}
"""Names of dtypes in a safetensors header."""
_DTYPES = {name: np.dtype(dtype) for dtype, name in DTYPE_NAMES.items()}


class Run:
    """A run on disk, read in slices.

    Opening reads only the header; arrays are read on request.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that is missing or not a run."""
        self.path = path
        self._file: OpenFile | None = None
        try:
            with open_retried(path) as stream:
                # safetensors: 8 bytes with the length of the header, the header, the data.
                self._data_bytes = 8 + int.from_bytes(stream.read(8), "little")
                size_bytes = retried(path.stat, path).st_size
                if self._data_bytes > size_bytes:
                    raise ValueError("it is cut off")
                header = json.loads(stream.read(self._data_bytes - 8))

            self.facts: dict[str, str] = header.pop("__metadata__")
            self._tensors: dict[str, dict[str, Any]] = header

            if (
                self.facts["format"] != FORMAT
                or max(t["data_offsets"][1] for t in header.values()) + self._data_bytes
                != size_bytes
            ):
                raise ValueError("it is of another version, or cut off")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); start the preparation again"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not a run ({error}); delete it and start the preparation again"
            ) from None

    def __len__(self) -> int:
        return int(self._tensors["keys"]["shape"][0])

    @property
    def subset(self) -> str:
        """Name of the subset."""
        return self.facts["subset"]

    @property
    def pass_number(self) -> int:
        """Number of the pass, from 0."""
        return int(self.facts["pass"])

    @cached_property
    def source_keys(self) -> list[str]:
        """Keys that `sources` points to, ascending."""
        keys: list[str] = json.loads(self.facts["sources"])
        return keys

    @property
    def tokens_total(self) -> int:
        """Tokens of all documents."""
        return int(self._tensors["tokens"]["shape"][0])

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the file open for the reads inside."""
        with OpenFile(self.path) as self._file:
            try:
                yield
            finally:
                self._file = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Numbers:
        """Read the items `start:stop` of an array.

        `tokens` and `names` count in their own items, all other arrays in documents.
        """
        entry = self._tensors[name]
        stop = entry["shape"][0] if stop is None else stop
        assert 0 <= start <= stop <= entry["shape"][0], (
            f"{self.path}: {name}[{start}:{stop}] of {entry['shape'][0]}"
        )
        dtype = _DTYPES[entry["dtype"]]
        offset = self._data_bytes + entry["data_offsets"][0] + start * dtype.itemsize
        size_bytes = (stop - start) * dtype.itemsize
        if self._file is not None:
            return np.frombuffer(self._file.read(offset, size_bytes), dtype)
        return np.frombuffer(read_retried(self.path, offset, size_bytes), dtype)

    def names(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the documents `start:stop`."""
        stop = len(self) if stop is None else stop
        if start == stop:
            return []
        # `name_ends` counts from the start of the file; make it relative to the slice.
        first = int(self.read("name_ends", start - 1, start)[0]) if start else 0
        ends = (self.read("name_ends", start, stop) - np.uint64(first)).tolist()
        content = self.read("names", first, first + ends[-1]).tobytes()
        return [content[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def documents(self) -> Iterator[tuple[int, str, int, str, list[int]]]:
        """Yield (key, source key, ordinal, name, tokens) one by one; slow and simple."""
        start = 0
        columns = zip(
            *(self.read(c).tolist() for c in ("keys", "sources", "ordinals", "lengths")),
            strict=True,
        )
        for name, (key, source, ordinal, length) in zip(self.names(), columns, strict=True):
            yield (
                key,
                self.source_keys[source],
                ordinal,
                name,
                self.read("tokens", start, start + length).tolist(),
            )

            start += length
