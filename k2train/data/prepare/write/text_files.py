"""Files of text hashes: those of each chunk, and `texts.npy` of the folder merged from them.

- A chunk task knows which documents it laid out, and writes their hashes beside its record.
- They are merged range by range of the hashes, so memory holds a few million at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from k2train.data.npy import header_bytes
from k2train.data.prepare.workspace import process_suffix
from k2train.data.text_record import DTYPE, Hashes, TextRecord, distinct
from k2train.files import AtomicFile

RANGE_TEXTS = 2**22
"""Hashes of all chunks that are sorted at a time."""
HEADER_BYTES = 128


def write_texts(path: Path, hashes: Hashes) -> int:
    """Write ascending distinct hashes as `.npy`; returns their number."""
    with AtomicFile(path, process_suffix()) as stream:
        stream.write(_header(len(hashes)))
        stream.write(hashes.astype(DTYPE).tobytes())
    return len(hashes)


def merge_texts(paths: Sequence[Path], target: Path, range_texts: int = RANGE_TEXTS) -> int:
    """Merge files of ascending hashes into one that has each hash once; returns their number."""
    records = [TextRecord(path) for path in paths]
    # Hashes are evenly distributed, so ranges of equal width hold about as many.
    bits = (sum(map(len, records)) // range_texts).bit_length()
    width, count = 2 ** (64 - bits), 0

    with AtomicFile(target, process_suffix()) as stream:
        stream.write(_header(0))
        for low in range(0, 2**64, width):
            found = [record.between(low, low + width) for record in records]
            merged = distinct(np.concatenate(found)) if found else np.zeros(0, DTYPE)
            stream.write(merged.astype(DTYPE).tobytes())
            count += len(merged)
        # The number is known only now.
        stream.seek(0)
        stream.write(_header(count))
    return count


def _header(count: int) -> bytes:
    header = header_bytes((count,), DTYPE)
    assert len(header) == HEADER_BYTES, f"a header of {len(header)} bytes"
    return header
