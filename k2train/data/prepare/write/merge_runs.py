"""Merge of sorted runs: the documents of a pass by ascending (key, source, ordinal), in batches.

- A batch is as many key buckets as hold a few million tokens. It is one slice of each run, read at
  once, and the documents of all slices are sorted together.
- The wanted parts of a pass may be apart. Gaps are read through where that is cheaper than another
  slice of each run.
- The result therefore does not depend on how documents were divided into runs, and memory holds one
  batch only.
- Alternatives considered: a heap over all runs, one document at a time; it costs a read and some
  comparisons in Python per document.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.allocate.plan_file import (
    KEY_BITS,
    MARK_DOCUMENTS,
    Longs,
    PassPlan,
    RunEntry,
)
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.retry import read_retried

MIN_TOKENS, MAX_TOKENS = 2**22, 2**26
RUN_TOKENS = 4096
"""Tokens of a batch for each run, at least: with very many runs, reads must not become tiny."""
BATCH_DOCUMENTS = 2**18
GAP_TOKENS = 2**14
"""Tokens of a gap for each run that are read faster than a slice of each run is begun."""

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive documents `[n]` of a pass; the first begins at token `start` of the pass.

    `sources` are ranks among all sources of the preparation; names are in `names` at `name_starts`;
    `texts` are hashes, where they are read.
    """

    start: int
    tokens: list[Tokens]
    lengths: Longs
    sources: npt.NDArray[np.uint32]
    fim: npt.NDArray[np.uint8]
    names: npt.NDArray[np.uint8]
    name_starts: Longs
    name_lengths: Longs
    texts: npt.NDArray[np.uint64] | None = None

    @cached_property
    def ends(self) -> Longs:
        """Ends of the documents, in tokens of the pass."""
        return self.start + np.cumsum(self.lengths)

    @cached_property
    def starts(self) -> Longs:
        """Starts of the documents, in tokens of the pass."""
        return self.ends - self.lengths

    @property
    def stop(self) -> int:
        """End of the last document, in tokens of the pass."""
        return int(self.ends[-1])


