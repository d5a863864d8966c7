"""Read the runs of a subset, pass by pass: which documents are used, and how much they hold.

- The decision per document (left out, training, held out) is one byte in a file. All other results
  are counts at key boundaries, from which a chunk task finds its documents.
- Only the indexes of the runs are read, one run at a time, never tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k2train.data.prepare.allocate.deduplicate import DUPLICATE, SEEN
from k2train.data.prepare.allocate.held_out import Longs, position_histogram
from k2train.data.prepare.allocate.plan_file import (
    HELD_OUT_TEXT,
    KEY_BITS,
    MARK_DOCUMENTS,
    TRAINING,
    PassPlan,
    RunEntry,
)
from k2train.data.prepare.allocate.text_flags import Flags
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.data.prepare.workspace import Workspace, process_suffix, read_json
from k2train.data.text_record import Hashes, contains, distinct
from k2train.files import AtomicFile

BUCKET_DOCUMENTS = 16
"""Documents meant for one bucket of keys; a large subset has more, since buckets are limited."""
MAX_BUCKET_BITS = 18


@dataclass
class Counts:
    """Documents and tokens of one pass, by decision.

    `buckets` as in the plan's file. The others are [documents, tokens] of what is left out:
    `duplicates` of an earlier text, texts `seen` in earlier data, and `held_out_copies`: documents
    to train on whose text is held out, there or in another subset.
    """

    buckets: Longs
    duplicates: list[int] = field(default_factory=lambda: [0, 0])
    seen: list[int] = field(default_factory=lambda: [0, 0])
    held_out_copies: list[int] = field(default_factory=lambda: [0, 0])

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


def histogram_of(workspace: Workspace, name: str, runs: Iterable[RunEntry], flags: Flags) -> Longs:
    """Tokens of a subset by position, flagged documents excluded."""
    share = workspace.recipe.subsets[name].share
    total = position_histogram(share, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    for entry in runs:
        run = Run(workspace.folder / entry.path)
        lengths = run.read("lengths").astype(np.int64)
        kept = (lengths > 0) & (flags.of(entry) == 0)
        total += position_histogram(share, run.read("places")[kept], lengths[kept])
    return total


def held_out_texts(
    workspace: Workspace,
    runs: Mapping[str, Sequence[Sequence[RunEntry]]],
    flags: Mapping[tuple[str, int], Flags],
    boundaries: Mapping[str, int],
) -> Hashes:
    """Ascending hashes of the held-out texts of all subsets, 8 bytes each.

    Empty where equal texts are on one side anyway: all subsets are split by text, at one boundary.
    """
    recipe, found = workspace.recipe, [np.zeros(0, dtype=np.uint64)]
    by_text = all(subset.split_by == "text" for subset in recipe.subsets.values())
    if recipe.held_out is None or (by_text and len(set(boundaries.values())) == 1):
        return found[0]

    for name, passes in runs.items():
        boundary = np.uint64(boundaries[name])
        for entry in passes[0]:
            run = Run(workspace.folder / entry.path)
            held = (run.read("lengths") > 0) & (run.read("places") >= boundary)
            held &= flags[name, 0].of(entry) == 0
            found.append(run.read("texts")[held].astype(np.uint64))

    return distinct(np.concatenate(found))


def plan_pass(
    workspace: Workspace,
    files: str,
    runs: Sequence[RunEntry],
    flags: Flags,
    boundary: int,
    held_texts: Hashes,
) -> tuple[PassPlan, Counts]:
    """Write the three files of a pass; every position from `boundary` on is held out.

    No document is trained on whose text is among the `held_texts`.
    """
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
            flag, inside = flags.of(entry), lengths > 0
            # Documents outside the share (length 0) and flagged ones are left out.
            mask = np.where(
                run.read("places") >= np.uint64(boundary), HELD_OUT_TEXT, TRAINING
            ).astype(np.uint8)
            mask[(flag != 0) | ~inside] = 0
            copies = (mask == TRAINING) & contains(held_texts, run.read("texts"))
            mask[copies] = 0
            masks.write(mask.tobytes())
            # Tokens before every 256th document, to find one without reading all lengths.
            marks.write(
                (np.cumsum(lengths) - lengths)[::MARK_DOCUMENTS].astype(np.uint64).tobytes()
            )
            _count(counts, run.read("keys"), lengths, mask, bits)
            for total, chosen in (
                (counts.duplicates, flag == DUPLICATE),
                (counts.seen, flag == SEEN),
                (counts.held_out_copies, copies),
            ):
                total[0] += int((chosen & inside).sum())
                total[1] += int(lengths[chosen].sum())

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
