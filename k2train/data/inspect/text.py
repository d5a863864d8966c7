"""Text output of data inspection: one rendering function per form of facts.

- Output is derived from the facts only, so text and JSON of one query cannot differ.
- Control tokens are shown in double brackets, bold on a terminal, because raw text may spell one.

Alternatives considered:
- Shortening long names: a name must be usable in the next query.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k2train.data.inspect.account_text import account_lines
from k2train.text import clean, counted, number, percent, safe, span_text, table

Facts = Mapping[str, Any]

PIECE = ("position", "tokens", "subset", "offset", "fim", "repeat", "source", "document")
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

    lines = list(_FORMS[facts["form"]](facts, view))
    return [
        *lines,
        *(["", *(f"note: {note}" for note in facts["notes"])] if facts.get("notes") else []),
    ]


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

    if "use" in facts:
        yield _use_text(facts["use"])
    yield ""

    rows = [
        [
            clean(part["subset"]),
            clean(part["fim"]),
            number(part["repeat"]),
            number(part["pieces"]),
            number(part["tokens"]),
            percent(part["tokens"], facts["tokens"]),
        ]
        for part in facts["parts"]
    ]
    yield from table(["subset", "fim", "repeat", "pieces", "tokens", "of all"], rows)
    yield ""

    files = [
        (facts[key], facts[f"{key}_sha256"]) for key in ("provenance", "borders") if facts.get(key)
    ]
    for file, digest in [(facts["file"], facts["sha256"]), *files]:
        yield f"{file}  sha256 {digest}"


def _use_text(use: Facts) -> str:
    return (
        f"position {use['place'] + 1:,} of {use['of']:,} in the order of {use['run']}: steps "
        f"{span_text(use['first_step'], use['last_step'])}, {use['state']}"
        if use["place"] is not None
        else f"{use['state']} of {use['run']}"
    )


# Rows and steps


def _rows(facts: Facts, view: View) -> Iterator[str]:
    for i, row in enumerate(facts["rows"]):
        yield from ([""] if i else [])

        use = row.get("use")
        when = (
            ""
            if not use
            else "  "
            f"({'' if use['step'] is None else 'step ' + number(use['step']) + ', '}{use['state']})"
        )

        yield f"{row['chunk']} row {row['row']:,}{when}"
        yield from table(PIECE, [_piece_cells(piece) for piece in row["pieces"]])
        yield from _text(row, view)


def _step(facts: Facts, view: View) -> Iterator[str]:
    samples = facts["samples"]

    yield (
        f"step {facts['step']:,} of {facts['of_steps']:,} of {facts['run']}, {facts['state']}: "
        f"{facts['chunk']} (position {facts['place'] + 1:,} of {facts['of_chunks']:,}), rows "
        f"{span_text(facts['rows'][0], facts['rows'][1] - 1)} ({counted(len(samples), 'sample')}, "
        f"{facts['tokens']:,} tokens)"
    )

    # A single attempt read what the line above says.
    plain = len(facts["attempts"]) < 2 and facts["state"] != "to come"
    for attempt in facts["attempts"] if not plain else ():
        done = "" if attempt["applied"] else "; its update was not applied"
        yield (
            f"attempt {attempt['attempt']} read {attempt['chunk']}, rows "
            f"{span_text(attempt['rows'][0], attempt['rows'][1] - 1)}{done}"
        )

    parts = [f"{clean(name)} {tokens:,}" for name, tokens in facts["tokens_per_subset"].items()]
    yield f"tokens: {', '.join(parts)}"
    yield ""

    rows: list[list[str]] = []
    shown = 0
    for sample in samples:
        # Whole samples only, and at least one.
        if shown and len(rows) + len(sample["pieces"]) > view.lines:
            break
        shown += 1
        for i, piece in enumerate(sample["pieces"]):
            label = [number(sample["sample"]), number(sample["row"])] if i == 0 else ["", ""]
            rows.append([*label, *_piece_cells(piece)])

    yield from table(("sample", "row", *PIECE), rows)
    if shown < len(samples):
        yield f"... and {counted(len(samples) - shown, 'sample')} more; --all shows them"

    for sample in samples:
        if "text_shown" in sample:
            yield ""
            yield f"sample {sample['sample']:,}, {facts['chunk']} row {sample['row']:,}"
            yield from _text(sample, view)


def _piece_cells(piece: Facts) -> list[str]:
    last = piece["start"] + piece["length"] - 1
    return [
        f"{piece['start']}-{last}",
        number(piece["length"]),
        clean(piece["subset"]),
        number(piece["offset"]),
        clean(piece["fim"]),
        number(piece["repeat"]),
        clean(piece["source"]),
        clean(piece["document"]),
    ]


def _text(row: Facts, view: View) -> Iterator[str]:
    for piece in row["pieces"]:
        last = piece["start"] + piece["length"] - 1
        yield ""
        yield f"--- {piece['start']}-{last}  {clean(piece['source'])}  {clean(piece['document'])}"
        if piece["text"] is not None:
            yield "".join(_marked(part, view) for part in piece["text"])
        if view.ids or piece["text"] is None:
            yield from textwrap.wrap(" ".join(map(str, piece["ids"])), 110)


def _marked(part: Facts, view: View) -> str:
    text = safe(part["text"])
    if not part["control"]:
        return text
    return f"{_BOLD}⟦{text}⟧{_PLAIN}" if view.bold else f"⟦{text}⟧"


# Documents and runs


def _document(facts: Facts, view: View) -> Iterator[str]:
    pieces = facts["places"]
    documents = {(piece["subset"], piece["source"], piece["document"]) for piece in pieces}
    chunks = {piece["chunk"] for piece in pieces}
    tokens = sum(piece["length"] for piece in pieces)
    yield (
        f"{clean(facts['document'])}: {counted(len(documents), 'document')}, "
        f"{counted(len(pieces), 'piece')}, {tokens:,} tokens, in {len(chunks):,} of "
        f"{counted(facts['of_chunks'], 'chunk')}"
    )

    if "done_step" in facts:
        states = [str(piece["state"]) for piece in pieces]
        counts = [f"{states.count(state):,} {state}" for state in dict.fromkeys(states)]
        yield (
            f"{facts['run']}, {facts['done_step']:,} of {facts['of_steps']:,} steps done: "
            f"pieces {', '.join(counts)}"
        )

    most, before = view.lines, None
    heads = [
        "repeat",
        "offset",
        "length",
        "chunk",
        "row",
        "start",
        "fim",
        *(["step", "state"] if "run" in facts else []),
    ]

    groups: list[tuple[Any, list[list[str]]]] = []
    for piece in pieces[:most]:
        key = (piece["subset"], piece["source"], piece["document"])
        if key != before:
            groups.append((key, []))
            before = key
        cells = [number(piece[name]) for name in ("repeat", "offset", "length")]
        cells += [piece["chunk"], number(piece["row"]), number(piece["start"]), clean(piece["fim"])]
        groups[-1][1].append(
            cells + ([number(piece["step"]), piece["state"]] if "run" in facts else [])
        )

    # One table for all groups, so that their columns align.
    lines = iter(table(heads, [cells for _, rows in groups for cells in rows]))
    head = next(lines)

    for (subset, source, document), rows in groups:
        yield ""
        yield f"{clean(subset)}  {clean(source)}  {clean(document)}"
        yield head
        yield from (next(lines) for _ in rows)

    if len(pieces) > most:
        yield f"... and {counted(len(pieces) - most, 'piece')} more; --all shows them"


def _run(facts: Facts, view: View) -> Iterator[str]:
    yield (
        f"{facts['run']}: {facts['done_step']:,} of {facts['of_steps']:,} steps done, "
        f"{facts['done_tokens']:,} of {facts['of_tokens']:,} tokens read"
    )
    yield (
        f"{facts['manifest']}, sha256 {facts['manifest_sha256'][:12]} as recorded; "
        f"{counted(facts['deferred'], 'chunk')} deferred"
    )
    yield from _order_table(facts, view)


def _checkpoint(facts: Facts, view: View) -> Iterator[str]:
    yield (
        f"{facts['checkpoint']} of {facts['run']}: step {facts['step']:,}, "
        f"{counted(facts['consumed'], 'whole chunk')}"
        + (
            f" and {counted(facts['step_in_chunk'], 'step')} of the next"
            if facts["step_in_chunk"]
            else ""
        )
        + f", {facts['consumed_tokens']:,} tokens"
    )
    yield f"{facts['manifest']}, sha256 {facts['manifest_sha256'][:12]} as recorded"

    yield ""

    rows = [
        [
            clean(item["subset"]),
            number(item["tokens"]),
            percent(item["tokens"], facts["whole_tokens"]),
        ]
        for item in facts["subsets"]
    ]
    if rows:
        yield "tokens of its whole chunks, dropped rows included"
        yield from table(["subset", "tokens", "of all"], rows)
    yield from _order_table(facts, view)


def _order_table(facts: Facts, view: View) -> Iterator[str]:
    order = facts["order"]
    if not order:
        return
    # Up to 400 chunks, about two screens, are always shown whole.
    most = max(view.lines, 400)

    rows = [
        [
            number(item["place"] + 1),
            item["chunk"],
            f"{item['first_step']:,}-{item['last_step']:,}",
            number(item["rows"]),
            number(item["dropped_rows"]),
            number(item["tokens"]),
            item["sha256"][:16],
            item["state"],
        ]
        for item in order[:most]
    ]
    yield ""
    yield from table(
        ["position", "chunk", "steps", "rows", "dropped", "tokens read", "sha256", "state"], rows
    )
    if len(order) > most:
        yield f"... and {counted(len(order) - most, 'chunk')} more; --all shows them"


_FORMS: dict[str, Callable[[Facts, View], Iterator[str]]] = {
    "account": _account,
    "chunk": _chunk,
    "rows": _rows,
    "step": _step,
    "document": _document,
    "run": _run,
    "checkpoint": _checkpoint,
}
