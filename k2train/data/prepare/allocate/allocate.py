"""Plan task: decide which documents are used and which samples go to which chunk.

- Reads only the indexes of the sorted runs, one run at a time, never tokens. The plan of a corpus
  of any size is one short task.
- The account lists where every document and token went.
- Alternatives considered: listing the documents of each chunk; the list is as long as the corpus
  and adds nothing to the keys.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.data.document_keys import SCHEME
from k2train.data.prepare.allocate.account import account_of
from k2train.data.prepare.allocate.held_out import (
    Longs,
    fill_of,
    held_out_boundaries,
    held_out_rows,
    samples_of,
)
from k2train.data.prepare.allocate.mixture import Samples, allocate, spread
from k2train.data.prepare.allocate.passes import (
    Counts,
    held_out_texts,
    histogram_of,
    plan_pass,
    runs_of,
)
from k2train.data.prepare.allocate.plan_file import (
    HELD_OUT_TEXT,
    PLAN_NAME,
    TRAINING,
    SubsetPlan,
)
from k2train.data.prepare.allocate.shortage import check_samples
from k2train.data.prepare.allocate.text_flags import seen_texts, text_flags
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.sources.rejected import check_rejected
from k2train.data.prepare.workspace import HELD_OUT, Workspace, process_suffix, write_json
from k2train.data.text_record import TextRecord

BLOCK_ROWS = 65536
BLOCK_PIECES = 2**17
"""Rows of a provenance row group: `BLOCK_ROWS`, or fewer to keep a sort below `BLOCK_PIECES`."""


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
    recipe, length = workspace.recipe, workspace.recipe.sequence_length
    sources = sorted({source.key for task in workspace.tasks for source in task.sources})
    # Hashed here: the plan says which texts it left out, and they must be the ones it read.
    seen = seen_texts(recipe, verify=True)
    boundaries, plans, counts = _choose_documents(workspace, scratch, list(seen.values()))

    held_rows, samples, used = _choose_samples(recipe, counts)
    account = account_of(workspace, counts, used, held_rows)
    check_samples(recipe, account, samples, used)

    # Which samples of each subset go to which chunk.
    chunks = dict(zip(workspace.chunk_names, spread(used, recipe.chunks, length), strict=False))
    if recipe.held_out is not None:
        chunks[HELD_OUT] = {
            name: (range(rows),) if rows else () for name, rows in held_rows.items()
        }

    content = {
        "files": _files(workspace.folder, plans),
        "vocab_size": workspace.tokenizer.vocab_size,
        "sequence_length": recipe.sequence_length,
        "block_rows": _block_rows(recipe.sequence_length, counts, used),
        "seen": list(seen),
        "account": account,
        "held_out_places": boundaries,
        "document_keys": _document_keys(recipe.seed, recipe.sequence_length, plans, chunks),
        "chunks": {
            name: {s: [[r.start, r.stop] for r in ranges] for s, ranges in parts.items()}
            for name, parts in chunks.items()
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


def _choose_documents(
    workspace: Workspace, scratch: Path, seen: Sequence[TextRecord]
) -> tuple[Mapping[str, int], dict[str, SubsetPlan], dict[str, Counts]]:
    """Decide on every document, and write the files of each pass; `seen` texts are left out.

    Returns by subset where the held-out part begins, the plan, and the counts of one pass.
    """
    recipe = workspace.recipe
    names = list(recipe.subsets)
    runs = runs_of(workspace)
    # Which documents repeat an earlier text, by subset and pass.
    flags = text_flags(workspace, scratch, runs, seen)

    # Only a number of held-out rows needs the distribution of tokens.
    histograms: dict[str, Longs] = {}
    if recipe.held_out is not None and recipe.held_out.share is None:
        histograms = {
            name: histogram_of(workspace, name, runs[name][0], flags[name, 0]) for name in names
        }

    boundaries = held_out_boundaries(recipe, histograms)
    held_texts = held_out_texts(workspace, runs, flags, boundaries)
    plans, counts = {}, {}
    for index, name in enumerate(names):
        passes = [
            plan_pass(
                workspace,
                f"{index}_{number:03d}",
                entries,
                flags[name, number],
                boundaries[name],
                held_texts,
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

    return boundaries, plans, counts


def _choose_samples(
    recipe: Recipe, counts: Mapping[str, Counts]
) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]:
    """By subset: rows to hold out, samples there are to train on, and those that are used."""
    training = {name: count.tokens(TRAINING) for name, count in counts.items()}
    held_out = {name: count.tokens(HELD_OUT_TEXT) for name, count in counts.items()}
    # Rows to hold out are in proportion to the text there is, before copies of held-out texts go.
    given = {name: training[name] + count.held_out_copies[1] for name, count in counts.items()}
    held_rows = (
        held_out_rows(recipe, given, held_out)
        if recipe.held_out is not None
        else dict.fromkeys(counts, 0)
    )

    wanted = None if recipe.rows_per_chunk is None else recipe.chunks * recipe.rows_per_chunk
    samples = samples_of(recipe, training)
    return held_rows, samples, allocate(samples, wanted, fill_of(recipe))


def _files(folder: Path, plans: Mapping[str, SubsetPlan]) -> list[dict[str, Any]]:
    """The files of all passes with their sizes: what `tasks.is_done` checks."""
    paths = [
        plan.path(kind)
        for p in plans.values()
        for plan in p.passes
        for kind in ("masks", "marks", "buckets")
    ]
    return [
        {
            "base": "folder",
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
        }
        for path in paths
    ]


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
    chunks: Mapping[str, Mapping[str, Samples]],
) -> dict[str, Any]:
    """Key buckets of each subset and chunk that its tokens come from: [pass, first, last]."""
    subsets: dict[str, Any] = {}
    for subset, plan in plans.items():
        found = {}
        for name, parts in chunks.items():
            # Held-out rows use the first pass of the held-out stream.
            mask = HELD_OUT_TEXT if name == HELD_OUT else TRAINING
            ranges: list[list[int]] = []
            for samples in parts[subset]:
                start, stop = samples.start * length, samples.stop * length
                for number, a, b in (
                    [(0, start, stop)] if name == HELD_OUT else plan.parts(start, stop)
                ):
                    first, end = plan.passes[number].bucket_range(mask, a, b)
                    if ranges and ranges[-1][0] == number and first <= ranges[-1][2] + 1:
                        ranges[-1][2] = end - 1
                    else:
                        ranges.append([number, first, end - 1])
            found[name] = ranges

        subsets[subset] = {"bits": [p.bits for p in plan.passes], "chunks": found}

    return {"scheme": SCHEME, "seed": seed, "subsets": subsets}
