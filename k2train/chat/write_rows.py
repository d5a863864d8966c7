"""Rows of packed conversations as a chunk: ids, loss mask, document borders and provenance.

- A row is filled up with the id that pads, or else the one that ends a document. Padding is never
  learned, and it is a document of its own, so attention can be kept out of it.
- The first token of a row is never learned: nothing predicts it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2train.chat.encode import Learned
from k2train.chat.pack import Row
from k2train.chat.spool import Spool
from k2train.data.chunk import write_chunk
from k2train.data.loss_mask import write_mask
from k2train.data.manifest import ChunkInfo
from k2train.data.prepare.write.provenance import PIECE, Provenance

SUBSET, PADDING = "chat", "padding"
BLOCK_TOKENS = 2**20


@dataclass(frozen=True)
class RowWriter:
    """Writes rows of conversations of a spool into a folder.

    `sources` has the names of the sources by their numbers; `scratch` is an empty folder.
    """

    folder: Path
    scratch: Path
    spool: Spool
    sources: tuple[str, ...]
    sequence_length: int
    vocab_size: int
    pad_id: int

    def write(self, name: str, rows: Sequence[Row]) -> ChunkInfo:
        """Write one chunk of these rows. Raises OSError."""
        count, length = len(rows), self.sequence_length
        ids = (block for block, _ in self._blocks(rows))
        info = write_chunk(self.folder, name, ids, count, self.vocab_size, {SUBSET: count * length})
        mask, borders, origins = f"{name}.mask.npy", f"{name}.borders.npy", f"{name}.parquet"
        learned = (block for _, block in self._blocks(rows))
        mask_sha256, targets = write_mask(self.folder / mask, learned, count)

        provenance = Provenance(self.scratch, count, self._block_rows, length)
        for start in range(0, count, self._block_rows):
            self._add_pieces(provenance, start, rows[start : start + self._block_rows])
        sha256, borders_sha256 = provenance.write(
            self.folder / origins, [SUBSET], [*self.sources, PADDING], self.folder / borders
        )
        return info.model_copy(
            update={
                "loss_mask": mask,
                "loss_mask_sha256": mask_sha256,
                "targets": targets,
                "provenance": origins,
                "provenance_sha256": sha256,
                "provenance_content_sha256": provenance.content_sha256,
                "borders": borders,
                "borders_sha256": borders_sha256,
            }
        )

    @property
    def _block_rows(self) -> int:
        return max(1, BLOCK_TOKENS // self.sequence_length)

    def _blocks(self, rows: Sequence[Row]) -> Iterator[tuple[npt.NDArray[np.uint32], Learned]]:
        """Yield ids and learned flags, both [n, sequence_length]."""
        for first in range(0, len(rows), self._block_rows):
            part = rows[first : first + self._block_rows]
            ids = np.full((len(part), self.sequence_length), self.pad_id, dtype=np.uint32)
            learned = np.zeros(ids.shape, dtype=bool)
            for row, (_, conversations) in enumerate(part):
                start = 0
                for index in conversations:
                    own, flags = self.spool.read(index)
                    ids[row, start : start + len(own)] = own
                    learned[row, start : start + len(own)] = flags
                    start += len(own)
            learned[:, 0] = False
            yield ids, learned

    def _add_pieces(self, provenance: Provenance, first_row: int, rows: Sequence[Row]) -> None:
        """Add the pieces of some rows: one for each conversation, and one for the padding."""
        lengths = self.spool.lengths
        found, names = [], []
        for row, (epoch, conversations) in enumerate(rows, first_row):
            start = 0
            for index, origin in zip(conversations, self.spool.origins(conversations), strict=True):
                name = str(origin.line).encode()
                length = int(lengths[index])
                found.append((row, start, length, origin.source, 0, len(name), 0, epoch, 0))
                names.append(name)
                start += length
            if start < self.sequence_length:
                rest = self.sequence_length - start
                found.append((row, start, rest, len(self.sources), 0, 0, 0, epoch, 0))
                names.append(b"")
        starts = np.cumsum([0, *(len(name) for name in names[:-1])], dtype=np.int64)
        text = np.frombuffer(b"".join(names), dtype=np.uint8)
        provenance.add(np.array(found, dtype=PIECE), text, starts)
