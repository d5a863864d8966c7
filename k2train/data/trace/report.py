"""Text of what a search found: spans with places and exposures, evaluation items as a table."""

from collections.abc import Iterator, Sequence

from k2train.data.inspect.run_progress import SKIPPED, TRAINED
from k2train.data.trace.exposures import NOT_YET, Exposure
from k2train.data.trace.findings import PlaceFinding, RowFinding, SpanFinding
from k2train.data.trace.items import ItemFinding, ItemSummary
from k2train.text import clean, counted, number, table

TEXT_CHARACTERS = 300
"""Characters of a span's text that are shown."""
ITEM_HEADINGS = ("item", "tokens", "longest", "covered", "trained", "chunk", "row", "steps", "text")


def span_lines(index: int, span: SpanFinding, unit: str) -> Iterator[str]:
    """Render one span; `unit` is what its first and last position count."""
    shown = len(span.places)
    places = counted(span.count, "place") + (f", {shown} shown" if shown < span.count else "")
    yield (
        f"span {index}: {counted(span.tokens, 'token')}, {unit} {span.first}-{span.last - 1} of "
        f"the query, {places}"
    )
    if span.text:
        yield f"  {_short(span.text, TEXT_CHARACTERS)}"
    for place in span.places:
        yield from _place_lines(place)


def _place_lines(place: PlaceFinding) -> Iterator[str]:
    for index, row in enumerate(place.rows):
        goes_on = "and on in " if index else ""
        of = f" ({counted(row.tokens, 'token')})" if len(place.rows) > 1 else ""
        yield f"  {goes_on}{row.chunk} row {row.row} from token {row.start}{of}, {place.data}"
        yield from _row_lines(row)


def _row_lines(row: RowFinding) -> Iterator[str]:
    for part in row.documents:
        at = "" if part.offset is None else f", token {part.offset:,} of the document"
        more = "" if part.fim in (None, "none") else f", fill-in-the-middle {clean(part.fim)}"
        more += f", repeat {part.repeat}" if part.repeat else ""
        document = f"{clean(part.source)}:{clean(part.document)}"
        yield f"    {clean(part.subset)}: {document}{at}{more}"
    for one in row.exposures:
        yield f"    {exposure_text(one)}"


def exposure_text(one: Exposure) -> str:
    """Describe one use of a row."""
    if one.step is None:
        return f"{clean(one.run)}: {one.state}"
    if one.attempt is None and one.state == NOT_YET:
        return f"{clean(one.run)}: {NOT_YET}, it belongs to step {one.step:,}"

    parts = [f"{clean(one.run)} step {one.step:,}: {one.state}"]
    if one.attempt is not None:
        parts.append(f"attempt {one.attempt}")
    if one.loss is not None:
        parts.append(f"loss of the step {number(one.loss, 4)}")
    if one.sequence_loss is not None:
        parts.append(f"of the sequence {number(one.sequence_loss, 4)}")
    if one.state in (TRAINED, SKIPPED):
        after = one.checkpoint_after or "no checkpoint yet"
        parts.append(f"between {one.checkpoint_before or 'the start'} and {after}")
    return ", ".join(parts)


def item_lines(items: Sequence[ItemFinding], summary: ItemSummary, most: int) -> Iterator[str]:
    """Render the items that occur, those covered most first, and the summary."""
    occurring = sorted(
        (item for item in items if item.longest), key=lambda i: (-i.covered, -i.longest, i.item)
    )
    if occurring:
        yield from table(ITEM_HEADINGS, [_item_cells(item) for item in occurring[:most]], ("text",))
        if len(occurring) > most:
            yield f"... and {counted(len(occurring) - most, 'item')} more; --places shows them"
        yield ""
    yield from summary_lines(summary)


def summary_lines(summary: ItemSummary) -> Iterator[str]:
    """Render how many items occur in the data, and how many of them were trained on."""
    yield f"{counted(summary.items, 'item')}, spans from {summary.min_tokens} tokens:"
    headings = ("covered", "items", "trained on", "not yet, or never")
    rows = [
        [line.covered, number(line.items), number(line.trained), number(line.items - line.trained)]
        for line in summary.lines
    ]
    yield from table(headings, rows, ("covered",))


def _item_cells(item: ItemFinding) -> list[str]:
    where = None if item.where is None else item.where.rows[0]
    steps = ", ".join(f"{step:,}" for step in item.steps[:4])
    return [
        number(item.item),
        number(item.tokens),
        number(item.longest),
        f"{100 * item.covered:.1f}%",
        "yes" if item.trained else "no",
        "-" if where is None else where.chunk,
        "-" if where is None else number(where.row),
        (steps + (" ..." if len(item.steps) > 4 else "")) or "-",
        _short(item.text, 40),
    ]


def _short(text: str, most: int) -> str:
    line = clean(text)
    return line if len(line) <= most else f"{line[: most - 4]} ..."
