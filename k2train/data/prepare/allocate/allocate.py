"""Plan task: decide which documents are used and which samples go to which chunk.

- Reads only the indexes of the sorted runs, one run at a time, never tokens. The plan of a corpus
  of any size is one short task.
- The decision per document (left out, training, held out) is one byte in a file. All other results
  are counts at key boundaries, from which a chunk task finds its documents.
- The account lists where every document and token went. It must add up, which is checked before
  anything is written.
- Alternatives considered: listing the documents of each chunk; the list is as long as the corpus
  and adds nothing to the keys.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.document_keys import SCHEME
from k2train.data.prepare.allocate.deduplicate import flag_duplicates
from k2train.data.prepare.allocate.held_out import (
    Longs,
    exact,
    fill_of,
    held_out_boundaries,
    held_out_rows,
    position_histogram,
    samples_of,
)
from k2train.data.prepare.allocate.mixture import allocate, spread
from k2train.data.prepare.allocate.plan_file import (
    HELD_OUT_TEXT,
    KEY_BITS,
    MARK_DOCUMENTS,
    PLAN_NAME,
    TRAINING,
    PassPlan,
    RunEntry,
    SubsetPlan,
)
from k2train.data.prepare.allocate.shortage import check_samples
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.data.prepare.sources.rejected import check_rejected
from k2train.data.prepare.workspace import (
    HELD_OUT,
    Workspace,
    process_suffix,
    read_json,
    write_json,
)
from k2train.files import AtomicFile

BUCKET_DOCUMENTS = 16
"""Documents meant for one bucket of keys; a large subset has more, since buckets are limited."""
MAX_BUCKET_BITS = 18
BLOCK_ROWS = 65536
BLOCK_PIECES = 2**17
"""Rows of a provenance row group: `BLOCK_ROWS`, or fewer to keep a sort below `BLOCK_PIECES`."""


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


def plan_task(workspace: Workspace) -> None:
    """Run the plan task: decide everything the chunk tasks need, and write it, `plan.json` last.

    Raises DataError when the documents do not suffice for a chunk, for the rows asked for, or for
    the held-out rows, and when too many of them are broken.
    """
    check_rejected(workspace)
    folder = workspace.folder / "plan"
    remove_leftovers(folder)
    scratch = folder / f"aside{process_suffix()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _plan(workspace, folder, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _plan(workspace: Workspace, folder: Path, scratch: Path) -> None:
    """Decide and write the plan; `scratch` is for temporary files."""
    recipe = workspace.recipe
    names = list(recipe.subsets)
    runs = runs_of(workspace)
    sources = sorted({source.key for task in workspace.tasks for source in task.sources})
    # Which documents repeat an earlier text, by subset and pass.
    flags = _flags(workspace, scratch, runs, sources)
    histograms: dict[str, Longs] = {}

    # Only a number of held-out rows needs the distribution of tokens.
    if recipe.held_out is not None and recipe.held_out.share is None:
        histograms = {
            name: _histogram(workspace, name, runs[name][0], flags[name, 0]) for name in names
        }

    boundaries = held_out_boundaries(recipe, histograms)
    plans, counts = {}, {}
    for index, name in enumerate(names):
        passes = [
            _plan_pass(
                workspace, f"{index}_{number:03d}", entries, flags[name, number], boundaries[name]
            )
            for number, entries in enumerate(runs[name])
        ]

        # Passes hold the same documents in another order, so one is enough for the counts.
        plans[name] = SubsetPlan(
            name, passes[0][1].tokens(TRAINING), tuple(plan for plan, _ in passes)
        )
        counts[name] = passes[0][1]
        sizes = {(c.tokens(TRAINING), c.tokens(HELD_OUT_TEXT)) for _, c in passes}
        assert len(sizes) == 1, f"{name}: its passes hold different documents: {sizes}"

    # Rows to hold out, and samples to train on, by subset.
    training = {name: counts[name].tokens(TRAINING) for name in names}
    held_out = {name: counts[name].tokens(HELD_OUT_TEXT) for name in names}
    held_rows = (
        held_out_rows(recipe, training, held_out)
        if recipe.held_out is not None
        else dict.fromkeys(names, 0)
    )
    wanted = None if recipe.rows_per_chunk is None else recipe.chunks * recipe.rows_per_chunk
    samples = samples_of(recipe, training)
    used = allocate(samples, wanted, fill_of(recipe))

    account = _account(workspace, counts, used, held_rows)
    check_samples(recipe, account, samples, used)

    # Which samples of each subset go to which chunk.
    chunks = dict(zip(workspace.chunk_names, spread(used, recipe.chunks), strict=False))
    if recipe.held_out is not None:
        chunks[HELD_OUT] = {name: range(rows) for name, rows in held_rows.items()}

    # `files` is what `tasks.is_done` checks.
    files = [
        plan.path(kind)
        for p in plans.values()
        for plan in p.passes
        for kind in ("masks", "marks", "buckets")
    ]

    content = {
        "files": [
            {
                "base": "folder",
                "path": path.relative_to(workspace.folder).as_posix(),
                "bytes": path.stat().st_size,
            }
            for path in files
        ],
        "vocab_size": workspace.tokenizer.vocab_size,
        "sequence_length": recipe.sequence_length,
        "block_rows": _block_rows(recipe.sequence_length, counts, used),
        "account": account,
        "held_out_places": boundaries,
        "document_keys": _document_keys(recipe.seed, recipe.sequence_length, plans, chunks),
        "chunks": {
            name: {s: [r.start, r.stop] for s, r in parts.items()} for name, parts in chunks.items()
        },
        "subsets": [
            {
                "name": p.name,
                "training_tokens": p.training_tokens,
                "passes": [item.entry for item in p.passes],
            }
            for p in plans.values()
        ],
        "sources": sources,
    }

    write_json(folder / PLAN_NAME, content)


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


def _flags(
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
    return np.fromfile(path, dtype=bool, count=entry.documents, offset=entry.first)


def _histogram(
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


def _plan_pass(
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


def _account(
    workspace: Workspace,
    counts: Mapping[str, Counts],
    used: Mapping[str, int],
    held_rows: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """The account: where every document and every token of a subset went.

    `training_tokens` are those of one pass. Laid out `passes` times they are used + unused + tail +
    left by repeat.
    """
    length = workspace.recipe.sequence_length
    read = {name: _read_counts(workspace, name) for name in counts}
    account = {}
    for name, count in counts.items():
        subset = workspace.recipe.subsets[name]
        tokens, held_out = count.tokens(TRAINING), count.tokens(HELD_OUT_TEXT)
        wanted = int(exact(subset.repeat) * tokens)
        # Tokens that do not fill a sample.
        tail = wanted % length
        account[name] = {
            **read[name],
            "training_documents": count.documents(TRAINING),
            "held_out_documents": count.documents(HELD_OUT_TEXT),
            "duplicate_documents": count.duplicates[0],
            "duplicate_tokens": count.duplicates[1],
            "training_tokens": tokens,
            "repeat": subset.repeat,
            "passes": subset.passes,
            "asked_tokens": wanted,
            "used_samples": used[name],
            "used_tokens": used[name] * length,
            "unused_tokens": wanted - tail - used[name] * length,
            "tail_tokens": tail,
            "left_by_repeat_tokens": subset.passes * tokens - wanted,
            "held_out_tokens": held_rows[name] * length,
            "held_out_unused_tokens": held_out - held_rows[name] * length,
        }

        check_account(name, account[name])

    return account


def _read_counts(workspace: Workspace, name: str) -> dict[str, int]:
    """Counts of the encode tasks for a subset; `documents_read` and `rejected` count its files.

    Documents with a repeated id are counted for information only: they are used like all others.
    """
    totals = dict.fromkeys(
        ("documents_read", "rejected", "short", "not_chosen", "outside", "repeated_ids"), 0
    )
    for number in range(len(workspace.tasks)):
        counts = read_json(workspace.encode_record(number))["subsets"].get(name, {})
        for key in totals:
            totals[key] += counts.get(key, 0)
    names = {"documents_read": "documents_read", "repeated_ids": "repeated_id_documents"}
    return {names.get(key, f"{key}_documents"): count for key, count in totals.items()}


def check_account(name: str, item: Mapping[str, Any]) -> None:
    """Raises AssertionError when tokens or documents of a subset are lost or counted twice."""
    kinds = ("short", "not_chosen", "outside", "duplicate", "training", "held_out")
    documents = sum(item[f"{kind}_documents"] for kind in kinds)
    assert item["documents_read"] == documents, f"{name}: documents do not add up: {item}"
    laid_out = sum(item[f"{part}_tokens"] for part in ("used", "unused", "tail", "left_by_repeat"))
    assert item["passes"] * item["training_tokens"] == laid_out, (
        f"{name}: tokens do not add up: {item}"
    )
    parts = ("held_out_unused", "unused", "tail", "left_by_repeat")
    assert all(item[f"{part}_tokens"] >= 0 for part in parts), (
        f"{name}: less than nothing is left: {item}"
    )


def _block_rows(length: int, counts: Mapping[str, Counts], used: Mapping[str, int]) -> int:
    """Rows of a provenance row group: `BLOCK_ROWS`, or fewer when documents are short."""
    rows = sum(used.values())
    # About one piece per row, and one per document.
    pieces = rows
    for name, count in counts.items():
        pieces += used[name] * length * count.documents(TRAINING) // max(1, count.tokens(TRAINING))
    block = BLOCK_ROWS
    while block > 1 and block * pieces > BLOCK_PIECES * rows:
        block //= 2
    return block


def _document_keys(
    seed: int,
    length: int,
    plans: Mapping[str, SubsetPlan],
    chunks: Mapping[str, Mapping[str, range]],
) -> dict[str, Any]:
    """Key buckets of each subset and chunk that its tokens come from: [pass, first, last]."""
    subsets: dict[str, Any] = {}
    for subset, plan in plans.items():
        found = {}
        for name, parts in chunks.items():
            # Held-out rows use the first pass of the held-out stream.
            mask = HELD_OUT_TEXT if name == HELD_OUT else TRAINING
            start, stop = parts[subset].start * length, parts[subset].stop * length
            pieces = (
                ([(0, start, stop)] if stop > start else [])
                if name == HELD_OUT
                else plan.parts(start, stop)
            )
            ranges = [
                (number, *plan.passes[number].bucket_range(mask, a, b)) for number, a, b in pieces
            ]
            found[name] = [[number, first, end - 1] for number, first, end in ranges]

        subsets[subset] = {"bits": [p.bits for p in plan.passes], "chunks": found}

    return {"scheme": SCHEME, "seed": seed, "subsets": subsets}
