"""Drawing of predicted intervals beside measured times, a row for each, as SVG.

- The upper mark of a row is the prediction, a bar with a line at its middle; the lower one what was
  measured, a dot on a line from quartile to quartile. They differ in shape, so in grey, too.
- The axis begins at 0, so lengths may be compared. Each mark has a tooltip with its numbers.
- It is narrow, with names above the marks: on a phone the text stays readable.
- The picture follows the reader's light or dark setting.

Alternatives considered:
- Predicted over measured as points: neighbouring layouts cover each other and need a legend each.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k2train.plan.draw_lanes import STYLE, round_step, seconds_text

WIDTH, LEFT, RIGHT = 520, 12, 16
TOP, ROW, BOTTOM = 92, 46, 40
TICK_PIXELS = 70
TITLE_CHARACTERS, SOURCE_CHARACTERS, NAME_CHARACTERS = 66, 74, 64
"""Longer texts are cut: nothing may run over the edge."""
LEAST_PIXELS = 1.5
"""Least width of a bar."""

OWN_STYLE = """
.dot { fill: var(--mark); stroke: var(--page); } .line { stroke: var(--mark); stroke-width: 3; }
.middle-line { stroke: var(--ink); stroke-width: 2; } .title { font-weight: 600; }
"""


@dataclass(frozen=True)
class Span:
    """A time in seconds, and two that it lies between."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Row:
    """A name, the error of its prediction as text, the prediction, and what was measured."""

    name: str
    error: str
    predicted: Span
    measured: Span


def intervals_svg(rows: Sequence[Row], title: str, source: str) -> str:
    """Draw the rows from top to bottom as a stand-alone SVG; `source` stands below the title."""
    highest = max((max(row.predicted.high, row.measured.high) for row in rows), default=0.0) or 1.0
    height = TOP + ROW * len(rows) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / highest

    body = [_head(height, title, source), *_axis(highest, scale, height)]
    for index, row in enumerate(rows):
        body += _row(row, TOP + ROW * index, scale)
    return "\n".join([*body, "</svg>", ""])


def _head(height: int, title: str, source: str) -> str:
    measured = LEFT + 190
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" \
width="{WIDTH}" height="{height}" role="img" aria-label="{_cut(title, TITLE_CHARACTERS)}">
<style>{STYLE}{OWN_STYLE}.F {{ fill: var(--F); }}</style>
<rect width="{WIDTH}" height="{height}" style="fill: var(--page)"/>
<text class="title" x="{LEFT}" y="20">{_cut(title, TITLE_CHARACTERS)}</text>
<text class="soft" x="{LEFT}" y="38">{_cut(source, SOURCE_CHARACTERS)}</text>
<rect class="box F" x="{LEFT}" y="50" width="28" height="11"/>
<line class="middle-line" x1="{LEFT + 14}" y1="48" x2="{LEFT + 14}" y2="63"/>
<text x="{LEFT + 36}" y="60">predicted, nine of ten</text>
<line class="line" x1="{measured}" y1="56" x2="{measured + 28}" y2="56"/>
<circle class="dot" cx="{measured + 14}" cy="56" r="5"/>
<text x="{measured + 36}" y="60">measured, median and quartiles</text>"""


def _cut(text: str, most: int) -> str:
    return html.escape(text if len(text) <= most else text[: most - 3] + "...")


def _axis(highest: float, scale: float, height: int) -> Iterator[str]:
    """Lines at round times, with their seconds below."""
    step, tick = round_step(TICK_PIXELS / scale), 0
    while (at := tick * step) <= highest:
        x = LEFT + at * scale
        bottom = height - BOTTOM + 4
        yield f'<line class="grid" x1="{x:.1f}" y1="{TOP - 14}" x2="{x:.1f}" y2="{bottom}"/>'
        # Text in the middle of 0 would run over the edge.
        kind = "soft middle" if tick else "soft"
        label = seconds_text(at, step)
        yield f'<text class="{kind}" x="{x:.1f}" y="{bottom + 15}">{label}</text>'
        tick += 1
    what = "time of a step; at the right the error of the prediction"
    yield f'<text class="soft end" x="{WIDTH - RIGHT}" y="{height - 6}">{what}</text>'


def _row(row: Row, top: int, scale: float) -> Iterator[str]:
    right = WIDTH - RIGHT
    yield f'<text x="{LEFT}" y="{top}">{_cut(row.name, NAME_CHARACTERS)}</text>'
    yield f'<text class="soft end" x="{right}" y="{top}">{html.escape(row.error)}</text>'

    low, middle, high = _pixels(row.predicted, scale)
    width = max(high - low, LEAST_PIXELS)
    yield (
        f'<rect class="box F" x="{low:.1f}" y="{top + 5}" width="{width:.1f}" height="11">'
        f"{_tooltip('predicted', row.predicted)}</rect>"
    )
    yield (
        f'<line class="middle-line" x1="{middle:.1f}" y1="{top + 3}" x2="{middle:.1f}" '
        f'y2="{top + 18}"/>'
    )
    low, middle, high = _pixels(row.measured, scale)
    tooltip = _tooltip("measured", row.measured)
    yield (
        f'<line class="line" x1="{low:.1f}" y1="{top + 23}" x2="{high:.1f}" y2="{top + 23}">'
        f"{tooltip}</line>"
    )
    yield f'<circle class="dot" cx="{middle:.1f}" cy="{top + 23}" r="5">{tooltip}</circle>'


def _pixels(one: Span, scale: float) -> tuple[float, float, float]:
    return LEFT + one.low * scale, LEFT + one.middle * scale, LEFT + one.high * scale


def _tooltip(what: str, one: Span) -> str:
    return f"<title>{what}: {one.middle:.4g} s, {one.low:.4g} to {one.high:.4g} s</title>"
