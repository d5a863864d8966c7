"""Chunk task: merge sorted runs into the rows of one chunk, with provenance and boundaries.

- A chunk takes the samples of each subset that were dealt to it. They are read in the order of the
  stream and written to the rows that the keyed permutation assigns, into a preallocated file (see
  `row_file`).
- A chunk appears under its name only when it is complete, and its record is written last.
- Two processes that write the same chunk at once write different files with the same bytes.
- Alternatives considered: a lock per chunk; locks of a dead machine stay.
"""

import errno
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2train.data.manifest import ChunkInfo, chunk_dtype
from k2train.data.prepare.allocate.mixture import count_of, row_positions
from k2train.data.prepare.allocate.plan_file import HELD_OUT_TEXT, TRAINING, Plan, SubsetPlan
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.workspace import HELD_OUT, Workspace, process_suffix, write_json
from k2train.data.prepare.write.merge_runs import MIN_TOKENS, DocumentBatch, PassReader, Tokens
from k2train.data.prepare.write.provenance import PIECE, Provenance, piece_bytes, require_pyarrow
from k2train.data.prepare.write.row_file import ChunkFile, check_space, no_space
from k2train.data.prepare.write.text_files import write_texts
from k2train.data.text_record import distinct
from k2train.errors import DataError


@dataclass(frozen=True)
class Part:
    """Tokens `start:stop` of pass `number`.

    They begin at token `offset` of what the chunk takes of the subset.
    """

    number: int
    start: int
    stop: int
    offset: int


def parts_of(plan: Plan, subset: SubsetPlan, chunk: str) -> list[Part]:
    """The parts of a subset that a chunk takes, in order; held-out rows use the first pass."""
    parts: list[Part] = []
    offset = 0
    for samples in plan.chunks[chunk][subset.name]:
        start, stop = samples.start * plan.sequence_length, samples.stop * plan.sequence_length
        for number, first, end in (
            [(0, start, stop)] if chunk == HELD_OUT else subset.parts(start, stop)
        ):
            parts.append(Part(number, first, end, offset))
            offset += end - first
    return parts


def _within(parts: Sequence[Part], batch: DocumentBatch) -> Sequence[Part]:
    """The ascending `parts` that have tokens in a batch."""
    first = bisect_right(parts, batch.start, key=attrgetter("stop"))
    end = bisect_left(parts, batch.stop, key=attrgetter("start"))
    return parts[first:end]


def mask_of(chunk: str) -> int:
    """Mask of the documents that a chunk takes."""
    return HELD_OUT_TEXT if chunk == HELD_OUT else TRAINING


def chunk_task(workspace: Workspace, number: int, min_tokens: int = MIN_TOKENS) -> None:
    """Run chunk task `number`: write the chunk to the target folder and, last, its record.

    `min_tokens` is the size of a merged batch; nothing else depends on it. Raises DataError when
    the disk is full, and for ids that are not in the vocabulary.
    """
    require_pyarrow()
    name = workspace.chunk_names[number]
    target, records = workspace.target, workspace.folder / "chunks"
    remove_leftovers(target, f"{name}.")
    remove_leftovers(records, f"{name}.")
    plan = Plan.read(workspace.folder)
    check_space(target, name, _expected_bytes(plan, name))

    scratch = records / f"{name}{process_suffix()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()

    try:
        info, sources = _write_rows(workspace, plan, name, scratch, min_tokens)
    except OSError as error:
        # Only a full disk is the user's to fix.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_space(target, name, _expected_bytes(plan, name)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    files = [file for file in (info.file, info.provenance, info.borders) if file is not None]
    entries = [
        {"base": "target", "path": file, "bytes": (target / file).stat().st_size} for file in files
    ]
    texts = workspace.chunk_texts(name)
    entries.append(
        {
            "base": "folder",
            "path": texts.relative_to(workspace.folder).as_posix(),
            "bytes": texts.stat().st_size,
        }
    )
    write_json(
        workspace.chunk_record(name),
        {"files": entries, "info": info.model_dump(), "sources": sources},
    )


