"""Plot the loss curve of one or more runs as a stand-alone SVG.

    python tools/plot_loss.py RUN_DIRECTORY [RUN_DIRECTORY ...] --svg FILE

- A line is the training loss of every step, a dot the held-out loss of a checkpoint.
- Runs follow one another on the axis of consumed tokens: the stages of a model in one picture.
- Where a step was done twice, the latest attempt is drawn.
- Needs no torch and no plotting library: it works on a login node while the run trains.
- Alternatives considered: matplotlib, a large dependency for one curve.

Exit codes: 0 done; 2 a mistake in usage or a damaged record, one line on stderr.
"""

import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from command_line import Parser, command

from k2train.errors import EXIT_DONE, RunError
from k2train.record.events import CheckpointSaved, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import latest
from k2train.report.scale import ticks

Point = tuple[float, float]

WIDTH, HEIGHT = 900, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 44
COLORS = ("#2171b5", "#d9802f", "#238b45", "#6a51a3")


class Curve(NamedTuple):
    """The losses of one run as (tokens, loss); tokens count from the start of the first run."""

    name: str
    training: list[Point]
    held_out: list[Point]


def curve_of(directory: Path, tokens_before: float = 0.0) -> Curve:
    """The curve of a run, its tokens counted on from `tokens_before`.

    Raises RunError when it has no steps.
    """
    metrics = directory / "metrics.jsonl"
    rows = latest(metrics) if metrics.exists() else []
    training = _finite([(tokens_before + row.consumed_tokens, row.loss) for row in rows])
    if not training:
        raise RunError(
            f"{directory}: no step is on record in metrics.jsonl; "
            "give the directory of a run that trained"
        )
    saved = of_kind(read_ledger(directory / "ledger.jsonl"), CheckpointSaved)
    scored = {
        tokens_before + event.consumed_tokens: event.held_out_loss
        for event in saved
        if event.held_out_loss is not None
    }
    return Curve(directory.name, training, _finite(sorted(scored.items())))


def svg(curves: Sequence[Curve]) -> str:
    """All curves in one picture, side by side on the axis of tokens."""
    points = [point for curve in curves for point in (*curve.training, *curve.held_out)]
    losses = [loss for _, loss in points]
    x_ticks = ticks(0.0, max(tokens for tokens, _ in points))
    y_ticks = ticks(min(losses), max(losses))
    low, high = min(y_ticks[0], *losses), max(y_ticks[-1], *losses)
    last = max(x_ticks[-1], max(tokens for tokens, _ in points))

    def at(point: Point) -> Point:
        x = LEFT + point[0] / last * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    body = []
    for tick in y_ticks:
        y = at((0.0, tick))[1]
        body.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        body.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    scale, unit = _scale(last)
    for tick in x_ticks:
        x = at((tick, low))[0]
        body.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick / scale:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) // 2
    body.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{unit}tokens</text>')

    left = LEFT
    for index, curve in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        line = " ".join(f"{x},{y}" for x, y in map(at, curve.training))
        body.append(f'<polyline points="{line}" style="stroke: {color}"/>')
        for point in curve.held_out:
            x, y = at(point)
            body.append(
                f'<circle cx="{x}" cy="{y}" r="4" style="fill: {color}">'
                f"<title>{point[1]:.4f}</title></circle>"
            )
        body.append(f'<text x="{left}" y="18" style="fill: {color}">{escape(curve.name)}</text>')
        left += 20 + 8 * len(curve.name)
    dots = ", dots: held-out loss" if any(curve.held_out for curve in curves) else ""
    body.append(f'<text x="{left}" y="18">line: training loss{dots} (nat a token)</text>')

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size}>
<style>text {{ font: 12px sans-serif; fill: #111; }} polyline {{ fill: none; stroke-width: 1.5; }}
circle {{ stroke: white; }} .grid {{ stroke: #ddd; }}</style>
<rect width="{WIDTH}" height="{HEIGHT}" style="fill: white"/>
""" + "\n".join([*body, "</svg>", ""])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(tokens, loss) for tokens, loss in points if math.isfinite(loss)]


def _scale(tokens: float) -> tuple[float, str]:
    """The number to divide by, and the word for it."""
    for scale, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if tokens >= scale:
            return scale, word
    return 1.0, ""


@command
def main(arguments: Sequence[str]) -> int:
    """Read the runs and write the picture; the exit code."""
    parser = Parser(description="Plot the loss curve of runs as SVG.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIRECTORY", help="for example runs/demo-stage1"
    )
    parser.add_argument(
        "--svg", type=Path, required=True, metavar="FILE", help="where the picture goes"
    )
    options = parser.parse_args(arguments)
    curves: list[Curve] = []
    try:
        for directory in options.runs:
            curves.append(curve_of(directory, curves[-1].training[-1][0] if curves else 0.0))
        options.svg.write_text(svg(curves), encoding="utf-8")
    except OSError as problem:
        raise RunError(f"{problem.filename}: {problem.strerror}") from None
    print(f"{options.svg}: {', '.join(curve.name for curve in curves)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
