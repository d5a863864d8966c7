"""Text output of data inspection: one rendering function per form of facts.

- Output is derived from the facts only, so text and JSON of one query cannot differ.
- Control tokens are shown in double brackets, bold on a terminal, because raw text may spell one.

Alternatives considered:
- Shortening long names: a name must be usable in the next query.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from k2train.data.inspect.account_text import account_lines
from k2train.text import cells, clean, counted, number, percent, safe, span_text, table

Facts = dict[str, Any]

PIECE = ("position", "tokens", "subset", "offset", "fim", "repeat", "source", "document")
ORDER = ("position", "chunk", "steps", "rows", "dropped", "tokens read", "sha256", "state")
USE = ("repeat", "offset", "length", "chunk", "row", "start", "fim")
ORDER_LINES = 400
"""Chunks of an order that are always shown, about two screens."""
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class View:
    """Display options: bold control tokens, ids beside text, every chunk, lines of a long table."""

    bold: bool = False
    ids: bool = False
    chunks: bool = False
    lines: int = 40


def render(facts: Facts, view: View) -> list[str]:
    """Render the facts of one query as lines."""
    notes = [f"note: {note}" for note in facts.get("notes", ())]
    return [*_FORMS[facts["form"]](facts, view), *(["", *notes] if notes else [])]


def _more(count: int, what: str) -> list[str]:
    return [f"... and {counted(count, what)} more; --all shows them"] if count > 0 else []


# The data folder


def _account(facts: Facts, view: View) -> Iterator[str]:
    yield from account_lines(facts, view.chunks)


def _chunk(facts: Facts, view: View) -> Iterator[str]:
    kind = " (held out: evaluated on, never trained on)" if facts["held_out"] else ""
    yield f"{facts['name']} of {facts['manifest']}{kind}"

    pieces = sum(part["pieces"] for part in facts["parts"])
    yield (
        f"{counted(facts['rows'], 'row')} of {facts['sequence_length']:,} = {facts['tokens']:,} "
        f"tokens, in {counted(pieces, 'piece')} from {counted(facts['sources'], 'source')}"
    )

    if targets := facts.get("targets"):
        learned = percent(targets, facts["tokens"])
        yield f"{counted(targets, 'target')}, {learned} of the tokens are learned"

    if use := facts.get("use"):
        yield (
            f"{use['state']} of {use['run']}"
            if use["place"] is None
            else f"position {use['place'] + 1:,} of {use['of']:,} in the order of {use['run']}: "
            f"steps {span_text(use['first_step'], use['last_step'])}, {use['state']}"
        )

    keys = ("subset", "fim", "repeat", "pieces", "tokens")
    rows = [[*cells(p, *keys), percent(p["tokens"], facts["tokens"])] for p in facts["parts"]]
    yield from ("", *table([*keys, "of all"], rows), "")

    yield f"{facts['file']}  sha256 {facts['sha256']}"
    for key in ("provenance", "borders", "loss_mask"):
        if facts.get(key):
            yield f"{facts[key]}  sha256 {facts[f'{key}_sha256']}"


# Rows and steps


def _rows(facts: Facts, view: View) -> Iterator[str]:
    for i, row in enumerate(facts["rows"]):
        when = ""
        if use := row.get("use"):
            step = "" if use["step"] is None else f"step {use['step']:,}, "
            when = f"  ({step}{use['state']})"

        yield from ([""] if i else [])
        yield f"{row['chunk']} row {row['row']:,}{when}"
        yield from table(PIECE, [_piece_cells(piece) for piece in row["pieces"]])
        yield from _text(row, view)


def _step(facts: Facts, view: View) -> Iterator[str]:
    samples = facts["samples"]
    yield (
        f"step {facts['step']:,} of {facts['of_steps']:,} of {facts['run']}, {facts['state']}: "
        f"{facts['chunk']} (position {facts['place'] + 1:,} of {facts['of_chunks']:,}), "
        f"{_row_span(facts)} ({counted(len(samples), 'sample')}, {facts['tokens']:,} tokens)"
    )

    # A single attempt read what the line above says.
    if len(facts["attempts"]) > 1 or facts["state"] == "to come":
        for attempt in facts["attempts"]:
            read = f"attempt {attempt['attempt']} read {attempt['chunk']}, {_row_span(attempt)}"
            yield read + ("" if attempt["applied"] else "; its update was not applied")

    parts = [f"{clean(name)} {tokens:,}" for name, tokens in facts["tokens_per_subset"].items()]
    yield from (f"tokens: {', '.join(parts)}", "")

    rows: list[list[str]] = []
    shown = 0
    for sample in samples:
        # Whole samples only, and at least one.
        if shown and len(rows) + len(sample["pieces"]) > view.lines:
            break
        shown += 1
        labels = [cells(sample, "sample", "row"), *[["", ""]] * len(sample["pieces"])]
        rows += [[*a, *_piece_cells(b)] for a, b in zip(labels, sample["pieces"], strict=False)]

    yield from table(("sample", "row", *PIECE), rows)
    yield from _more(len(samples) - shown, "sample")

    for sample in samples:
        if "text_shown" in sample:
            yield ""
            yield f"sample {sample['sample']:,}, {facts['chunk']} row {sample['row']:,}"
            yield from _text(sample, view)


def _row_span(facts: Facts) -> str:
    return f"rows {span_text(facts['rows'][0], facts['rows'][1] - 1)}"


def _positions(piece: Facts) -> str:
    return f"{piece['start']}-{piece['start'] + piece['length'] - 1}"


def _piece_cells(piece: Facts) -> list[str]:
    keys = ("length", "subset", "offset", "fim", "repeat", "source", "document")
    return [_positions(piece), *cells(piece, *keys)]


def _text(row: Facts, view: View) -> Iterator[str]:
    for piece in row["pieces"]:
        yield ""
        yield f"--- {_positions(piece)}  {clean(piece['source'])}  {clean(piece['document'])}"
        if piece["text"] is not None:
            yield "".join(
                _learned("".join(_marked(part, view) for part in parts), learned)
                for learned, parts in groupby(piece["text"], lambda part: part.get("learned"))
            )
        if view.ids or piece["text"] is None:
            yield from textwrap.wrap(_ids(piece), 110)


def _learned(text: str, learned: bool | None) -> str:
    """Mark what a loss mask has learned: `«text»`."""
    return f"«{text}»" if learned else text


def _ids(piece: Facts) -> str:
    masks = piece.get("learned") or [None] * len(piece["ids"])
    runs = groupby(zip(piece["ids"], masks, strict=True), itemgetter(1))
    return " ".join(
        _learned(" ".join(str(token) for token, _ in run), learned) for learned, run in runs
    )


def _marked(part: Facts, view: View) -> str:
    text = safe(part["text"])
    if not part["control"]:
        return text
    return f"{_BOLD}⟦{text}⟧{_PLAIN}" if view.bold else f"⟦{text}⟧"


# Documents and runs


def _document(facts: Facts, view: View) -> Iterator[str]:
    pieces, name_of = facts["places"], itemgetter("subset", "source", "document")
    yield (
        f"{clean(facts['document'])}: {counted(len(set(map(name_of, pieces))), 'document')}, "
        f"{counted(len(pieces), 'piece')}, {sum(piece['length'] for piece in pieces):,} tokens, "
        f"in {len({piece['chunk'] for piece in pieces}):,} of "
        f"{counted(facts['of_chunks'], 'chunk')}"
    )

    keys = list(USE)
    if "run" in facts:
        keys += ["step", "state"]
        states = [str(piece["state"]) for piece in pieces]
        counts = [f"{states.count(state):,} {state}" for state in dict.fromkeys(states)]
        yield (
            f"{facts['run']}, {facts['done_step']:,} of {facts['of_steps']:,} steps done: "
            f"pieces {', '.join(counts)}"
        )

    # One table for all documents, so that their columns align.
    shown = pieces[: view.lines]
    head, *lines = table(keys, [cells(piece, *keys) for piece in shown])
    for names, group in groupby(zip(shown, lines, strict=True), lambda pair: name_of(pair[0])):
        yield from ("", "  ".join(map(clean, names)), head, *(line for _, line in group))
    yield from _more(len(pieces) - len(shown), "piece")


def _run(facts: Facts, view: View) -> Iterator[str]:
    yield (
        f"{facts['run']}: {facts['done_step']:,} of {facts['of_steps']:,} steps done, "
        f"{facts['done_tokens']:,} of {facts['of_tokens']:,} tokens read"
    )
    yield f"{_recorded(facts)}; {counted(facts['deferred'], 'chunk')} deferred"
    yield from _order_table(facts, view)


def _checkpoint(facts: Facts, view: View) -> Iterator[str]:
    steps = facts["step_in_chunk"]
    part = f" and {counted(steps, 'step')} of the next" if steps else ""
    yield (
        f"{facts['checkpoint']} of {facts['run']}: step {facts['step']:,}, "
        f"{counted(facts['consumed'], 'whole chunk')}{part}, {facts['consumed_tokens']:,} tokens"
    )
    yield from (_recorded(facts), "")

    if facts["subsets"]:
        whole = facts["whole_tokens"]
        yield "tokens of its whole chunks, dropped rows included"
        yield from table(
            ["subset", "tokens", "of all"],
            [
                [*cells(item, "subset", "tokens"), percent(item["tokens"], whole)]
                for item in facts["subsets"]
            ],
        )
    yield from _order_table(facts, view)


def _recorded(facts: Facts) -> str:
    return f"{facts['manifest']}, sha256 {facts['manifest_sha256'][:12]} as recorded"


def _order_table(facts: Facts, view: View) -> Iterator[str]:
    order = facts["order"]
    shown = order[: max(view.lines, ORDER_LINES)]
    rows = [
        [
            number(item["place"] + 1),
            item["chunk"],
            f"{item['first_step']:,}-{item['last_step']:,}",
            *cells(item, "rows", "dropped_rows", "tokens"),
            item["sha256"][:16],
            item["state"],
        ]
        for item in shown
    ]
    if rows:
        yield from ("", *table(ORDER, rows), *_more(len(order) - len(shown), "chunk"))


_FORMS: dict[str, Callable[[Facts, View], Iterator[str]]] = {
    "account": _account,
    "chunk": _chunk,
    "rows": _rows,
    "step": _step,
    "document": _document,
    "run": _run,
    "checkpoint": _checkpoint,
}
