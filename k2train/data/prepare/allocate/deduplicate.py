"""Deduplication over all subsets: find documents that repeat an earlier text, in bounded memory.

- Works over all runs of a pass. Texts are compared by the first 64 bits of their sha256. They are
  partitioned into files by the leading bits, and each file is sorted alone.
- The first of equal texts is kept: that of the subset named first in the recipe, there of the
  first file by name, there the first in the file.
- One document that several subsets read is no duplicate of itself: they take it on purpose.
- Texts of earlier data folders (`seen`) come before all others.
- Alternatives considered: one table of all texts; it grows with the corpus. Run by run, or subset
  by subset; equal texts may be anywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.allocate.plan_file import RunEntry
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.data.text_record import Hashes, TextRecord, contains
from k2train.retry import exists_retried, read_retried

PART_DOCUMENTS = 2**20
"""Documents sorted at a time: 25 bytes each, plus as much for the order."""
MAX_PARTS = 1024
HELD_RECORDS = 2**20
"""Records of all parts that are held until they are appended to the parts' files."""
RANGE_DOCUMENTS = 2**23
"""Flags that are written at a time: a byte each, and 8 bytes for each that is set."""
RECORD = np.dtype([("text", "<u8"), ("order", "<u8"), ("position", "<u8"), ("drops", "u1")])
DUPLICATE, SEEN = 1, 2
"""Flags of a document: it repeats an earlier text, or a text of an earlier data folder."""

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class TextRuns:
    """Runs of a subset in one pass; `first` is the position of its first document in the flags.

    `drops` is its `drop_duplicates`; without it only `seen` texts are flagged.
    """

    runs: Sequence[RunEntry]
    first: int
    drops: bool