def _expected_bytes(plan: Plan, name: str) -> int:
    """Approximate disk space that a chunk needs while it is made."""
    rows = sum(map(count_of, plan.chunks[name].values()))
    # About one piece per row, and one per document.
    pieces = rows
    for subset in plan.subsets:
        for part in parts_of(plan, subset, name):
            source = subset.passes[part.number]
            tokens = max(1, int(source.tokens_before(mask_of(name))[-1]))
            documents = int(source.documents_before(mask_of(name))[-1])
            pieces += (part.stop - part.start) * documents // tokens + 1
    token_bytes = np.dtype(chunk_dtype(plan.vocab_size)).itemsize
    return rows * plan.sequence_length * token_bytes + piece_bytes(pieces)


def _write_rows(
    workspace: Workspace, plan: Plan, name: str, scratch: Path, min_tokens: int
) -> tuple[ChunkInfo, str]:
    """Write the chunk file and provenance; returns its info and the used sources as hex."""
    samples, length, target = plan.chunks[name], plan.sequence_length, workspace.target
    rows = sum(map(count_of, samples.values()))
    row_numbers = row_positions(rows, workspace.recipe.seed, name)
    provenance = Provenance(scratch, rows, plan.block_rows, length)
    ranks = {key: rank for rank, key in enumerate(plan.sources)}

    seen = np.zeros(len(plan.sources), dtype=bool)
    texts = [np.zeros(0, dtype=np.uint64)]
    # Samples are numbered subset after subset; `row_numbers` gives their rows.
    base = 0
    with ChunkFile(target / f"{name}.npy", rows, length, chunk_dtype(plan.vocab_size)) as file:
        for index, subset in enumerate(plan.subsets):
            count = count_of(samples[subset.name])
            filler = RowFiller(file, provenance, row_numbers[base : base + count], length, index)
            for number, group in groupby(parts_of(plan, subset, name), attrgetter("number")):
                parts, source = list(group), subset.passes[number]
                # A later pass has the texts of the first one.
                reader = PassReader(
                    workspace.folder, source, mask_of(name), ranks, min_tokens, texts=number == 0
                )
                for batch in reader.batches([(part.start, part.stop) for part in parts]):
                    for part in _within(parts, batch):
                        largest = filler.add(part, batch, seen, texts)
                        _check_id(workspace, subset.name, largest, plan.vocab_size)

            assert filler.rows == count, (
                f"{name}: {filler.rows} rows of {subset.name}, {count} were planned"
            )
            base += count

        sha256 = file.finish()
    write_texts(workspace.chunk_texts(name), distinct(np.concatenate(texts)))

    info = ChunkInfo(
        name=name,
        file=f"{name}.npy",
        rows=rows,
        tokens=rows * length,
        tokens_per_subset={s: count_of(r) * length for s, r in samples.items()},
        sha256=sha256,
    )

    return _write_provenance(workspace, plan, provenance, info), np.packbits(seen).tobytes().hex()


def _write_provenance(
    workspace: Workspace, plan: Plan, provenance: Provenance, info: ChunkInfo
) -> ChunkInfo:
    """Write the provenance files; returns `info` with their names and hashes."""
    file = f"{info.name}.parquet"
    borders = f"{info.name}.borders.npy" if workspace.recipe.document_borders else None
    borders_path = None if borders is None else workspace.target / borders
    names = [subset.name for subset in plan.subsets]
    sha256, borders_sha256 = provenance.write(
        workspace.target / file, names, plan.sources, borders_path
    )

    return info.model_copy(
        update={
            "provenance": file,
            "provenance_sha256": sha256,
            "provenance_content_sha256": provenance.content_sha256,
            "borders": borders,
            "borders_sha256": borders_sha256,
        }
    )


def _check_id(workspace: Workspace, subset: str, largest: int, vocab_size: int) -> None:
    """Raises DataError when an id is outside the vocabulary."""
    if largest >= vocab_size:
        raise DataError(
            f"subset {subset}: its runs hold the id {largest}, which is not below the "
            f"{vocab_size} of the tokenizer: delete {workspace.folder} and start again"
        )


