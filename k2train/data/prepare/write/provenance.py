"""Provenance of a chunk: its `.parquet`, one line per piece of a row, and its document boundaries.

- Pieces arrive in the order of the streams and are needed in the order of the rows. They are
  partitioned into a file per block of rows. Each block is then sorted and written alone as a row
  group, so a chunk's provenance is never completely in memory.
- Alternatives considered: sorting all pieces at the end; a chunk of short documents has hundreds of
  millions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from k2train.data.document_boundaries import DTYPE as BOUNDARIES_DTYPE
from k2train.data.npy import header_bytes
from k2train.data.prepare.workspace import process_suffix
from k2train.data.provenance_digest import ProvenanceDigest
from k2train.errors import UserError
from k2train.files import AtomicFile, sha256_file
from k2train.retry import list_retried, read_retried

try:
    import pyarrow as arrow
    from pyarrow import parquet
except ImportError:
    arrow = parquet = None

NAME_BYTES = 32
"""Assumed bytes of a document's name when disk space is estimated."""
FIM_KINDS = ("none", "psm", "spm")
PIECE = np.dtype(
    [
        ("row", "<u4"),
        ("start", "<u4"),
        ("length", "<u4"),
        ("source", "<u4"),
        ("offset", "<u8"),
        ("name_bytes", "<u4"),
        ("subset", "<u2"),
        ("repeat", "<u2"),
        ("fim", "u1"),
    ]
)

Pieces = npt.NDArray[np.void]


def require_pyarrow() -> None:
    """Raises UserError with the command to run when pyarrow is missing.

    Called before the encoding, not after it.
    """
    if arrow is None:
        raise UserError(
            "preparing data writes Parquet, which needs pyarrow: pip install 'k2train[data]'"
        )


def piece_bytes(pieces: int) -> int:
    """Approximate disk use of pieces while a chunk is made: temporary files, names, and Parquet."""
    return pieces * (2 * PIECE.itemsize + NAME_BYTES)


class Provenance:
    """Collects the pieces of a chunk's rows in any order, then writes its provenance files.

    `folder` is for temporary files of pieces.
    """

    def __init__(self, folder: Path, rows: int, block_rows: int, sequence_length: int) -> None:
        self.folder, self.block_rows, self.sequence_length = folder, block_rows, sequence_length
        self.blocks = -(-rows // block_rows)
        self.boundaries = 0
        self._digest = ProvenanceDigest()
        for path in list_retried(folder):
            path.unlink()

    def add(
        self, pieces: Pieces, names: npt.NDArray[np.uint8], name_starts: npt.NDArray[np.int64]
    ) -> None:
        """Add pieces `[n]`; the name of each begins at `name_starts` of `names`."""
        self.boundaries += int((pieces["start"] > 0).sum())
        # Sort the pieces by block and append each group to the file of its block.
        block = pieces["row"] // np.uint32(self.block_rows)
        order = np.argsort(block, kind="stable")
        pieces, name_starts = pieces[order], name_starts[order]

        ends = np.cumsum(np.bincount(block, minlength=self.blocks)).tolist()
        start = 0
        for number, end in enumerate(ends):
            if end > start:
                block_pieces = pieces[start:end]
                with self._path(number, "pieces").open("ab") as stream:
                    stream.write(block_pieces.tobytes())

                with self._path(number, "names").open("ab") as stream:
                    stream.write(
                        gather(
                            names,
                            name_starts[start:end],
                            block_pieces["name_bytes"].astype(np.int64),
                        ).tobytes()
                    )

            start = end

    @property
    def content_sha256(self) -> str:
        """Content hash of the provenance that was written."""
        return self._digest.hexdigest()

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:05d}.{kind}"

    def write(
        self,
        path: Path,
        subsets: Sequence[str],
        sources: Sequence[str],
        boundaries: Path | None = None,
    ) -> tuple[str, str | None]:
        """Write the Parquet file, and the boundaries if a path is given; returns their sha256.

        `content_sha256` is known afterwards.
        """
        if boundaries is None:
            with AtomicFile(path, process_suffix()) as stream:
                self._write_table(stream, subsets, sources, None)
            return sha256_file(path), None
        with (
            AtomicFile(path, process_suffix()) as stream,
            AtomicFile(boundaries, process_suffix()) as boundary_stream,
        ):
            boundary_stream.write(header_bytes((self.boundaries,), BOUNDARIES_DTYPE))
            self._write_table(stream, subsets, sources, boundary_stream)
        return sha256_file(path), sha256_file(boundaries)

    def _write_table(
        self,
        stream: IO[bytes],
        subsets: Sequence[str],
        sources: Sequence[str],
        boundaries: IO[bytes] | None,
    ) -> None:
        """Sort and write one row group per block and its boundaries; removes temporary files."""
        options = {
            "compression": "zstd",
            "use_dictionary": ["subset", "source", "fim", "repeat"],
            "column_encoding": {
                name: "DELTA_BINARY_PACKED" for name in ("row", "start", "length", "offset")
            },
        }
        with parquet.ParquetWriter(stream, schema(), **options) as writer:
            for number in range(self.blocks):
                pieces = np.frombuffer(read_retried(self._path(number, "pieces")), dtype=PIECE)
                names = np.frombuffer(read_retried(self._path(number, "names")), dtype=np.uint8)
                # Pieces by row, then by their start in the row.
                order = np.lexsort((pieces["start"], pieces["row"]))
                table = _table(pieces, order, names, subsets, sources)
                writer.write_table(table, row_group_size=len(pieces))
                self._digest.add(table)

                if boundaries is not None:
                    pieces = pieces[order]
                    # A piece that starts inside a row begins a document.
                    positions = (
                        pieces["row"].astype(np.uint64) * np.uint64(self.sequence_length)
                        + pieces["start"]
                    )
                    boundaries.write(
                        positions[pieces["start"] > 0].astype(BOUNDARIES_DTYPE).tobytes()
                    )

                self._path(number, "pieces").unlink()
                self._path(number, "names").unlink()


