"""Record of the texts of a data folder (`texts.npy`), and the texts that two folders share.

- A text is named by the first 64 bits of its sha256, as uint64. The file holds each once,
  ascending, of all chunks and the held-out part: 8 bytes a text.
- Ascending hashes are a random order of texts. The beginnings of two files hold the texts of both
  up to some hash. A start compares these: a sample of fixed cost, whatever the size.
- Of a much smaller folder few texts are below that hash. So at least `LOOKUPS` of its texts, or
  all, are searched for in the larger one.
- `tools/verify_data.py --against` compares all texts of any two folders.
- That any two of 10^9 different texts have one hash is a matter of a few percent.

Alternatives considered:
- Comparing files: the same documents in files that were cut anew pass for others.
- A Bloom filter: a fifth of the size, but it can neither be sampled nor merged exactly.
"""

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile
from k2train.data.manifest import Manifest
from k2train.data.npy import check_size, read_header
from k2train.errors import DataError
from k2train.files import sha256_file
from k2train.text import counted

TEXTS_NAME = "texts.npy"
DTYPE = np.dtype("<u8")
SAMPLE = 2**17
"""Texts of each folder that a start reads: 1 MiB."""
LOOKUPS = 2**12
"""Texts of the smaller folder that are looked for at least: some 10,000 reads of a page."""
PAGE_TEXTS = 512
BLOCK = 2**20
"""Texts of both folders that are compared at a time."""

Hashes = npt.NDArray[np.uint64]


class TextRecord:
    """The ascending hashes of a folder's texts, read on request.

    Raises DataError when the file is missing or has another size, and when hashes that are read do
    not ascend.
    """

    def __init__(self, path: Path) -> None:
        self.path, where = path, str(path)
        header = read_header(path, where)
        if header.dtype != DTYPE or header.fortran or len(header.shape) != 1:
            raise DataError(f"{where}: is no record of texts; fetch it again")
        check_size(header, header.offset + header.shape[0] * DTYPE.itemsize, where)
        self._file = ArrayFile(path, header.offset, header.shape, DTYPE, where=where)

    def __len__(self) -> int:
        return len(self._file)

    def read(self, start: int, stop: int) -> Hashes:
        """Hashes number `start` to `stop`."""
        return self._ascending(self._file.read(start, min(stop, len(self))))

    def between(self, low: int, high: int) -> Hashes:
        """Hashes from `low` on, below `high`, which may be 2**64."""
        start, stop = self.count_below(low), self.count_below(high)
        # A search in a file that does not ascend may end before it begins.
        return self._ascending(self._file.read(start, max(start, stop)))

    def count_below(self, bound: int) -> int:
        """Number of hashes below `bound`, which may be 2**64."""
        return len(self) if bound >> 64 else bisect_left(self._file, np.uint64(bound))

    def has(self, text: int) -> bool:
        """Whether a hash is there, by some two or three reads of a page.

        Hashes are evenly distributed, so its place is about known. Every second guess is the
        middle, which ends the search in any file.
        """
        start, stop, low, high = 0, len(self), 0, 2**64
        is_middle = False
        while stop - start > PAGE_TEXTS:
            part = 0.5 if is_middle else (text - low) / max(1, high - low)
            first = start + int(part * (stop - start)) - PAGE_TEXTS // 2
            first = min(max(first, start), stop - PAGE_TEXTS)
            page = self.read(first, first + PAGE_TEXTS)
            if text < int(page[0]):
                stop, high = first, int(page[0])
            elif text > int(page[-1]):
                start, low = first + PAGE_TEXTS, int(page[-1])
            else:
                start, stop = first, first + PAGE_TEXTS
            is_middle = not is_middle
        return text in self.read(start, stop)

    def _ascending(self, hashes: Hashes) -> Hashes:
        if np.any(hashes[1:] <= hashes[:-1]):
            raise DataError(f"{self.path}: is damaged, its hashes do not ascend; fetch it again")
        return hashes