def flag_texts(
    folder: Path,
    work: Path,
    subsets: Sequence[TextRuns],
    ranks: Mapping[str, int],
    seen: Sequence[TextRecord] = (),
    part_documents: int = PART_DOCUMENTS,
) -> Path:
    """Write a file of uint8 `[documents]` in the order of the runs: 0, DUPLICATE or SEEN.

    The first of equal texts by (rank of the source, ordinal) is kept. Documents outside the share
    count too, so that shares of two recipes never keep the same text. `ranks` orders the source
    keys, `work` is the folder of the runs, `seen` are the texts of earlier folders; the file is
    written to `folder`.
    """
    documents = sum(run.documents for item in subsets for run in item.runs)
    # A power of two of parts, each small enough to sort in memory; so are the seen texts in it.
    most = max(documents, *map(len, seen), 0)
    bits = min((most // part_documents).bit_length(), MAX_PARTS.bit_length() - 1)
    parts = _Parts(folder, bits)
    for item in subsets:
        for run in item.runs:
            parts.add(_records_of(work, run, item, ranks))
    parts.flush()

    flags = _FlagFile(folder, documents)
    for number, path in enumerate(parts.paths):
        if exists_retried(path):
            records = np.frombuffer(read_retried(path), dtype=RECORD)
            width = 2 ** (64 - bits)
            # One folder's texts at a time.
            known = (texts.between(number * width, (number + 1) * width) for texts in seen)
            _flag_part(flags, records, known)
            path.unlink()

    return flags.write()


def _records_of(work: Path, entry: RunEntry, item: TextRuns, ranks: Mapping[str, int]) -> Records:
    """A record for each document of a run."""
    run = Run(work / entry.path)
    records = np.empty(entry.documents, dtype=RECORD)
    rank = np.array([ranks[key] for key in run.source_keys], dtype=np.uint64)
    records["text"] = run.read("texts")
    # Order of documents: rank of the source and ordinal in one integer.
    records["order"] = (rank[run.read("sources")] << np.uint64(32)) | run.read("ordinals")
    first = item.first + entry.first
    records["position"] = np.arange(first, first + entry.documents, dtype=np.uint64)
    records["drops"] = item.drops
    return records


class _Parts:
    """Files of records by the leading bits of their texts.

    Records are held until there are many: small runs would otherwise append a few bytes to each of
    a thousand files.
    """

    def __init__(self, folder: Path, bits: int) -> None:
        self.bits = bits
        self.paths = [folder / f"texts_{number:04d}" for number in range(2**bits)]
        self._held: list[Records] = []
        self._count = 0
        for path in self.paths:
            path.unlink(missing_ok=True)

    def add(self, records: Records) -> None:
        """Add the records of a run."""
        self._held.append(records)
        self._count += len(records)
        if self._count >= HELD_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Append all records held to the files of their leading bits."""
        if not self._held:
            return
        records = np.concatenate(self._held)
        self._held, self._count = [], 0

        if self.bits == 0:
            ends = np.array([len(records)])
        else:
            part = records["text"] >> np.uint64(64 - self.bits)
            records = records[np.argsort(part, kind="stable")]
            ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=len(self.paths)))

        start = 0
        for path, end in zip(self.paths, ends.tolist(), strict=True):
            if end > start:
                with path.open("ab") as stream:
                    # Not `tofile`, which does not report a full disk.
                    stream.write(records[start:end].tobytes())
            start = end


class _FlagFile:
    """The file of flags, uint8 `[documents]`; written range by range of positions.

    Equal texts lie anywhere in it. So the flags are held until there are many, and are appended to
    files by their positions, each of which becomes a range of the flags at the end.
    """

    def __init__(
        self,
        folder: Path,
        documents: int,
        range_documents: int = RANGE_DOCUMENTS,
        held: int = HELD_RECORDS,
    ) -> None:
        self.path, self.documents = folder / "flags", documents
        self._range, self._most = range_documents, held
        self._starts = range(0, documents, range_documents)
        self._paths = [folder / f"flags_{number:04d}" for number in range(len(self._starts))]
        self._held: list[npt.NDArray[np.uint64]] = []
        self._count = 0
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, positions: "npt.NDArray[np.uint64]", flag: int) -> None:
        """Flag the documents at `positions`, each once at most."""
        # Position and flag in one integer: flags have two bits.
        self._held.append((positions << np.uint64(2)) | np.uint64(flag))
        self._count += len(positions)
        if self._count >= self._most:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        found = np.sort(np.concatenate(self._held))
        self._held, self._count = [], 0
        bounds = np.array([*self._starts, self.documents], dtype=np.uint64) << np.uint64(2)
        ends = np.searchsorted(found, bounds).tolist()
        for path, start, end in zip(self._paths, ends, ends[1:], strict=False):
            if end > start:
                with path.open("ab") as stream:
                    stream.write(found[start:end].tobytes())

    def write(self) -> Path:
        """Write the file of all flags; returns its path."""
        self._flush()
        with self.path.open("wb") as stream:
            for path, start in zip(self._paths, self._starts, strict=True):
                flags = np.zeros(min(self._range, self.documents - start), dtype=np.uint8)
                if exists_retried(path):
                    found = np.frombuffer(read_retried(path), dtype=np.uint64)
                    places = (found >> np.uint64(2)) - np.uint64(start)
                    flags[places.astype(np.int64)] = found & np.uint64(3)
                    path.unlink()
                stream.write(flags.tobytes())
        return self.path


def _flag_part(flags: _FlagFile, records: Records, seen: Iterable[Hashes]) -> None:
    """Sort one file of texts and flag the seen ones, and all but the first of equal ones."""
    records = records[np.lexsort((records["order"], records["text"]))]
    known = np.zeros(len(records), dtype=bool)
    for hashes in seen:
        known |= contains(hashes, records["text"])
    flags.add(records["position"][known], SEEN)

    # Only subsets that drop duplicates have first and later ones.
    records = records[~known & (records["drops"] != 0)]
    begins = np.ones(len(records), dtype=bool)
    begins[1:] = records["text"][1:] != records["text"][:-1]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(records)), 0))
    # The same order as the first: the very same document, in another subset.
    later = records["order"] != records["order"][first]
    flags.add(records["position"][later], DUPLICATE)