def schema() -> Any:
    """Columns of a chunk's provenance; a line is `length` tokens of a row from token `start`."""
    names = arrow.dictionary(arrow.int32(), arrow.string())
    return arrow.schema(
        [
            ("row", arrow.int32()),
            ("start", arrow.int32()),
            ("length", arrow.int32()),
            ("subset", names),
            ("source", names),
            ("document", arrow.string()),
            ("offset", arrow.int64()),
            ("fim", names),
            ("repeat", arrow.int16()),
        ]
    )


def _table(
    pieces: Pieces,
    order: npt.NDArray[np.int64],
    names: npt.NDArray[np.uint8],
    subsets: Sequence[str],
    sources: Sequence[str],
) -> Any:
    """The Parquet table of one block, its pieces in `order`."""
    ends = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum(pieces["name_bytes"], out=ends[1:])
    assert ends[-1] < 2**31, f"names of a block of rows are {ends[-1]} bytes; Arrow counts to 2**31"
    # Arrow builds the strings from offsets and bytes, without Python objects.
    buffers = arrow.py_buffer(ends.astype(np.int32)), arrow.py_buffer(names)
    documents = arrow.StringArray.from_buffers(len(pieces), *buffers).take(arrow.array(order))
    pieces = pieces[order]
    # The dictionary holds only the sources of the block, ordered by name, so that it depends on the
    # rows only.
    present, source = np.unique(pieces["source"], return_inverse=True)
    columns = [pieces[name].astype(np.int32) for name in ("row", "start", "length")]
    columns += [
        arrow.DictionaryArray.from_arrays(pieces["subset"].astype(np.int32), list(subsets)),
        arrow.DictionaryArray.from_arrays(
            source.astype(np.int32), [sources[i] for i in present.tolist()]
        ),
        documents,
        pieces["offset"].astype(np.int64),
        arrow.DictionaryArray.from_arrays(pieces["fim"].astype(np.int32), list(FIM_KINDS)),
        pieces["repeat"].astype(np.int16),
    ]

    return arrow.table(columns, schema=schema())


def gather(
    content: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Concatenate the slices of `content` with these starts and lengths."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # For every output byte, the distance to its index in `content`.
    shift = np.repeat(starts - (ends - lengths), lengths)
    return content[shift + np.arange(total)]
