"""Figures of the report: curves over steps as inline SVG, with their numbers in a table beside.

- Each curve is reduced to columns of pixels: a band from the lowest to the highest value, and the
  mean as a line. So the size does not grow with the run.
- Colors are CSS variables of the page, which has a light and a dark set of them.
- The numbers of the columns are embedded, so that the page can show those under the pointer.

Alternatives considered:
- A plotting library: its SVG holds fonts and colors, and does not follow the page into the dark.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from k2train.report.columns import Column, Point, columns
from k2train.report.scale import Scale, range_of, short_number

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 40
COLUMNS = 400
"""Columns of a curve: two pixels each."""
STRIP = 7
"""Height of the strip above the picture that shows how far a spike reaches."""
MANY_DOTS = 80
"""With more of them a curve is a line with small dots."""
TABLE_ROWS = 24
"""Beside a figure about twelve are seen, and the rest by scrolling."""
OUTLIER_SHARE = 0.01
"""Share of the values, at the beginning of a run, that may lie above the picture."""


@dataclass(frozen=True)
class Curve:
    """A named series; `color` is a number from 1 to 8 of the page's palette.

    `dots` draws single values, as of checkpoints, and no band. A `faint` curve is background.
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    dots: bool = False
    faint: bool = False
    run: int = 0
    """0, or 1 of the run to compare with: its steps have other tokens and other hours."""


@dataclass(frozen=True)
class Mark:
    """An event at a step, or from one step to another: `kind` is its class on the page.

    `undone`: the steps on the page are not those in which it happened.
    """

    kind: str
    first: float
    last: float
    text: str
    undone: bool = False


@dataclass(frozen=True)
class Figure:
    """Curves over one axis. `values` formats a value; `log` makes their axis logarithmic."""

    title: str
    unit: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    log: bool = False
    values: Callable[[float], str] = lambda value: f"{value:#.4g}"
    axis: str = "step"
    note: str = ""


def render(figure: Figure) -> str:
    """Return the figure as HTML, "" where it has no value to show."""
    reduced = [(curve, columns(curve.points, COLUMNS)) for curve in figure.curves]
    reduced = [(curve, found) for curve, found in reduced if found]
    if not reduced:
        return ""

    x, y = _scales(figure, reduced)
    body = [*_axes(figure, x, y), *(_mark(mark, x) for mark in figure.marks)]
    for curve, found in reduced:
        drawn = _dots(figure, curve, found, x, y) if curve.dots else _line(curve, found, x, y)
        body += [f'<g data-run="{curve.run}">', *drawn, "</g>"]

    label = escape(f"{figure.title}, {figure.unit}, by {figure.axis}")
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" tabindex="0">'
        + "".join(body)
        + '<line class="cursor" x1="0" x2="0" '
        + f'y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )
    heading = f"<h3>{escape(figure.title)} <small>{escape(figure.unit)}</small></h3>"
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    return (
        f"<figure>{heading}{_legend(figure, reduced)}{svg}"
        f'<output aria-live="polite"></output>{_data(figure, reduced, x)}{note}'
        f"{_table(figure, reduced)}</figure>"
    )


def _scales(
    figure: Figure, reduced: Sequence[tuple[Curve, Sequence[Column]]]
) -> tuple[Scale, Scale]:
    places = [column.x for _, found in reduced for column in found]
    places += [place for mark in figure.marks for place in (mark.first, mark.last)]
    lows = [column.low for _, found in reduced for column in found]
    # The first steps and single spikes would flatten the rest: they are cut off at the top.
    highs = sorted(column.mean for curve, found in reduced if not curve.faint for column in found)
    top = highs[min(len(highs) - 1, int((1 - OUTLIER_SHARE) * len(highs)))] if highs else 1.0
    low, high = range_of([*lows, top], figure.log)
    if not figure.log:
        room = 0.05 * (high - low)
        low, high = (low - room if low != 0 else low), high + room
    left, right = range_of(places)
    return (
        Scale(left, right, LEFT, WIDTH - RIGHT),
        Scale(low, high, HEIGHT - BOTTOM, TOP, figure.log),
    )


