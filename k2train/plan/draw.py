"""Pipeline drawing: spans as text or SVG, for planned and measured spans alike.

- One line per rank, time to the right.
- Forwards, backwards and the halves of a split backward differ by sign (`3-`, `3=`, `3~` and `3+`)
  and by hatching, not by colour alone. So the picture is readable in a log and in grey.
- A step too long for the width continues in further panels, instead of being squeezed until nothing
  is readable.

Alternatives considered:
- A plotting library: this must work with Python alone.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence

from k2train.plan.action import Op
from k2train.plan.simulate import Span

MAX_PANELS = 6
FILL = {Op.FORWARD: "-", Op.BACKWARD: "=", Op.BACKWARD_INPUT: "~", Op.BACKWARD_WEIGHT: "+"}
NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "input gradient",
    Op.BACKWARD_WEIGHT: "weight gradients",
}


def draw(spans: Sequence[Span], width: int = 100, unit: str = "s") -> str:
    """Draw the computation of every rank in panels of `width` characters, under a key.

    `unit` names the unit of the spans' times. With several stages per rank a letter tells them
    apart: small for a forward, capital for a backward and its halves.
    """
    computes = [span for span in spans if span.action.op.is_compute]
    if not computes:
        return "nothing to draw"

    start, total = _extent(computes)
    if total <= 0:
        return "nothing to draw: the spans take no time"

    ranks = sorted({span.rank for span in computes})
    local = _local_stages(computes)
    gutter = len(f"rank {ranks[-1]} ")
    panel_columns = max(1, width - gutter)
    columns = _columns(computes, total, panel_columns, _label_width(computes, local))

    rows = {rank: ["."] * columns for rank in ranks}
    for span in computes:
        first = round((span.start_seconds - start) / total * columns)
        last = round((span.end_seconds - start) / total * columns)
        rows[span.rank][first:last] = _cell(span, local, last - first)

    lines = _key(_ops(computes), local, total / columns, unit)
    for left in range(0, columns, panel_columns):
        if left:
            lines.append("")
        lines += [
            f"rank {rank}".ljust(gutter) + "".join(rows[rank][left : left + panel_columns]).rstrip()
            for rank in ranks
        ]

    return "\n".join(lines)


def _extent(computes: Sequence[Span]) -> tuple[float, float]:
    """Return (first start, length) of the time covered by the spans."""
    start = min(span.start_seconds for span in computes)
    return start, max(span.end_seconds for span in computes) - start


def _local_stages(computes: Sequence[Span]) -> dict[int, int]:
    """Map each global stage to its index among the stages of its rank."""
    held: dict[int, set[int]] = {}
    for span in computes:
        held.setdefault(span.rank, set()).add(span.action.stage)
    return {stage: index for stages in held.values() for index, stage in enumerate(sorted(stages))}


def _label(span: Span, local: dict[int, int]) -> str:
    """Label of a span: `3`, or `a3` and `A3` where a rank has several stages."""
    if max(local.values()) == 0:
        return str(span.action.microbatch)
    letter = chr(ord("a") + local[span.action.stage] % 26)
    return (letter if span.action.op is Op.FORWARD else letter.upper()) + str(
        span.action.microbatch
    )


def _label_width(computes: Sequence[Span], local: dict[int, int]) -> int:
    """Width of the longest label and one fill character, which separates it from the next."""
    return 1 + max(len(_label(span, local)) for span in computes)


def _columns(computes: Sequence[Span], total: float, panel_columns: int, label_width: int) -> int:
    """Columns for the whole step: a usual forward shows its label, within `MAX_PANELS` panels.

    A whole number of columns per usual forward, so that equal spans are drawn equal.
    """
    usual = statistics.median(
        [span.end_seconds - span.start_seconds for span in computes if span.action.op is Op.FORWARD]
        or [total]
    )
    length = total / usual if usual > 0 else 1.0
    columns_per_forward = max(label_width, int(panel_columns / length))
    return max(1, min(round(length * columns_per_forward), MAX_PANELS * panel_columns))


def _cell(span: Span, local: dict[int, int], columns: int) -> list[str]:
    """Characters of one span.

    A short cell shows the label's last ones; a backward keeps its mark.
    """
    if columns <= 0:
        return []
    fill = FILL[span.action.op]
    room = columns if span.action.op is Op.FORWARD else columns - 1
    label = _label(span, local)[-room:] if room else ""
    return list(label.ljust(columns, fill))


def _ops(computes: Sequence[Span]) -> list[Op]:
    """Ops that occur, forwards first."""
    found = {span.action.op for span in computes}
    return [op for op in FILL if op in found]


def _key(ops: Sequence[Op], local: dict[int, int], column: float, unit: str) -> list[str]:
    signs = [
        f"3{FILL[op]} {NAMES[op]}{' of micro-batch 3' if index == 0 else ''}"
        for index, op in enumerate(ops)
    ]
    key = [f"{', '.join(signs)}, . idle; one column = {column:.3g} {unit}"]
    if max(local.values()) > 0:
        key.append("a b ... the rank's stages in order, capital in backwards")
    return key


ROW, GAP, LEFT, TOP = 28, 8, 64, 34
# Readable in grey: forward light and plain, backwards darker with stripes, weight gradients dotted.
FILLS = {
    Op.FORWARD: "#9ecae1",
    Op.BACKWARD: "#fdae6b",
    Op.BACKWARD_INPUT: "#fdae6b",
    Op.BACKWARD_WEIGHT: "#c7e9c0",
}
LINES = {
    Op.BACKWARD: '<line x1="0" y1="0" x2="0" y2="6" style="stroke: #d9802f; stroke-width: 2"/>',
    Op.BACKWARD_INPUT: (
        '<line x1="0" y1="0" x2="0" y2="6" style="stroke: #d9802f; stroke-width: 2"/>'
    ),
    Op.BACKWARD_WEIGHT: '<circle cx="3" cy="3" r="1.3" style="fill: #238b45; stroke: none"/>',
}


def svg(spans: Sequence[Span], width: int = 1200, unit: str = "s", scope: str = "in all") -> str:
    """Draw the same picture as a stand-alone SVG of `width` pixels.

    Tooltips name action and times. `scope` says what the time of the picture is of.
    """
    computes = [span for span in spans if span.action.op.is_compute]
    ranks = sorted({span.rank for span in computes})
    start, total = _extent(computes) if computes else (0.0, 0.0)
    scale = (width - LEFT - GAP) / total if total > 0 else 0.0
    height = TOP + len(ranks) * (ROW + GAP)
    local = _local_stages(computes)
    length = f"{total:.4g} {unit} {scope}"
    body = []

    for index, rank in enumerate(ranks):
        top = TOP + index * (ROW + GAP)
        body.append(f'<text x="8" y="{top + 19}">rank {rank}</text>')
        body.append(
            f'<rect class="idle" x="{LEFT}" y="{top}" width="{total * scale:.2f}" height="{ROW}"/>'
        )

        for span in computes:
            if span.rank == rank:
                body += _svg_box(
                    span,
                    _label(span, local),
                    LEFT + (span.start_seconds - start) * scale,
                    top,
                    scale,
                    unit,
                )

    shown = any(box.endswith("</text>") and 'text-anchor="middle"' in box for box in body)
    numbers = "the number is the micro-batch" if shown else "boxes too narrow for their numbers"
    text = f"{length}; {numbers}"
    head = _svg_head(_ops(computes) or [Op.FORWARD], width, height, text)
    return "\n".join([head, *body, "</svg>", ""])


def _svg_head(ops: Sequence[Op], width: int, height: int, text: str) -> str:
    fills = {op: f"url(#{op.value}-lines)" if op in LINES else FILLS[op] for op in ops}
    styles = " ".join(f".{op.value} {{ fill: {fill}; }}" for op, fill in fills.items())
    patterns = "".join(
        f'<pattern id="{op.value}-lines" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)">'
        f'<rect width="6" height="6" style="fill: {FILLS[op]}; stroke: none"/>'
        f"{LINES[op]}</pattern>"
        for op in ops
        if op in LINES
    )
    key, left = [], LEFT

    for op in ops:
        key.append(f'<rect class="{op.value}" x="{left}" y="8" width="16" height="14"/>')
        key.append(f'<text x="{left + 22}" y="19">{NAMES[op]}</text>')
        left += 40 + 7 * len(NAMES[op])

    key.append(f'<text x="{left}" y="19">{html.escape(text)}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}">
<style>text {{ font: 12px sans-serif; fill: #111; }} rect {{ stroke: #444; stroke-width: 0.5; }}
.idle {{ fill: #f4f4f4; }} {styles}</style>
<defs>{patterns}</defs>
<rect width="{width}" height="{height}" style="fill: white; stroke: none"/>
""" + "\n".join(key)


def _svg_box(span: Span, label: str, left: float, top: int, scale: float, unit: str) -> list[str]:
    width = (span.end_seconds - span.start_seconds) * scale
    tooltip = (
        f"{span.action}: {span.start_seconds:.4g} to {span.end_seconds:.4g} {html.escape(unit)}"
    )
    geometry = f'x="{left:.2f}" y="{top}" width="{width:.2f}" height="{ROW}"'
    box = [f'<rect class="{span.action.op.value}" {geometry}><title>{tooltip}</title></rect>']

    if width >= 8 * len(label):
        box.append(
            f'<text x="{left + width / 2:.2f}" y="{top + 19}" text-anchor="middle">{label}</text>'
        )

    return box
