"""Building the search index of a data folder: suffix arrays, part by part.

- Sorted by libdivsufsort over bytes: each id plus one, big-endian, behind a zero for each row. The
  order of bytes is then that of ids, and a row's end sorts before everything. Positions inside an
  id are dropped afterwards.
- A part whose header fits is kept, so a build that was killed goes on where it was.
- The chunk is hashed before its first part: an index holds only of the chunk that the manifest
  names.

Alternatives considered:
- Sorting ids instead of bytes: libraries that do so take several times the memory.
- An FM-index: smaller, but the libraries that have one keep it in memory and take bytes or text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.chunk import Tokens, open_chunk, verify_chunk
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.trace.border_files import Borders, border_bytes, open_borders_index
from k2train.data.trace.index_files import (
    PART_TOKENS,
    SUFFIX_DTYPE,
    Part,
    Suffixes,
    array_digest,
    array_path,
    check_chunk_file,
    default_folder,
    fits,
    header_path,
    open_suffixes,
    parts_of,
    read_part_header,
    write_part,
)
from k2train.errors import DataError, UserError
from k2train.retry import stat_retried

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Index:
    """A complete index of a data folder: where it is, the parts of the chunks, and the borders."""

    manifest: Manifest
    folder: Path
    parts: tuple[Part, ...]
    borders: Borders | str
    """Or why there are none."""

    @property
    def tokens(self) -> int:
        """Tokens that it covers."""
        return sum(len(part.rows) for part in self.parts) * self.manifest.sequence_length

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return border_bytes(self.folder) + sum(
            facts.st_size
            for part in self.parts
            for path in (array_path(self.folder, part), header_path(self.folder, part))
            if (facts := stat_retried(path)) is not None
        )


def open_index(
    manifest: Manifest,
    folder: Path | None = None,
    part_tokens: int = PART_TOKENS,
    message: Callable[[str], None] = lambda text: None,
    check: bool = False,
) -> Index:
    """Open the index of all chunks, and build what is missing.

    `message` hears of each chunk that is built. `check` also hashes the arrays that are there.
    Raises DataError for a chunk that is damaged or was changed, UserError without the library.
    """
    folder = folder or default_folder(manifest)
    found: list[Part] = []
    for info in manifest.all_chunks():
        parts = list(parts_of(info, manifest.sequence_length, part_tokens))
        missing = [part for part in parts if not _is_there(manifest, folder, part, check)]
        if missing:
            _build(manifest, folder, info, missing, message)
        found += parts
    borders = open_borders_index(manifest, folder, message, check)
    return Index(manifest, folder, tuple(found), borders)


def has_index(manifest: Manifest, folder: Path | None = None) -> bool:
    """Return whether all parts are there, so that nothing has to be sorted to open the index.

    Raises DataError when a chunk was changed.
    """
    folder = folder or default_folder(manifest)
    return all(
        _is_there(manifest, folder, part, check=False)
        for info in manifest.all_chunks()
        for part in parts_of(info, manifest.sequence_length)
    )


def _is_there(manifest: Manifest, folder: Path, part: Part, check: bool) -> bool:
    """Return whether a part is complete. Raises DataError when its chunk was changed."""
    header = read_part_header(folder, part)
    if header is None or not fits(header, manifest, part):
        return False
    check_chunk_file(manifest, header)
    try:
        suffixes = open_suffixes(folder, part, len(part.rows) * manifest.sequence_length)
    except DataError:
        return False
    return not check or array_digest(suffixes) == header.array_xxh3


def _build(
    manifest: Manifest,
    folder: Path,
    info: ChunkInfo,
    parts: Sequence[Part],
    message: Callable[[str], None],
) -> None:
    sort = _sorter()
    message(f"indexing {info.name}: {info.tokens:,} tokens")
    identity = verify_chunk(manifest, info)
    assert identity is not None, "nothing stops this check"

    try:
        folder.mkdir(parents=True, exist_ok=True)
        chunk = open_chunk(manifest, info)
        for part in parts:
            ids = chunk[part.rows.start : part.rows.stop]
            suffixes = sort_rows(ids, manifest.vocab_size, sort)
            if not chunk.identity().has_content_of(identity.tokens):
                raise DataError(f"{chunk.where}: was changed while it was indexed; start again")
            write_part(folder, manifest, part, identity.tokens, suffixes)
        chunk.close()
    except OSError as error:
        raise UserError(
            f"{folder}: the index cannot be written ({error.strerror}); name another folder with "
            "--folder"
        ) from None


def sort_rows(ids: Tokens, vocab_size: int, sort: Callable[[Bytes], Any]) -> Suffixes:
    """Sort the positions of rows `[n, s]` by what follows them in their row: uint32 [n s]."""
    rows, length = ids.shape
    # Ids count from 1 here: a zero ends a row.
    width = next(bytes_ for bytes_ in (1, 2, 3, 4) if vocab_size < 256**bytes_)
    text = np.zeros((rows, length + 1, width), dtype=np.uint8)
    shifted = ids.astype(np.uint32) + 1
    for byte in range(width):
        text[:, 1:, byte] = (shifted >> 8 * (width - 1 - byte)).astype(np.uint8)
    del shifted

    order = sort(text.reshape(-1))
    del text
    order = order[order % width == 0] // width
    row, column = np.divmod(order, length + 1)
    del order
    kept = column > 0
    return (row[kept].astype(np.int64) * length + column[kept] - 1).astype(SUFFIX_DTYPE)


def _sorter() -> Callable[[Bytes], Any]:
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise UserError(
            "the index is built with pydivsufsort: pip install 'k2train[trace]'"
        ) from None
    sort: Callable[[Bytes], Any] = divsufsort
    return sort