def _axes(figure: Figure, x: Scale, y: Scale) -> list[str]:
    body = []
    for tick in y.ticks():
        at = y(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        body.append(f'<text x="{LEFT - 7}" y="{at + 4}" class="end">{short_number(tick)}</text>')
    for tick in x.ticks(8):
        at = x(tick)
        body.append(
            f'<text x="{at}" y="{HEIGHT - BOTTOM + 17}" class="middle tick">'
            f"{short_number(tick)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) // 2
    body.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" class="middle axis">{escape(figure.axis)}</text>'
    )
    return body


def _line(curve: Curve, found: Sequence[Column], x: Scale, y: Scale) -> list[str]:
    style = f'class="c{curve.color}{" faint" if curve.faint else ""}'
    body = []
    for part in _pieces(found):
        points = " ".join(f"{x(column.x)},{y(column.mean)}" for column in part)
        if any(column.high > column.low for column in part):
            top = [f"{x(column.x)},{y(column.high)}" for column in part]
            bottom = [f"{x(column.x)},{y(column.low)}" for column in reversed(part)]
            body.append(f'<polygon {style} band" points="{" ".join(top + bottom)}"/>')
        body.append(f'<polyline {style}" points="{points}"/>')
    return body


def _pieces(found: Sequence[Column]) -> list[list[Column]]:
    """Cut a curve that goes back to an earlier place: what was undone, and done again."""
    pieces: list[list[Column]] = [[found[0]]]
    for before, column in pairwise(found):
        if column.x <= before.x:
            pieces.append([])
        pieces[-1].append(column)
    return pieces


def _dots(figure: Figure, curve: Curve, found: Sequence[Column], x: Scale, y: Scale) -> list[str]:
    points = " ".join(f"{x(column.x)},{y(column.mean)}" for column in found)
    many = len(found) > MANY_DOTS
    radius = 1.2 if many else 3
    body = [f'<polyline class="c{curve.color}{"" if many else " thin"}" points="{points}"/>']
    for column in found:
        said = escape(f"{curve.name}: {figure.values(column.mean)} at {figure.axis} {column.x:g}")
        body.append(
            f'<circle class="c{curve.color}" cx="{x(column.x)}" cy="{y(column.mean)}" '
            f'r="{radius}"><title>{said}</title></circle>'
        )
    return body


def _mark(mark: Mark, x: Scale) -> str:
    """A line at a step, or a band over steps below a strip; of what was undone the strip only."""
    left, right = x(mark.first), x(mark.last)
    wide = max(1.5, right - left)
    # Behind the curve or above it: a strip is read, a band only tells where to look.
    undone = " undone" if mark.undone else ""
    parts = [("strip", TOP - STRIP, STRIP)] if mark.last > mark.first or mark.undone else []
    if not mark.undone:
        parts.append(("band" if mark.last > mark.first else "line", TOP, HEIGHT - BOTTOM - TOP))
    return "".join(
        f'<rect class="mark {shape}{undone} {escape(mark.kind)}" x="{left}" y="{top}" '
        f'width="{wide:.1f}" height="{height}"><title>{escape(mark.text)}</title></rect>'
        for shape, top, height in parts
    )


def _legend(figure: Figure, reduced: Sequence[tuple[Curve, Sequence[Column]]]) -> str:
    parts = [
        f'<li><i class="c{curve.color}{" faint" if curve.faint else ""}"></i>{escape(curve.name)}'
        for curve, _ in reduced
    ]
    kinds = dict.fromkeys(mark.kind for mark in figure.marks)
    parts += [f'<li><i class="mark {escape(kind)}"></i>{escape(kind)}' for kind in kinds]
    return f'<ul class="legend">{"".join(f"{part}</li>" for part in parts)}</ul>'


def _data(figure: Figure, reduced: Sequence[tuple[Curve, Sequence[Column]]], x: Scale) -> str:
    """What the script needs: place and value of each column of each curve, and the axis."""
    content = {
        "axis": figure.axis,
        "range": [x.low, x.high],
        "pixels": [x.start, x.stop],
        "curves": [
            {
                "name": curve.name,
                "run": curve.run,
                "x": [round(column.x) for column in found],
                "y": [figure.values(column.mean) for column in found],
            }
            for curve, found in reduced
        ],
    }
    # A name may hold "</script>".
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _table(figure: Figure, reduced: Sequence[tuple[Curve, Sequence[Column]]]) -> str:
    """A table of each curve at a few places, evenly apart, the last one among them.

    Single values are shown where they are: as many of them, evenly apart, too.
    """
    lines = _thinned(column.x for curve, found in reduced if not curve.dots for column in found)
    dots = _thinned(column.x for curve, found in reduced if curve.dots for column in found)
    shown = sorted({*lines, *dots})
    head = "".join(f"<th>{escape(curve.name)}</th>" for curve, _ in reduced)
    rows = []
    for place in shown:
        cells = "".join(
            f"<td>{_value_at(figure, curve, found, place)}</td>" for curve, found in reduced
        )
        rows.append(f"<tr><th>{place:,.0f}</th>{cells}</tr>")
    marks = "".join(f"<li>{escape(mark.text)}</li>" for mark in figure.marks)
    return (
        f'<details class="numbers" open><summary>Numbers</summary>'
        f'<div class="wide"><table><thead><tr>'
        f"<th>{escape(figure.axis)}</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"</div>{f'<ul>{marks}</ul>' if marks else ''}</details>"
    )


def _thinned(places: Iterable[float]) -> list[float]:
    ordered = sorted(set(places))
    step = max(1, math.ceil(len(ordered) / TABLE_ROWS))
    return sorted({*ordered[::step], *ordered[-1:]})


def _value_at(figure: Figure, curve: Curve, found: Sequence[Column], place: float) -> str:
    """The value of a curve at a place, or of the column before it; "" outside of the curve.

    A single value has no other place.
    """
    before = [column for column in found if column.x <= place]
    if not before or place > found[-1].x:
        return ""
    column = max(before, key=lambda one: one.x)
    if curve.dots and column.x != place:
        return ""
    return escape(figure.values(column.mean))
