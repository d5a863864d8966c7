"""A series with its events as a stand-alone SVG.

- Each column of pixels shows the lowest and the highest loss of its steps, so that a spike of one
  step among a million is seen.
- Every attempt has its own line. A band in the color of its kind reaches from the onset of an event
  to its end.
- Needs no plotting library.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape

from k2train.report.scale import ticks
from spike_search.search import Found
from spike_search.series import Attempt, Series

WIDTH, HEIGHT = 1000, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 44
COLORS = {
    "benign": "#238b45",
    "malignant": "#cb181d",
    "level": "#6a51a3",
    "drift": "#d9802f",
    "restart": "#0868ac",
    "nonfinite": "#111111",
}
LINES = ("#2171b5", "#8c6d31", "#637939", "#843c39", "#7b4173")
STEEPEST_SHARE = 0.01
"""Share of the steps, at the begin of a series, that may lie above the picture."""


def svg(series: Series, found: Sequence[Found]) -> str:
    """Draw the loss of every attempt, and the events over it."""
    first = min(attempt.first for attempt in series.attempts)
    last = max(attempt.last for attempt in series.attempts)
    frame = _Frame(first, max(last, first + 1), *_range(series))

    body = [*_axes(frame)]
    body += [line for event in found for line in _band(frame, event, last)]
    for index, attempt in enumerate(series.attempts):
        color = LINES[index % len(LINES)]
        for points in _pieces(frame, attempt):
            body.append(f'<polyline points="{points}" style="stroke: {color}"/>')
    body += [line for event in found for line in _mark(frame, event)]
    body += _legend(found)

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size}>
<style>text {{ font: 12px sans-serif; fill: #111; }} polyline {{ fill: none; stroke-width: 1.2; }}
.grid {{ stroke: #ddd; }}</style>
<rect width="{WIDTH}" height="{HEIGHT}" style="fill: white"/>
""" + "\n".join([*body, "</svg>", ""])


class _Frame:
    """Where steps and losses are in the picture."""

    def __init__(self, first: int, last: int, low: float, high: float) -> None:
        self.first, self.last = first, last
        self.losses, self.steps = ticks(low, high), ticks(float(first), float(last))
        self.low, self.high = min(self.losses[0], low), max(self.losses[-1], high)

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, loss: float) -> float:
        share = (min(loss, self.high) - self.low) / ((self.high - self.low) or 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _range(series: Series) -> tuple[float, float]:
    """Lowest and highest loss to show, without the steep begin of training."""
    steps = sum(len(attempt.rows) for attempt in series.attempts)
    begin = int(STEEPEST_SHARE * steps) if steps > 1000 else 0
    shown = [
        row.loss
        for index, attempt in enumerate(series.attempts)
        for row in (attempt.rows[begin:] if index == 0 else attempt.rows)
        if math.isfinite(row.loss)
    ]
    return (min(shown), max(shown)) if shown else (0.0, 1.0)


def _axes(frame: _Frame) -> Iterator[str]:
    for tick in frame.losses:
        y = frame.y(tick)
        yield f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
    for tick in frame.steps:
        if frame.first <= tick <= frame.last:
            yield (
                f'<text x="{frame.x(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{tick:,.0f}</text>"
            )
    middle = (LEFT + WIDTH - RIGHT) // 2
    yield f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">step</text>'


def _pieces(frame: _Frame, attempt: Attempt) -> Iterator[str]:
    """Lines of an attempt: the lowest and the highest loss of each column of pixels.

    A step that is not finite ends a line.
    """
    columns: dict[int, list[float]] = {}
    for row in attempt.rows:
        if math.isfinite(row.loss):
            columns.setdefault(int(frame.x(row.step)), []).append(row.loss)
        elif columns:
            yield _line(frame, columns)
            columns = {}
    if columns:
        yield _line(frame, columns)


def _line(frame: _Frame, columns: dict[int, list[float]]) -> str:
    points = []
    for x, losses in columns.items():
        ends = {frame.y(losses[0]), frame.y(max(losses)), frame.y(min(losses)), frame.y(losses[-1])}
        points += [f"{x},{y}" for y in sorted(ends)]
    return " ".join(points)


def _band(frame: _Frame, event: Found, last: int) -> Iterator[str]:
    """Shade the steps of an event."""
    left, right = frame.x(event.onset), frame.x(last if event.closed is None else event.closed)
    yield (
        f'<rect x="{left}" y="{TOP}" width="{max(right - left, 1.5):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}" '
        f'style="fill: {COLORS[event.kind]}; opacity: 0.15"/>'
    )


def _mark(frame: _Frame, event: Found) -> Iterator[str]:
    """Mark the onset of an event, with its facts where the pointer rests."""
    x, color = frame.x(event.onset), COLORS[event.kind]
    closed = "never back" if event.closed is None else f"back at {event.closed}"
    facts = f"{event.kind}: onset {event.onset}, flagged {event.flagged}, {closed}"
    yield (
        f'<path d="M{x} {TOP} l-5 -8 h10 z" style="fill: {color}">'
        f"<title>{escape(facts)}</title></path>"
    )


def _legend(found: Sequence[Found]) -> Iterator[str]:
    x = LEFT
    for kind, color in COLORS.items():
        count = sum(event.kind == kind for event in found)
        if count:
            yield f'<path d="M{x} 10 h10 l-5 8 z" style="fill: {color}"/>'
            text = f"{kind} ({count})"
            yield f'<text x="{x + 14}" y="19">{text}</text>'
            x += 30 + 7 * len(text)
    text = "line: training loss (nat a token)" if found else "no event; training loss (nat a token)"
    yield f'<text x="{x}" y="19">{text}</text>'
