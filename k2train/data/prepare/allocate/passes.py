"""Read the runs of a subset, pass by pass: which documents are used, and how much they hold.

- The decision per document (left out, training, held out) is one byte in a file. All other results
  are counts at key boundaries, from which a chunk task finds its documents.
- Only the indexes of the runs are read, one run at a time, never tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.prepare.allocate.deduplicate import flag_duplicates
from k2train.data.prepare.allocate.held_out import Longs, position_histogram
from k2train.data.prepare.allocate.plan_file import (
    HELD_OUT_TEXT,
    KEY_BITS,
    MARK_DOCUMENTS,
    TRAINING,
    PassPlan,
    RunEntry,
)
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.data.prepare.workspace import Workspace, process_suffix, read_json
from k2train.files import AtomicFile
from k2train.retry import read_retried

BUCKET_DOCUMENTS = 16
"""Documents meant for one bucket of keys; a large subset has more, since buckets are limited."""
MAX_BUCKET_BITS = 18


@dataclass
class Counts:
    """Documents and tokens of one pass, by decision.

    `buckets` as in the plan's file; `duplicates` is [documents, tokens].
    """

    buckets: Longs
    duplicates: list[int] = field(default_factory=lambda: [0, 0])

    def tokens(self, mask: int) -> int:
        """Tokens of the documents with this mask."""
        return int(self.buckets[mask - 1].sum())

    def documents(self, mask: int) -> int:
        """Number of documents with this mask."""
        return int(self.buckets[mask + 1].sum())


def runs_of(workspace: Workspace) -> dict[str, list[list[RunEntry]]]:
    """The runs of each subset by pass, in the order of the tasks that wrote them."""
    found: dict[str, list[list[RunEntry]]] = {
        name: [[] for _ in range(subset.passes)]
        for name, subset in workspace.recipe.subsets.items()
    }
    for number in range(len(workspace.tasks)):
        record = read_json(workspace.encode_record(number))
        assert record is not None, f"encode task {number} has left no record"

        for name, counts in record["subsets"].items():
            for entries, written in zip(found[name], counts["passes"], strict=True):
                for run in written:
                    # The masks and marks of all runs of a pass are concatenated.
                    last = entries[-1] if entries else RunEntry("", 0, 0, 0, 0)
                    first = last.first + last.documents
                    mark = last.mark + -(-last.documents // MARK_DOCUMENTS)
                    entries.append(
                        RunEntry(run["path"], run["documents"], run["tokens"], first, mark)
                    )

    return found


def duplicate_flags(
    workspace: Workspace,
    scratch: Path,
    runs: Mapping[str, Sequence[Sequence[RunEntry]]],
    sources: Sequence[str],
) -> dict[tuple[str, int], Path | None]:
    """Write the duplicate flags of each subset and pass; None where duplicates are kept."""
    # The first of equal texts is decided by the order of source keys, then ordinals.
    ranks = {key: rank for rank, key in enumerate(sources)}
    flags: dict[tuple[str, int], Path | None] = {}
    for name, subset in workspace.recipe.subsets.items():
        for number, entries in enumerate(runs[name]):
            flags[name, number] = None
            if subset.drop_duplicates:
                path = flag_duplicates(scratch, workspace.folder, entries, ranks)
                flags[name, number] = path.rename(scratch / f"{len(flags)}_flags")
    return flags


def _flags_of(path: Path | None, entry: RunEntry) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Duplicate flags of the documents of one run."""
    if path is None:
        return np.zeros(entry.documents, dtype=bool)
    return np.frombuffer(read_retried(path, entry.first, entry.documents), dtype=bool)


def histogram_of(
    workspace: Workspace, name: str, runs: Iterable[RunEntry], flags: Path | None
) -> Longs:
    """Tokens of a subset by position, duplicates excluded."""
    share = workspace.recipe.subsets[name].share
    total = position_histogram(share, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    for entry in runs:
        run = Run(workspace.folder / entry.path)
        lengths = run.read("lengths").astype(np.int64)
        kept = (lengths > 0) & ~_flags_of(flags, entry)
        total += position_histogram(share, run.read("places")[kept], lengths[kept])
    return total


def plan_pass(
    workspace: Workspace, files: str, runs: Sequence[RunEntry], flags: Path | None, boundary: int
) -> tuple[PassPlan, Counts]:
    """Write the three files of a pass; every position from `boundary` on is held out."""
    documents = sum(run.documents for run in runs)
    bits = min(MAX_BUCKET_BITS, (documents // BUCKET_DOCUMENTS).bit_length())

    plan = PassPlan(workspace.folder / "plan", files, bits, tuple(runs))
    counts = Counts(np.zeros((4, 2**bits), dtype=np.int64))
    with (
        AtomicFile(plan.path("masks"), process_suffix()) as masks,
        AtomicFile(plan.path("marks"), process_suffix()) as marks,
    ):
        for entry in runs:
            run = Run(workspace.folder / entry.path)
            lengths = run.read("lengths").astype(np.int64)
            duplicate = _flags_of(flags, entry)
            inside = lengths > 0
            # Documents outside the share (length 0) and duplicates are left out.
            mask = np.where(
                run.read("places") >= np.uint64(boundary), HELD_OUT_TEXT, TRAINING
            ).astype(np.uint8)
            mask[duplicate | ~inside] = 0
            masks.write(mask.tobytes())
            # Tokens before every 256th document, to find one without reading all lengths.
            marks.write(
                (np.cumsum(lengths) - lengths)[::MARK_DOCUMENTS].astype(np.uint64).tobytes()
            )
            _count(counts, run.read("keys"), lengths, mask, bits)
            counts.duplicates[0] += int((duplicate & inside).sum())
            counts.duplicates[1] += int(lengths[duplicate].sum())

    # Prefix sums over the buckets.
    before = np.zeros((4, 2**bits + 1), dtype=np.int64)
    np.cumsum(counts.buckets, axis=1, out=before[:, 1:])
    with AtomicFile(plan.path("buckets"), process_suffix()) as stream:
        stream.write(before.tobytes())

    return plan, counts


def _count(counts: Counts, keys: Any, lengths: Longs, mask: Any, bits: int) -> None:
    """Add the documents of a run to the buckets of its pass."""
    # A bucket is given by the leading bits of the key.
    bucket = (
        (keys >> np.uint64(KEY_BITS - bits)).astype(np.int64)
        if bits
        else np.zeros(len(keys), np.int64)
    )
    for kind in (TRAINING, HELD_OUT_TEXT):
        selected = mask == kind
        # `bincount` sums in float64, exact below 2**53; the sums of a run are far smaller.
        tokens = np.bincount(bucket[selected], weights=lengths[selected], minlength=2**bits)
        counts.buckets[kind - 1] += tokens.astype(np.int64)
        counts.buckets[kind + 1] += np.bincount(bucket[selected], minlength=2**bits)
