"""Content hash of a chunk's provenance: of its columns, whatever program wrote the Parquet file.

- The bytes of a Parquet file depend on the version of its writer, on compression and on row groups.
  The values do not.
- A sha256 runs over each column; memory does not grow with the chunk.

Per column, in the order of the lines:

    numbers    int64, little-endian; -1 for a missing one
    words      of subset, source and fim: the first 8 bytes of each word's sha256; 0 if missing
    texts      of all other columns: lengths in bytes as int64, -1 if missing, and the UTF-8 bytes

Alternatives considered:
- A canonical Parquet file: the format leaves encodings and page sizes to the writer.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import pyarrow as arrow
    from pyarrow import compute
except ImportError:
    arrow = compute = None

_WORDS = frozenset({"subset", "source", "fim"})


class ProvenanceDigest:
    """Running hash of provenance; add its tables or record batches in order."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}
        self._lengths: dict[str, Any] = {}
        self._count = 0

    def add(self, table: Any) -> None:
        """Add a pyarrow table or record batch; however the lines are divided, the hash is one."""
        self._count += table.num_rows
        for name in table.schema.names:
            column = table.column(name)
            chunks = column.chunks if isinstance(column, arrow.ChunkedArray) else [column]
            for values in chunks:
                self._add_column(name, values)

    def _add_column(self, name: str, values: Any) -> None:
        running = self._columns.setdefault(name, hashlib.sha256())
        if name in _WORDS:
            running.update(_hashes_of_words(values).data)
        elif arrow.types.is_integer(values.type):
            running.update(_integers(values).data)
        else:
            lengths, content = _texts(values)
            self._lengths.setdefault(name, hashlib.sha256()).update(lengths.data)
            running.update(content)

    def hexdigest(self) -> str:
        """SHA-256 in hexadecimal of the number of lines and of all columns by name."""
        digest = hashlib.sha256(f"k2train provenance 1\n{self._count}\n".encode())
        for name in sorted(self._columns):
            running = [self._columns[name], self._lengths.get(name)]
            texts = " ".join(item.hexdigest() for item in running if item is not None)
            digest.update(f"{name} {texts}\n".encode())
        return digest.hexdigest()


def _integers(values: Any) -> npt.NDArray[np.int64]:
    plain = compute.fill_null(compute.cast(values, arrow.int64()), -1)
    return np.ascontiguousarray(plain.to_numpy(zero_copy_only=False), dtype="<i8")


def _hashes_of_words(values: Any) -> npt.NDArray[np.uint64]:
    if not arrow.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    words = [hashlib.sha256(word.encode()).digest() for word in values.dictionary.to_pylist()]
    # One more entry, which missing words point to.
    table = np.array([*(int.from_bytes(word[:8], "big") for word in words), 0], dtype="<u8")
    indices = compute.fill_null(compute.cast(values.indices, arrow.int64()), len(words))
    return np.ascontiguousarray(table[indices.to_numpy(zero_copy_only=False)])


def _texts(values: Any) -> tuple[npt.NDArray[np.int64], bytes]:
    """Lengths in bytes, -1 where a text is missing, and all bytes."""
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    values = compute.cast(values, arrow.large_string())
    lengths = _integers(compute.binary_length(values))
    # Offsets and bytes as Arrow lays them out; a slice begins behind the start of the buffers.
    offsets = np.frombuffer(values.buffers()[1] or b"\0" * 8, dtype="<i8")
    first, last = int(offsets[values.offset]), int(offsets[values.offset + len(values)])
    content = values.buffers()[2]
    return lengths, b"" if content is None else bytes(memoryview(content)[first:last])
