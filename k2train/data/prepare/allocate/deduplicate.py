"""Deduplication: find documents that repeat an earlier text, in bounded memory.

- Works over all runs of a pass. Texts are compared by the first 64 bits of their sha256. They are
  partitioned into files by the leading bits, and each file is sorted alone.
- Alternatives considered: one table of all texts; it grows with the corpus. Run by run; the first
  of two equal texts is decided by the names of their sources and may be in any run.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from k2train.data.prepare.allocate.plan_file import RunEntry
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.retry import exists_retried, read_retried

PART_DOCUMENTS = 2**20
"""Documents sorted at a time: 24 bytes each, plus as much for the order."""
MAX_PARTS = 1024
RECORD = np.dtype([("text", "<u8"), ("order", "<u8"), ("position", "<u8")])


def flag_duplicates(
    folder: Path,
    work: Path,
    runs: Sequence[RunEntry],
    ranks: Mapping[str, int],
    part_documents: int = PART_DOCUMENTS,
) -> Path:
    """Write a file of uint8 `[documents]` in the order of `runs`: 1 where an earlier text is equal.

    The first of equal texts by (source key, ordinal) is kept. Documents outside the share count
    too, so that shares of two recipes never keep the same text. `ranks` orders the source keys,
    `work` is the folder of the runs; the file is written to `folder`.
    """
    documents = sum(run.documents for run in runs)
    flags = folder / "duplicates"
    with flags.open("wb") as stream:
        stream.truncate(documents)
    # A power of two of parts, each small enough to sort in memory.
    bits = min(max(0, (documents // part_documents).bit_length()), MAX_PARTS.bit_length() - 1)
    parts = [folder / f"texts_{number:04d}" for number in range(2**bits)]
    for path in parts:
        path.unlink(missing_ok=True)
    for run in runs:
        _partition(work, run, ranks, parts, bits)

    with flags.open("r+b") as stream:
        for path in parts:
            if exists_retried(path):
                _flag_part(stream.fileno(), np.frombuffer(read_retried(path), dtype=RECORD))
                path.unlink()

    return flags


def _partition(
    work: Path, entry: RunEntry, ranks: Mapping[str, int], parts: Sequence[Path], bits: int
) -> None:
    """Append the texts of a run to the files of their leading bits."""
    run = Run(work / entry.path)
    records = np.empty(entry.documents, dtype=RECORD)
    rank = np.array([ranks[key] for key in run.source_keys], dtype=np.uint64)
    records["text"] = run.read("texts")
    # Order of documents: rank of the source and ordinal in one integer.
    records["order"] = (rank[run.read("sources")] << np.uint64(32)) | run.read("ordinals")
    records["position"] = np.arange(entry.first, entry.first + entry.documents, dtype=np.uint64)

    if bits == 0:
        order, ends = np.arange(entry.documents), np.array([entry.documents])
    else:
        part = records["text"] >> np.uint64(64 - bits)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=len(parts)))

    records = records[order]
    start = 0
    for path, end in zip(parts, ends.tolist(), strict=True):
        if end > start:
            with path.open("ab") as stream:
                # Not `tofile`, which does not report a full disk.
                stream.write(records[start:end].tobytes())
        start = end


def _flag_part(descriptor: int, records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
    """Sort one file of texts and flag all but the first of equal ones."""
    records = records[np.lexsort((records["order"], records["text"]))]
    duplicates = records["position"][1:][records["text"][1:] == records["text"][:-1]]
    for position in np.sort(duplicates).tolist():
        os.pwrite(descriptor, b"\1", position)