class RowFiller:
    """Packs the documents of a subset end to end into rows of a chunk.

    `row_numbers` `[samples]` are the rows of its samples.
    """

    def __init__(
        self,
        file: ChunkFile,
        provenance: Provenance,
        row_numbers: npt.NDArray[np.uint32],
        length: int,
        subset: int,
    ) -> None:
        self.file, self.provenance, self.row_numbers, self.length, self.subset = (
            file,
            provenance,
            row_numbers,
            length,
            subset,
        )
        self.rows = 0
        # Two arrays for all batches, since new memory costs as much as copying into it. One is
        # filled while the other is being written.
        self._tokens = [np.empty(0, dtype=file.dtype), np.empty(0, dtype=file.dtype)]
        self._partial = 0

    def add(
        self,
        part: Part,
        batch: DocumentBatch,
        seen: npt.NDArray[np.bool_],
        texts: list[npt.NDArray[np.uint64]],
    ) -> int:
        """Pack the tokens of `part` that a batch holds; returns the largest id.

        Marks the sources of the documents in `seen`, and appends their texts to `texts`.
        """
        # Documents that overlap the part; the first and the last may be cut.
        first, last = (
            int(np.searchsorted(batch.ends, part.start, side="right")),
            int(np.searchsorted(batch.starts, part.stop)),
        )
        # In tokens of the subset within the chunk.
        shift = part.offset - part.start
        starts, ends = batch.starts[first:last] + shift, batch.ends[first:last] + shift
        low, high = part.offset, part.stop + shift
        tokens = batch.tokens[first:last]
        tokens[-1] = tokens[-1][: high - int(starts[-1])]
        tokens[0] = tokens[0][max(0, low - int(starts[0])) :]

        filled = self.rows * self.length + self._partial
        assert filled == max(low, int(starts[0])), (
            f"{filled} tokens laid out, the next begins at {starts[0]}"
        )

        # Append to the partial row, write complete rows, keep the rest.
        count = min(high, int(ends[-1])) - filled
        buffer = self._buffer(self._partial + count)
        np.concatenate(tokens, out=buffer[self._partial :])
        largest = int(buffer.max())
        full_rows = len(buffer) // self.length
        rows = buffer[: full_rows * self.length].reshape(full_rows, self.length)
        self.file.write(rows, self.row_numbers[self.rows : self.rows + full_rows])
        self._partial = len(buffer) - rows.size
        self.rows += full_rows
        self._swap_buffers(buffer[rows.size :])

        self._add_pieces(part, batch, slice(first, last), starts, (low, high))
        seen[batch.sources[first:last]] = True
        if batch.texts is not None:
            texts.append(batch.texts[first:last])

        return largest

    def _buffer(self, count: int) -> Tokens:
        """The current buffer with room for `count` tokens; it already holds the partial row."""
        if count > len(self._tokens[0]):
            larger = np.empty(count + count // 8, dtype=self.file.dtype)
            larger[: self._partial] = self._tokens[0][: self._partial]
            self._tokens[0] = larger
        return self._tokens[0][:count]

    def _swap_buffers(self, partial: Tokens) -> None:
        """Move the partial row to the other buffer and make that one current."""
        if len(partial) > len(self._tokens[1]):
            self._tokens[1] = np.empty_like(self._tokens[0])
        self._tokens[1][: len(partial)] = partial
        self._tokens.reverse()

    def _add_pieces(
        self,
        part: Part,
        batch: DocumentBatch,
        selected: slice,
        begins: npt.NDArray[np.int64],
        clip: tuple[int, int],
    ) -> None:
        """Record the provenance of documents that begin at tokens `begins`.

        A document has one piece for each row that it touches.
        """
        starts = np.maximum(begins, clip[0])
        ends = np.minimum(begins + batch.lengths[selected], clip[1])
        first_rows = starts // self.length
        # A document has one piece per row that it touches.
        touched = (ends - 1) // self.length - first_rows + 1
        document = np.repeat(np.arange(len(begins)), touched)
        row = (
            first_rows[document]
            + np.arange(len(document))
            - np.repeat(np.cumsum(touched) - touched, touched)
        )
        start = np.maximum(starts[document], row * self.length)

        pieces = np.empty(len(document), dtype=PIECE)
        pieces["row"] = self.row_numbers[row]
        pieces["start"] = start - row * self.length
        pieces["length"] = np.minimum(ends[document], (row + 1) * self.length) - start
        pieces["offset"] = start - begins[document]
        pieces["source"] = batch.sources[selected][document]
        pieces["fim"] = batch.fim[selected][document]
        pieces["name_bytes"] = batch.name_lengths[selected][document]
        pieces["subset"], pieces["repeat"] = self.subset, part.number
        self.provenance.add(pieces, batch.names, batch.name_starts[selected][document])
