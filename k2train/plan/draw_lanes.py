"""Drawing of planned above measured lanes: one pair for each rank, on one time scale, as SVG.

- Every box has a kind, which sets its colour and its hatching, and a tooltip with its times.
- The picture follows the reader's light or dark setting. Kinds differ in grey, too.
- It is as wide as its shortest usual box needs, within limits. A label that does not fit is left
  out, never squeezed.

Alternatives considered:
- Two pictures: the eye cannot compare lengths over two scales.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEFT, TOP, ROW, BETWEEN, GAP, RIGHT = 118, 56, 20, 2, 12, 14
NARROW, WIDE = 1200, 3200
LONGEST = 8
"""Width for the height, at most: a longer strip shrinks to nothing on a page."""
TICK_PIXELS = 110
USUAL_PIXELS = 18.0
"""Width of a usual box, which shows a label of two digits."""
DIGIT_PIXELS = 6.6

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "data": "gradients and norms",
    "update": "optimizer",
    "host": "host and loader",
}
"""Kinds of boxes by their class, with their names in the key."""
STRIPES = {"B": 45, "I": 135, "data": 0}
"""Kinds with stripes, and the angle of these."""
DOTS = ("W", "update")

STYLE = """
svg { --page: #fff; --ink: #14181d; --soft: #5b6570; --idle: #eef1f4; --edge: #5b6570;
 --F: #a8d0ea; --B: #fdc08b; --I: #f7b1a2; --W: #c3e6bd; --data: #d5c8ee; --update: #f2e3a0;
 --host: #d3d8de; --mark: #8a5a1e; --dot: #2d7a3a; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --page: #14181d; --ink: #eef1f4; --soft: #9aa5b1;
 --idle: #232a32; --edge: #9aa5b1; --F: #235f86; --B: #8a5220; --I: #8c4238; --W: #2c6636;
 --data: #54448a; --update: #70621c; --host: #4a535d; --mark: #e0a56a; --dot: #8fd59c; } }
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.soft { fill: var(--soft); } .end { text-anchor: end; } .middle { text-anchor: middle; }
.box { stroke: var(--edge); stroke-width: 0.5; } .idle { fill: var(--idle); }
.grid { stroke: var(--soft); stroke-width: 0.5; opacity: 0.5; }
"""


@dataclass(frozen=True)
class Box:
    """A span of a lane, seconds; `label` is shown where it fits."""

    kind: str
    begin: float
    end: float
    label: str
    tooltip: str


@dataclass(frozen=True)
class Pair:
    """Planned and measured boxes of one rank."""

    name: str
    planned: Sequence[Box]
    measured: Sequence[Box]


def lanes_svg(pairs: Sequence[Pair], title: str) -> str:
    """Draw the lanes of all ranks as a stand-alone SVG; times are seconds."""
    boxes = [box for pair in pairs for box in (*pair.planned, *pair.measured)]
    first = min((box.begin for box in boxes), default=0.0)
    last = max((box.end for box in boxes), default=0.0)
    total = (last - first) or 1.0
    height = TOP + len(pairs) * (2 * ROW + BETWEEN + GAP) + 26
    width = max(NARROW, min(_width(boxes, total), LONGEST * height))
    scale = (width - LEFT - RIGHT) / total
    kinds = [kind for kind in KINDS if any(box.kind == kind for box in boxes)]

    body = [_head(kinds, width, height, title)]
    body += _axis(first, total, scale, height)
    for index, pair in enumerate(pairs):
        top = TOP + index * (2 * ROW + BETWEEN + GAP)
        body.append(f'<text x="8" y="{top + ROW + 5}">{html.escape(pair.name)}</text>')
        for lane, name, at in (
            (pair.planned, "plan", top),
            (pair.measured, "real", top + ROW + BETWEEN),
        ):
            body.append(f'<text class="soft end" x="{LEFT - 6}" y="{at + 15}">{name}</text>')
            body.append(
                f'<rect class="idle" x="{LEFT}" y="{at}" width="{total * scale:.2f}" '
                f'height="{ROW}"/>'
            )
            for box in lane:
                body += _box(box, LEFT + (box.begin - first) * scale, at, scale)
    return "\n".join([*body, "</svg>", ""])


def _width(boxes: Sequence[Box], total: float) -> int:
    """Width at which a usual forward shows its label, at most `WIDE`."""
    lengths = [box.end - box.begin for box in boxes if box.kind == "F"]
    usual = statistics.median(lengths) if lengths else total
    wanted = LEFT + RIGHT + USUAL_PIXELS * total / usual if usual > 0 else NARROW
    return round(min(wanted, WIDE))


def _head(kinds: Sequence[str], width: int, height: int, title: str) -> str:
    patterns = "".join(_pattern(kind) for kind in kinds)
    fills = {k: f"url(#{k}-fill)" if _has_pattern(k) else f"var(--{k})" for k in kinds}
    styles = " ".join(f".{kind} {{ fill: {fill}; }}" for kind, fill in fills.items())
    key, left = [f'<text x="8" y="18">{html.escape(title)}</text>'], 8
    for kind in kinds:
        key.append(f'<rect class="box {kind}" x="{left}" y="28" width="16" height="13"/>')
        key.append(f'<text x="{left + 21}" y="39">{KINDS[kind]}</text>')
        left += 40 + 7 * len(KINDS[kind])
    key.append(f'<text class="soft" x="{left}" y="39">the number is the micro-batch</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">\n<style>{STYLE}{styles}</style>\n<defs>{patterns}</defs>\n'
        f'<rect width="{width}" height="{height}" style="fill: var(--page)"/>\n' + "\n".join(key)
    )


def _has_pattern(kind: str) -> bool:
    return kind in STRIPES or kind in DOTS


def _pattern(kind: str) -> str:
    if not _has_pattern(kind):
        return ""
    mark = '<circle cx="3" cy="3" r="0.9" style="fill: var(--dot)"/>'
    if kind in STRIPES:
        mark = '<line x1="0" y1="0" x2="0" y2="6" style="stroke: var(--mark); stroke-width: 1.2"/>'
    return (
        f'<pattern id="{kind}-fill" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({STRIPES.get(kind, 0)})">'
        f'<rect width="6" height="6" style="fill: var(--{kind})"/>{mark}</pattern>'
    )


def _axis(first: float, total: float, scale: float, height: int) -> Iterable[str]:
    """Lines at round times, with their seconds below; 0 is where the pipeline begins."""
    step = round_step(TICK_PIXELS / scale)
    tick = math.ceil(first / step)
    while (at := tick * step) <= first + total:
        x = LEFT + (at - first) * scale
        yield f'<line class="grid" x1="{x:.2f}" y1="{TOP - 6}" x2="{x:.2f}" y2="{height - 22}"/>'
        label = seconds_text(at, step)
        yield f'<text class="soft middle" x="{x:.2f}" y="{height - 8}">{label}</text>'
        tick += 1


def round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least `least`, above 0."""
    power = 10.0
    while power > least:
        power /= 10
    while power * 10 <= least:
        power *= 10
    return next(power * digit for digit in (1, 2, 5, 10, 20) if power * digit >= least)


def seconds_text(at: float, step: float) -> str:
    """Label of a tick at `at` seconds, on an axis with a tick every `step` seconds."""
    return f"{1e3 * at:.4g} ms" if step < 0.1 else f"{at:.4g} s"


def _box(box: Box, left: float, top: int, scale: float) -> list[str]:
    width = (box.end - box.begin) * scale
    found = [
        f'<rect class="box {box.kind}" x="{left:.2f}" y="{top}" width="{width:.2f}" '
        f'height="{ROW}"><title>{html.escape(box.tooltip)}</title></rect>'
    ]
    if box.label and width >= DIGIT_PIXELS * len(box.label) + 3:
        found.append(
            f'<text class="middle" x="{left + width / 2:.2f}" y="{top + 14}">'
            f"{html.escape(box.label)}</text>"
        )
    return found
