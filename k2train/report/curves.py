"""Figures of a run: losses, norms, rate, throughput and memory.

- A second run to compare with is drawn beside the first, in another color.
- What a restart or a return undid is drawn faint: nothing of the record is hidden.
"""

import math
from collections.abc import Callable, Sequence

from k2train.record.metrics import StepRecord
from k2train.report.collect import RunView
from k2train.report.columns import Point
from k2train.report.evaluation import evaluation_figures
from k2train.report.figure import Curve, Figure
from k2train.report.marks import event_marks
from k2train.text import bytes_text, counted

SUBSET_BINS = 100
COLORS = 8


def figures(run: RunView, other: RunView | None = None) -> list[Figure]:
    """All figures of a run; those without values are left out when they are rendered."""
    runs = [run] if other is None else [run, other]
    marks = event_marks(run)
    of = "" if other is None else f", of {run.name}"
    return [
        Figure("Loss", "nats a token", _losses(runs), marks, note=_loss_note(run)),
        Figure("Held-out loss by subset", f"nats a token{of}", _held_out_subsets(run)),
        Figure("Training loss by subset", f"nats a token{of}", _training_subsets(run)),
        *evaluation_figures(run.evaluations),
        Figure("Gradient norm", "before clipping", _of(runs, _grad_norm), marks, log=True),
        Figure("Update norm", "of the applied update", _of(runs, _update_norm), marks, log=True),
        Figure("Learning rate", "of the step", _of(runs, lambda r: r.lr)),
        Figure("Throughput", "tokens a second", _of(runs, _speed), values=_count),
        Figure("Model FLOPs utilization", "% of the peak", _of(runs, _mfu)),
        Figure("Seconds a step", "s", _of(runs, lambda r: r.seconds), log=True),
        Figure("Peak memory", "GiB, of rank 0", _of(runs, _memory), values=_bytes),
        Figure("Device utilization", "% of the time", _of(runs, _use("utilization", 100))),
        Figure("Device memory", "GiB in use", _of(runs, _use("memory_bytes", 2**-30))),
        Figure("Device power", "W", _of(runs, _use("power_watts"))),
        Figure("Device temperature", "°C", _of(runs, _use("celsius"))),
        Figure("Busy processor cores", "of rank 0", _of(runs, _use("cpu_cores"))),
    ]


def _losses(runs: Sequence[RunView]) -> list[Curve]:
    curves: list[Curve] = []
    color = 0
    for index, run in enumerate(runs):
        color, own = color + 1, "" if len(runs) == 1 else f" {run.name}"
        undone: list[Point] = [(record.step, record.loss) for record in run.undone]
        if undone:
            curves.append(Curve(f"undone{own}", undone, _color(color), faint=True, run=index))
        kept: list[Point] = [(record.step, record.loss) for record in run.kept]
        curves.append(Curve(f"training{own}", kept, _color(color), run=index))
        for name in dict.fromkeys(one.set for one in run.kept_scores):
            color += 1
            scored: list[Point] = [
                (one.step, one.loss) for one in run.kept_scores if one.set == name
            ]
            curves.append(Curve(f"{name}{own}", scored, _color(color), dots=True, run=index))
    return curves


def _color(number: int) -> int:
    return (number - 1) % COLORS + 1


def _loss_note(run: RunView) -> str:
    kept = run.kept
    if not kept or not run.undone:
        return ""
    were = "was" if len(run.undone) == 1 else "were"
    undone = counted(len(run.undone), "step")
    return f"{undone} {were} undone by restarts or returns, drawn faint."


def _held_out_subsets(run: RunView) -> list[Curve]:
    names = dict.fromkeys(name for one in run.kept_scores for name in one.subsets)
    if len(names) < 2:
        return []
    several = len({one.set for one in run.kept_scores}) > 1
    curves: list[Curve] = []
    for set_name in dict.fromkeys(one.set for one in run.kept_scores):
        for name in names:
            points: list[Point] = [
                (one.step, one.subsets[name])
                for one in run.kept_scores
                if one.set == set_name and name in one.subsets
            ]
            said = f"{set_name}: {name}" if several else name
            curves.append(Curve(said, points, len(curves) % COLORS + 1, dots=True))
    return curves


def _training_subsets(run: RunView) -> list[Curve]:
    """Mean over the tokens of each subset, in bins of steps: one step holds a few rows of each."""
    rows = [record for record in run.kept if record.subsets]
    if not rows:
        return []
    first, width = rows[0].step, max(1, math.ceil(len(rows) / SUBSET_BINS))
    sums: dict[str, dict[int, list[float]]] = {}
    for record in rows:
        place = (record.step - first) // width
        for name, (tokens, loss) in (record.subsets or {}).items():
            if math.isfinite(value := float(loss)):
                total = sums.setdefault(name, {}).setdefault(place, [0.0, 0.0])
                total[0] += tokens
                total[1] += tokens * value
    return [
        Curve(
            name,
            [
                (first + (place + 1) * width - 1, total / tokens)
                for place, (tokens, total) in sorted(bins.items())
                if tokens
            ],
            index % COLORS + 1,
        )
        for index, (name, bins) in enumerate(sorted(sums.items()))
    ]


def _of(runs: Sequence[RunView], value: Callable[[StepRecord], float | None]) -> list[Curve]:
    curves = []
    for index, run in enumerate(runs):
        points: list[Point] = [
            (record.step, found) for record in run.kept if (found := value(record)) is not None
        ]
        curves.append(Curve(run.name, points, 2 * index + 1, run=index))
    return curves


def _grad_norm(record: StepRecord) -> float | None:
    return record.grad_norm if record.grad_norm > 0 else None


def _update_norm(record: StepRecord) -> float | None:
    return record.update_norm if record.update_norm else None


def _speed(record: StepRecord) -> float:
    return record.tokens_per_second


def _mfu(record: StepRecord) -> float | None:
    return None if record.mfu is None else 100 * record.mfu


def _memory(record: StepRecord) -> float | None:
    return record.peak_memory_bytes / 2**30 if record.peak_memory_bytes else None


def _use(key: str, factor: float = 1.0) -> Callable[[StepRecord], float | None]:
    """Return what reads one value of rank 0's device."""

    def of(record: StepRecord) -> float | None:
        value = (record.device or {}).get(key)
        return value * factor if isinstance(value, float | int) else None

    return of


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    return bytes_text(value * 2**30)