def open_texts(manifest: Manifest) -> TextRecord | None:
    """Open the texts of a data folder; None for a folder without a record.

    Raises DataError when it is damaged.
    """
    recorded = manifest.facts.texts
    if recorded is None:
        return None
    record = TextRecord(manifest.folder / TEXTS_NAME)
    if len(record) != recorded.count:
        raise DataError(
            f"{record.path}: has {counted(len(record), 'text')}, the manifest says "
            f"{recorded.count:,}; fetch it again"
        )
    return record


def check_texts(manifest: Manifest) -> None:
    """Hash the record of a data folder's texts, if it has one, whole.

    Raises DataError when it is not the file that the manifest was written with.
    """
    record, recorded = open_texts(manifest), manifest.facts.texts
    if record is None or recorded is None:
        return
    if sha256_file(record.path) != recorded.sha256:
        raise DataError(
            f"{record.path}: is not the file {manifest.path} was written with; fetch it again"
        )


def contains(hashes: Hashes, texts: "npt.NDArray[np.unsignedinteger[Any]]") -> Any:
    """bool `[n]`: whether each of `texts` is among the ascending `hashes`."""
    if len(hashes) == 0:
        return np.zeros(len(texts), dtype=bool)
    index = np.minimum(np.searchsorted(hashes, texts), len(hashes) - 1)
    return hashes[index] == texts


def distinct(hashes: Hashes) -> Hashes:
    """The hashes in ascending order, each once; sorts in place.

    `numpy.unique` takes many times as long: it hashes integers before it sorts them.
    """
    hashes.sort()
    kept = np.ones(len(hashes), dtype=bool)
    kept[1:] = hashes[1:] != hashes[:-1]
    return hashes[kept]


@dataclass(frozen=True)
class TextOverlap:
    """Of `total` texts of a folder `compared` were looked for in another, `shared` are there."""

    shared: int
    compared: int
    total: int

    @property
    def is_exact(self) -> bool:
        """Whether all texts were compared."""
        return self.compared == self.total

    @property
    def method(self) -> str:
        """What was compared, for a message."""
        if self.is_exact:
            return f"all {counted(self.total, 'text')}"
        return f"a sample of {self.compared:,} of {counted(self.total, 'text')}"

    @property
    def message(self) -> str:
        """What is shared, for a message; an estimate from a sample says so."""
        if self.is_exact:
            return f"{self.shared:,} of its {counted(self.total, 'document')} by text"
        estimate = self.shared * self.total // max(1, self.compared)
        return (
            f"about {estimate:,} of its {counted(self.total, 'document')} by text "
            f"({self.shared:,} of a sample of {self.compared:,})"
        )


def sampled_overlap(
    earlier: TextRecord, later: TextRecord, sample: int = SAMPLE, lookups: int = LOOKUPS
) -> TextOverlap:
    """Compare all texts of two folders up to some hash.

    That is the hash to which `sample` texts of both reach; or a larger one, so that `lookups` texts
    of the smaller folder, or all, are compared.
    """
    small, large = (earlier, later) if len(earlier) < len(later) else (later, earlier)
    texts, head = small.read(0, max(sample, lookups)), large.read(0, sample)
    # Those up to the end of the head are compared with it, those above it are searched for.
    within = len(texts)
    if len(head) < len(large):
        within = min(sample, int(np.searchsorted(texts, head[-1], side="right")))
    texts = texts[: max(within, lookups)]
    shared = int(contains(head, texts[:within]).sum())
    shared += sum(large.has(text) for text in texts[within:].tolist())

    # A smaller folder that was looked for whole says of every text of the larger one whether it is
    # shared.
    compared = len(later)
    if len(texts) < len(small):
        compared = later.count_below(int(texts[-1]) + 1)
    return TextOverlap(shared, compared, len(later))


def exact_overlap(earlier: TextRecord, later: TextRecord, block: int = BLOCK) -> TextOverlap:
    """Compare all texts of two folders, some `block` of both at a time."""
    # Hashes are evenly distributed, so ranges of equal width hold about as many.
    bits = ((len(earlier) + len(later)) // block).bit_length()
    width, shared = 2 ** (64 - bits), 0
    for low in range(0, 2**64, width):
        texts = later.between(low, low + width)
        shared += int(contains(earlier.between(low, low + width), texts).sum())
    return TextOverlap(shared, len(later), len(later))