class PassReader:
    """Reads the documents of one pass that have the mask `mask`.

    `ranks` orders the keys of all sources; with `texts` their hashes are read too.
    """

    def __init__(
        self,
        work: Path,
        plan: PassPlan,
        mask: int,
        ranks: Mapping[str, int],
        min_tokens: int,
        texts: bool = False,
    ) -> None:
        self.plan, self.mask, self.texts = plan, mask, texts
        self.runs = [Run(work / entry.path) for entry in plan.runs]
        self.ranks = [
            np.array([ranks[key] for key in run.source_keys], dtype=np.uint32) for run in self.runs
        ]
        self.batch_tokens = max(min_tokens, min(MAX_TOKENS, RUN_TOKENS * len(self.runs)))
        self.marks = np.frombuffer(read_retried(plan.path("marks")), np.uint64)

    def batches(self, parts: Sequence[tuple[int, int]]) -> Iterator[DocumentBatch]:
        """Yield batches of whole documents that cover all ascending parts, tokens `start:stop`.

        They may begin before a part and end after it.
        """
        masks = os.open(self.plan.path("masks"), os.O_RDONLY)
        try:
            for first, end in self._stretches(parts):
                yield from self._read_stretch(masks, self._boundaries(first, end))
        finally:
            os.close(masks)

    def _stretches(self, parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The buckets to read, [first, end), apart by more than a gap."""
        before, gap = self.plan.tokens_before(self.mask), GAP_TOKENS * len(self.runs)
        stretches: list[tuple[int, int]] = []
        for start, stop in parts:
            first, end = self.plan.bucket_range(self.mask, start, stop)
            if stretches and before[first] - before[stretches[-1][1]] <= gap:
                stretches[-1] = stretches[-1][0], max(end, stretches[-1][1])
            else:
                stretches.append((first, end))
        return stretches

    def _read_stretch(self, masks: int, boundaries: list[int]) -> Iterator[DocumentBatch]:
        """Yield the batches between the bucket numbers `boundaries`."""
        # The same boundaries as keys, and as document numbers in each run.
        keys = [boundary << (KEY_BITS - self.plan.bits) for boundary in boundaries]
        cuts = np.array([find_keys(run, keys) for run in self.runs], dtype=np.int64)
        # Where the next batch begins in the tokens of each run, once it is known.
        offsets: list[int | None] = [None] * len(self.runs)

        before = self.plan.tokens_before(self.mask)
        for number, boundary in enumerate(boundaries[:-1]):
            slices = []
            for i in np.flatnonzero(cuts[:, number] < cuts[:, number + 1]).tolist():
                with self.runs[i].opened():
                    documents, offsets[i] = self._slice(
                        i, masks, int(cuts[i, number]), int(cuts[i, number + 1]), offsets[i]
                    )
                if documents is not None:
                    slices.append(documents)

            expected = int(before[boundaries[number + 1]] - before[boundary])
            if not slices and expected == 0:
                # Between two long documents there may be buckets without this mask.
                continue

            batch = _merge(int(before[boundary]), slices)
            merged_tokens = int(batch.lengths.sum())
            assert merged_tokens == expected, (
                f"{self.plan.files}: {merged_tokens} tokens in the runs, {expected} in the plan"
            )
            yield batch

    def _boundaries(self, first: int, end: int) -> list[int]:
        """Bucket numbers between the batches, from `first` to `end`.

        A small rest joins the batch before it: a batch of its own would open every run again.
        """
        tokens, documents = (
            self.plan.tokens_before(self.mask),
            self.plan.documents_before(self.mask),
        )
        boundaries = [first]
        while boundaries[-1] < end:
            current = boundaries[-1]
            if (
                tokens[end] - tokens[current] <= self.batch_tokens + self.batch_tokens // 8
                and documents[end] - documents[current] <= BATCH_DOCUMENTS + BATCH_DOCUMENTS // 8
            ):
                boundaries.append(end)
                break
            # As many buckets as stay below both limits, and at least one.
            by_tokens = np.searchsorted(tokens, tokens[current] + self.batch_tokens, side="right")
            by_documents = np.searchsorted(
                documents, documents[current] + BATCH_DOCUMENTS, side="right"
            )
            boundaries.append(min(end, max(current + 1, int(min(by_tokens, by_documents)) - 1)))

        return boundaries

    def _lengths(self, i: int, start: int, stop: int, offset: int | None) -> tuple[Longs, int]:
        """Lengths of the documents `start:stop` of run `i`, and its tokens before them.

        Without `offset` the latter are counted from the mark before.
        """
        if offset is not None:
            return self.runs[i].read("lengths", start, stop).astype(np.int64), offset
        mark = start // MARK_DOCUMENTS
        lengths = self.runs[i].read("lengths", mark * MARK_DOCUMENTS, stop).astype(np.int64)
        between = start - mark * MARK_DOCUMENTS
        known = int(self.marks[self.plan.runs[i].mark + mark])
        return lengths[between:], known + int(lengths[:between].sum())

    def _slice(
        self, i: int, masks: int, start: int, stop: int, offset: int | None
    ) -> tuple["tuple[list[Tokens], dict[str, Any]] | None", int]:
        """The documents with the mask among `start:stop` of run `i`.

        `offset` is where the tokens of document `start` begin, if known; also returns where those
        of the last one end.
        """
        run, entry = self.runs[i], self.plan.runs[i]
        lengths, offset = self._lengths(i, start, stop, offset)
        ends = offset + np.cumsum(lengths)
        kept = np.flatnonzero(_masks(masks, entry, start, stop) == self.mask)
        if len(kept) == 0:
            return None, int(ends[-1])

        kept_lengths = lengths[kept]
        # The end of the name before is where the first one begins.
        read_ends = run.read("name_ends", max(0, start - 1), stop).astype(np.int64)
        first = int(read_ends[0]) if start else 0
        name_ends = read_ends[min(1, start) :] - first
        name_starts = np.concatenate([np.zeros(1, np.int64), name_ends[:-1]])
        ranks = self.ranks[i][run.read("sources", start, stop)[kept]]

        # The order breaks ties between equal keys: rank of the source, then ordinal.
        columns = {
            "keys": run.read("keys", start, stop)[kept],
            "order": (ranks.astype(np.uint64) << np.uint64(32))
            | run.read("ordinals", start, stop)[kept],
            "lengths": kept_lengths,
            "sources": ranks,
            "fim": run.read("fim", start, stop)[kept],
            "names": run.read("names", first, first + int(name_ends[-1])),
            "name_starts": name_starts[kept],
            "name_lengths": (name_ends - name_starts)[kept],
        }
        if self.texts:
            columns["texts"] = run.read("texts", start, stop)[kept]

        return (
            _documents(run, offset, ends[kept] - kept_lengths, ends[kept], int(ends[-1])),
            columns,
        ), int(ends[-1])


def _masks(descriptor: int, entry: RunEntry, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Masks of the documents `start:stop` of a run."""
    return np.frombuffer(os.pread(descriptor, stop - start, entry.first + start), dtype=np.uint8)


def _documents(run: Run, offset: int, starts: Longs, ends: Longs, stop: int) -> list[Tokens]:
    """Tokens of the documents from `starts` to `ends` of a run, within its tokens `offset:stop`."""
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    if 4 * int((ends - starts).sum()) < stop - offset:
        # Few are wanted, as of held-out documents: reading all would fetch the whole corpus.
        return [run.read("tokens", start, end) for start, end in pairs]
    tokens = run.read("tokens", offset, stop)
    return [tokens[start - offset : end - offset] for start, end in pairs]


def _merge(start: int, slices: list[tuple[list[Tokens], dict[str, Any]]]) -> DocumentBatch:
    """Sort the documents of all slices into one batch."""
    tokens = [document for found, _ in slices for document in found]
    # Names of a slice follow those of the slices before it.
    names_before = 0
    for _, columns in slices:
        columns["name_starts"] += names_before
        names_before += len(columns["names"])

    joined = {
        name: np.concatenate([columns[name] for _, columns in slices]) for name in slices[0][1]
    }
    order = np.lexsort((joined.pop("order"), joined.pop("keys")))
    names = joined.pop("names")

    return DocumentBatch(
        start,
        [tokens[i] for i in order.tolist()],
        names=names,
        **{k: v[order] for k, v in joined.items()},
    )


def find_keys(run: Run, keys: list[int]) -> list[int]:
    """For each of the ascending `keys`, up to 2**64, the number of documents with a smaller key.

    Keys are evenly distributed, so only a window around their expected index is read.
    """
    documents = len(run)
    # Several standard deviations of the index; widened when that was too narrow.
    slack = 8 * isqrt(documents) + 8
    while True:
        first = max(0, (documents * keys[0] >> KEY_BITS) - slack)
        end = min(documents, (documents * keys[-1] >> KEY_BITS) + slack)
        found = run.read("keys", first, end)
        if (first == 0 or int(found[0]) < keys[0]) and (
            end == documents or int(found[-1]) >= keys[-1]
        ):
            break

        slack *= 4

    # A key of 2**64 does not fit uint64; all documents are below it.
    wanted = np.array([key for key in keys if key >> KEY_BITS == 0], dtype=np.uint64)
    cuts: list[int] = (first + np.searchsorted(found, wanted)).tolist()
    return cuts + [documents] * (len(keys) - len(cuts))
