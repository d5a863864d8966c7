"""Data inspection: what a model was trained on, when, and where it came from.

    python tools/inspect_data.py DATA                          token account against the recipe
    python tools/inspect_data.py DATA --chunk 7 [--row 12 | --rows 12-20]
    python tools/inspect_data.py DATA --document NAME [--subset X] [--source S]
    python tools/inspect_data.py --run RUN                     chunks in the order of the run
    python tools/inspect_data.py --run RUN --step S [--row R | --sample I]
    python tools/inspect_data.py --run RUN --checkpoint 3      what a checkpoint has consumed
    python tools/inspect_data.py --run RUN --chunk ... or --document ...     with the steps

- DATA is a manifest or its folder. With --run it is needed only if the data has moved.
- A run's order comes from its ledger and checkpoints. Data that is not what they name is refused:
  an answer about other data would look just as good. So is a step whose ids have another hash than
  the metrics hold.
- Needs no torch.

Exit codes: 0 done; 2 an error in usage, data or run, one line on stderr.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command
from recorded_run import open_run

from k2train.data.document_keys import chunks_of_document
from k2train.data.inspect.account import Facts, account_facts, add_text, find_tokenizer
from k2train.data.inspect.fed_steps import fingerprint_of_rows
from k2train.data.inspect.provenance import (
    check_rows,
    chunk_facts,
    find_chunk,
    find_document,
    pieces_of,
)
from k2train.data.inspect.run_progress import TO_COME
from k2train.data.inspect.run_usage import METRICS, Run
from k2train.data.inspect.text import View, render
from k2train.data.manifest import ChunkInfo, Manifest, read_manifest
from k2train.data.source_record import read_sources
from k2train.errors import EXIT_DONE, DataError, RunError
from k2train.record.metrics import records_of_step


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _options(arguments)
    facts = answer(options)
    if options.json:
        text = json.dumps(facts, ensure_ascii=False)
    else:
        lines = sys.maxsize if options.all else View.lines
        if (
            options.step is not None
            and (options.sample is not None or options.rows is not None)
            and not options.all
        ):
            facts, lines = _requested_first(facts)
        text = "\n".join(
            render(facts, View(sys.stdout.isatty(), options.ids, options.chunks, lines))
        )

    print(text)
    return EXIT_DONE


def _requested_first(facts: Facts) -> tuple[Facts, int]:
    """Move the requested samples of a step to the front.

    Returns also the lines that show only these.
    """
    asked = [sample for sample in facts["samples"] if "text_shown" in sample]
    others = [sample for sample in facts["samples"] if "text_shown" not in sample]
    return {**facts, "samples": asked + others}, sum(len(sample["pieces"]) for sample in asked)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="inspect_data",
        description="Show what a model was trained on, when, and where it came from.",
        epilog="Without a query: the token account of DATA, or the order of RUN.",
    )
    where = "a manifest.json or its folder; with --run: if the data has moved"
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help=where)
    checkpoint = "a checkpoint of the run by number or name"
    alternatives = parser.add_mutually_exclusive_group()

    for name, metavar, kind, text in (
        ("run", "RUN", Path, "the directory of a run, such as runs/demo-stage1"),
        ("chunk", "C", str, "a chunk by number or name, or held_out"),
        ("step", "S", _whole, "a step of the run, from 1"),
        ("checkpoint", "N", str, f"{checkpoint}; with --step, by its record alone"),
        ("document", "NAME", str, "every use of a document, `source:document`, or a source"),
        ("row", "R", _one_row, "a row of the chunk, from 0"),
        ("rows", "A-B", _rows, "rows of the chunk, the last included"),
        ("sample", "I", _whole, "a sample of the step, from 0"),
        ("subset", "X", str, "with --document: in this subset only"),
        ("source", "S", str, "with --document: in this source only"),
        ("tokenizer", "MODEL", Path, "the tokenizer.model, if the folder of the data has none"),
    ):
        group = alternatives if name in ("row", "rows", "sample") else parser
        target = "rows" if name == "row" else name
        group.add_argument(f"--{name}", dest=target, type=kind, metavar=metavar, help=text)

    for name, text in (
        ("ids", "the token ids beside the text"),
        ("chunks", "with the account: a line for every chunk"),
        ("all", "all lines of long tables"),
        ("json", "the answer as one JSON object"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=text)

    options = parser.parse_args(arguments)
    if mistake := _mistake(options):
        parser.error(mistake)
    return options


def _mistake(options: argparse.Namespace) -> str:
    """Describe a wrong combination of options; empty when it is right."""
    if options.data is None and options.run is None:
        return "give DATA (a manifest.json or its folder) or --run RUN"
    given = [name for name in ("chunk", "step", "document") if getattr(options, name) is not None]
    if len(given) > 1:
        return f"--{' and --'.join(given)} are different queries: give one"

    query = given[0] if given else None
    no_run, within = options.run is None, options.subset or options.source
    rules = (
        (no_run and query == "step", "--step needs --run RUN: the order is the run's"),
        (no_run and options.checkpoint is not None, "--checkpoint needs --run RUN"),
        (
            options.checkpoint is not None and query not in (None, "step"),
            "--checkpoint goes with --step or alone",
        ),
        (
            options.rows is not None and query not in ("chunk", "step"),
            "--row needs --chunk C or --step S",
        ),
        (options.sample is not None and query != "step", "--sample needs --step S"),
        (within and query != "document", "--subset and --source need --document NAME"),
    )
    return next((text for wrong, text in rules if wrong), "")


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _one_row(text: str) -> range:
    return range(_whole(text), _whole(text) + 1)


def _rows(text: str) -> range:
    first, _, last = text.partition("-")
    rows = range(_whole(first), _whole(last or first) + 1)
    if not rows:
        raise argparse.ArgumentTypeError(f"must go upwards, as 12-20, not {text!r}")
    return rows


def answer(options: argparse.Namespace) -> Facts:
    """Answer the one query of the options as facts. Raises UserError."""
    run = open_run(options.run, options.checkpoint, options.data) if options.run else None
    manifest = run.manifest if run else read_manifest(options.data)

    if options.document is not None:
        return document_answer(manifest, run, options)

    if options.chunk is not None:
        info = find_chunk(manifest, options.chunk)
        return (
            rows_answer(manifest, run, info, options)
            if options.rows
            else chunk_answer(manifest, run, info)
        )

    if run is None:
        return account_facts(manifest)
    if options.step is not None:
        return step_answer(run, options)
    return run.facts() if run.checkpoint is None else run.checkpoint_facts()


# The queries


def chunk_answer(manifest: Manifest, run: Run | None, info: ChunkInfo) -> Facts:
    """Facts of a whole chunk."""
    facts = chunk_facts(manifest, info)
    return {**facts, "use": run.chunk_use(info)} if run else facts


def rows_answer(
    manifest: Manifest, run: Run | None, info: ChunkInfo, options: argparse.Namespace
) -> Facts:
    """Rows of a chunk with their text."""
    pieces = pieces_of(manifest, info, options.rows)
    tokenizer = find_tokenizer(manifest, options.tokenizer)

    rows: list[Facts] = []
    for row, listed in pieces.items():
        add_text(manifest, info, row, listed, tokenizer)
        rows.append({"chunk": info.name, "row": row, "pieces": listed})
        if run:
            step, state = run.history.use(info.name, row, info == manifest.held_out)
            rows[-1]["use"] = {"step": step, "state": state}

    return {
        "form": "rows",
        "manifest": str(manifest.path),
        "rows": rows,
        "notes": _notes(manifest, tokenizer),
    }


def step_answer(run: Run, options: argparse.Namespace) -> Facts:
    """A step: its chunk and rows, the pieces of every sample, and the text of one."""
    manifest, order, step = run.manifest, run.order, options.step
    position, rows = order.position(step), order.rows_of(step)
    info = manifest.chunk(position.name)

    # Before any text is read: a contradiction ends the answer.
    attempts = _attempts(run, step, info, rows)
    chosen = _chosen(options, info, rows, step)

    pieces = pieces_of(manifest, info, rows)
    tokenizer = find_tokenizer(manifest, options.tokenizer)

    # Counted over the pieces, not taken from a record.
    per_subset: Counter[str] = Counter()
    samples: list[Facts] = []
    for row, listed in pieces.items():
        samples.append({"sample": row - rows.start, "row": row, "pieces": listed})
        for piece in listed:
            per_subset[piece["subset"]] += piece["length"]
        if row in chosen:
            add_text(manifest, info, row, listed, tokenizer)
            samples[-1]["text_shown"] = True

    return {
        "form": "step",
        **run.names(),
        "step": step,
        "of_steps": order.total_steps,
        "state": run.history.state(step),
        "chunk": info.name,
        "chunk_sha256": info.sha256,
        "place": position.order_index,
        "of_chunks": len(order.names),
        "rows": [rows.start, rows.stop],
        "tokens": run.step_tokens,
        "attempts": attempts,
        "tokens_per_subset": dict(sorted(per_subset.items())),
        "samples": samples,
        "notes": _notes(manifest, tokenizer),
    }


def _chosen(options: argparse.Namespace, info: ChunkInfo, rows: range, step: int) -> range:
    """Rows whose text is shown: the first, or the requested ones.

    Raises DataError for a row outside the step.
    """
    if options.rows is None:
        sample = options.sample or 0
        if sample >= len(rows):
            raise DataError(
                f"step {step} has no sample {sample}: it has samples 0 to {len(rows) - 1}"
            )
        return rows[sample : sample + 1]

    asked = check_rows(info, options.rows)
    if asked.start < rows.start or asked.stop > rows.stop:
        raise DataError(
            f"step {step} reads rows {rows.start} to {rows.stop - 1} of {info.name}; ask for "
            "one of them"
        )
    return asked


def _attempts(run: Run, step: int, info: ChunkInfo, rows: range) -> list[Facts]:
    """Rows that each attempt at a step read, from the metrics, and whether they hold its ids.

    Raises RunError when the last attempt differs from the order, or from the chunk.
    """
    path, chunk = run.directory / METRICS, info.name
    recorded = [
        {
            "attempt": record.attempt,
            "chunk": record.chunk,
            "rows": list(record.rows),
            "applied": record.applied,
            "ids": record.ids,
            **({} if record.targets is None else {"targets": record.targets}),
        }
        for record in records_of_step(path, step)
        if record.chunk
    ]

    if recorded and run.checkpoint is None and run.history.state(step) != TO_COME:
        last, ours = recorded[-1], [rows.start, rows.stop]
        if (last["chunk"], last["rows"]) != (chunk, ours):
            raise RunError(
                f"{path} says that step {step} read {last['chunk']} rows {last['rows']}, the order "
                f"of the run gives {chunk} rows {ours}: one of them no longer belongs to this run"
            )
        here, masked = None, "targets" in last
        if last["ids"] is not None:
            here = fingerprint_of_rows(run.folder, run.folder.chunk(chunk), rows, masked)
        if here != last["ids"]:
            raise RunError(
                f"{path} says that step {step} was fed ids with the hash {last['ids']}, rows "
                f"{rows.start}-{rows.stop - 1} of {run.manifest.folder / info.file} have {here}: "
                "the file is not what was trained on; find the copy that was"
            )
    return recorded


def document_answer(manifest: Manifest, run: Run | None, options: argparse.Namespace) -> Facts:
    """Every use of a document."""
    chunks = _chunks_by_key(manifest, options)
    pieces = find_document(manifest, options.document, options.subset, options.source, chunks)
    facts: Facts = {
        "form": "document",
        "manifest": str(manifest.path),
        "document": options.document,
        "of_chunks": len(manifest.all_chunks()),
    }

    if run:
        facts |= run.names()
        facts |= {"done_step": run.history.done_step, "of_steps": run.order.total_steps}
        for piece in pieces:
            piece["step"], piece["state"] = run.history.use(
                piece["chunk"], piece["row"], piece["held_out"]
            )
    return {**facts, "places": pieces}


def _chunks_by_key(manifest: Manifest, options: argparse.Namespace) -> set[str] | None:
    """Chunks that can contain the document if its source is named and so its key known.

    None for all.
    """
    source, name = options.source, options.document
    if source is None:
        # Names may contain colons: a prefix counts as a source only if it is one.
        known = read_sources(manifest).files
        cuts = [i for i, letter in enumerate(name) if letter == ":" and name[:i] in known]
        if len(cuts) != 1:
            return None
        source, name = name[: cuts[0]], name[cuts[0] + 1 :]
    elif name == source:
        # The source itself is meant, with all its documents.
        return None
    else:
        name = name.removeprefix(f"{source}:")

    # Keys depend on the subset, so each one is tried.
    subsets = [options.subset] if options.subset else list(manifest.facts.account or {})
    found = [chunks_of_document(manifest, subset, source, name) for subset in subsets]
    if not found or None in found:
        return None
    return set[str]().union(*(chunks for chunks in found if chunks))


def _notes(manifest: Manifest, tokenizer: object) -> list[str]:

    if tokenizer is not None:
        return []
    named = manifest.tokenizer_sha256
    # Imported data without a tokenizer has words in piece of the hash.
    hashed = re.fullmatch("[0-9a-f]{64}", named)
    what = f"with the hash of the data ({named[:12]})" if hashed else f"of the data ({named})"
    return [
        f"no tokenizer.model {what} is in its folder, so token ids are shown instead of text; give "
        "one as --tokenizer MODEL"
    ]


if __name__ == "__main__":
    sys.exit(main())
