"""Bundles of spikes, read and told: what happened, on which data, in which layers.

- Needs no torch, and nothing but the folder.
- Numbers of a file that was cut or edited are checked no further than a reader needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.safe_json import parse_json, read_json, read_plain_file
from k2train.text import clean, counted, table
from k2train.train.spike_names import EVENT, SEQUENCES, SPIKES, STEPS, TENSORS, spike_folder

SHOWN_SEQUENCES = 5
ODD_SHARE = 0.5
"""Share of one id from which on a sequence is shown whatever its loss."""
SHOWN_CHARACTERS = 240
SHOWN_TENSORS = 8
NOISY = 1e-30


@dataclass(frozen=True)
class Bundle:
    """The bundle of a spike in `folder`; `event` is its `event.json`."""

    folder: Path
    event: Mapping[str, Any]

    def lines_of(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of one of its files; none where it is missing."""
        path = self.folder / name
        if not exists_retried(path):
            return []
        try:
            rows = [parse_json(line) for line in read_plain_file(path).splitlines()]
        except ValueError as error:
            raise RunError(f"{path} cannot be read: {error}") from None
        return [row for row in rows if isinstance(row, dict) and "left_out" not in row]

    @property
    def opened(self) -> Mapping[str, Any]:
        """The verdict that opened the event."""
        return dict(self.event["opened"])

    @property
    def onset(self) -> int:
        """First step that was unusual."""
        return int(self.opened["onset"])

    @property
    def step(self) -> int:
        """Step whose batch raised the alarm."""
        return int(self.opened["step"])


def bundles_of(run: Path) -> list[Bundle]:
    """Return all bundles of a run, by number."""
    folder = run / SPIKES
    if not is_folder_retried(folder):
        return []
    found = sorted(path for path in list_retried(folder) if exists_retried(path / EVENT))
    return [read_bundle(path) for path in found]


def find_bundle(run: Path, wanted: str) -> Bundle:
    """Return the bundle of a number or a folder's name. Raises RunError that lists those there."""
    digits = wanted.removeprefix("spike_")
    if digits.isascii() and digits.isdigit():
        path = spike_folder(run, int(digits))
        if exists_retried(path / EVENT):
            return read_bundle(path)
    there = ", ".join(str(bundle.event.get("number")) for bundle in bundles_of(run)) or "none"
    raise RunError(f"{run / SPIKES} has no bundle {wanted!r}: it has {there}")


def read_bundle(folder: Path) -> Bundle:
    """Read the bundle in a folder. Raises RunError when it has no event that makes sense."""
    path = folder / EVENT
    try:
        event = read_json(path)
        bundle = Bundle(folder, event)
        numbers = [bundle.onset, bundle.step, *event["rows"]]
        good = all(type(n) is int for n in numbers) and isinstance(event["chunk"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not good:
        raise RunError(f"{path} is not the event of a spike; it was changed")
    return bundle


def summary(bundle: Bundle) -> str:
    """Return one line for the list of bundles."""
    event, opened, closed = bundle.event, bundle.opened, bundle.event.get("closed")
    end = "open" if closed is None else f"{closed['kind']} at step {closed['step']}"
    return (
        f"{event['number']}: {opened['kind']} at step {bundle.onset}, {end}; {event['chunk']} rows "
        f"{event['rows'][0]}-{event['rows'][1] - 1}, loss {_number(event['loss'])}, usual "
        f"{_number(opened['usual_loss'])}"
    )


def report(bundle: Bundle) -> Iterator[str]:
    """Yield the lines of a readable report."""
    yield f"spike {summary(bundle)}"
    yield from _event_lines(bundle)
    yield ""
    yield from _sequence_lines(bundle)
    yield ""
    yield from _tensor_lines(bundle)
    yield ""
    yield from _step_lines(bundle)


def _event_lines(bundle: Bundle) -> Iterator[str]:
    event, opened = bundle.event, bundle.opened
    channels = [
        f"{name} {_number(opened.get(name))}, usual {_number(opened.get(f'usual_{name}'))} "
        f"({_number(opened.get(f'{name}_z'))} spreads above)"
        for name in opened.get("channels") or ("loss",)
    ]
    yield f"alarm: {'; '.join(channels)}"
    yield (
        f"position {event['order_index']} of the order, rate {_number(event['lr'])}, attempt "
        f"{event['attempt']}, layout {event['layout']}"
    )
    if (closed := event.get("closed")) is not None:
        yield (
            f"{closed['kind']} after {counted(closed['steps'], 'step')}: peak loss "
            f"{_number(closed.get('peak_loss'))}, at the end {_number(closed.get('recent_loss'))}"
        )
    yield f"checkpoint before: {event.get('checkpoint_before') or 'none'}"
    yield from (f"note: {clean(note)}" for note in event.get("notes", ()))


def _sequence_lines(bundle: Bundle) -> Iterator[str]:
    rows = bundle.lines_of(SEQUENCES)
    losses = sorted(_float(row.get("loss")) for row in rows)
    if not losses:
        yield "no losses by sequence"
        return
    middle = losses[len(losses) // 2]
    high = sum(loss > middle + 1 for loss in losses)
    yield (
        f"sequences ({bundle.event.get('sequences')}): median loss {middle:.4f}, highest "
        f"{losses[-1]:.4f}; {high} of {len(losses)} more than 1 nat above the median"
    )
    odd = [row for row in rows[SHOWN_SEQUENCES:] if row.get("commonest_share", 0) >= ODD_SHARE]
    for row in rows[:SHOWN_SEQUENCES] + odd[:SHOWN_SEQUENCES]:
        signs = ""
        if "distinct_ids" in row:
            signs = (
                f", {row['distinct_ids']} distinct ids, id {row['commonest_id']} is "
                f"{100 * row['commonest_share']:.0f}% of it"
            )
        yield f"  row {row['row']}: loss {_number(row['loss'])}{signs}"
        sources = [
            f"{one.get('subset')}: {one.get('source')} {one.get('document')}"
            for one in row.get("sources", ())
        ]
        yield from (f"    {clean(source)}" for source in sources[:3])
        if "text" in row:
            yield f"    | {clean(' '.join(row['text'].split()))[:SHOWN_CHARACTERS]}"
        elif "ids" in row:
            yield f"    ids {' '.join(map(str, row['ids'][:24]))} ..."


def _tensor_lines(bundle: Bundle) -> Iterator[str]:
    rows = bundle.lines_of(TENSORS)
    if not rows:
        yield "no statistics of tensors"
        return

    total = sqrt(sum(_part(row, "gradient", "norm") ** 2 for row in rows)) or 1.0
    yield "tensors with the largest part of the gradient"
    ranked = sorted(rows, key=lambda row: -_part(row, "gradient", "norm"))[:SHOWN_TENSORS]
    heads = ("tensor", "gradient", "part", "largest", "update/weight", "g2/v", "zeros in g")
    cells = []
    for row in ranked:
        norm, weight = _part(row, "gradient", "norm"), _part(row, "weight", "norm")
        # The moment is of squares, so that its norm compares with the largest square.
        second = _part(row, "exp_avg_sq", "max")
        cells.append(
            [
                str(row["tensor"]),
                f"{norm:.3g}",
                f"{100 * (norm / total) ** 2:.1f}%",
                f"{_part(row, 'gradient', 'max'):.3g}",
                f"{_part(row, 'update', 'norm') / max(weight, NOISY):.2e}",
                f"{_part(row, 'gradient', 'max') ** 2 / max(second, NOISY):.3g}",
                f"{100 * _part(row, 'gradient', 'zeros'):.1f}%",
            ]
        )
    yield from (f"  {line}" for line in table(heads, cells, ("tensor",)))

    layers = _layers(rows)
    if layers:
        top = sorted(layers, key=lambda layer: -layers[layer])[:3]
        named = ", ".join(f"{layer} ({100 * layers[layer] / total**2:.0f}%)" for layer in top)
        yield f"layers with the largest part: {named}"


def _layers(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Square of the gradient norm by layer."""
    found: dict[int, float] = {}
    for row in rows:
        first, _, rest = str(row["tensor"]).partition(".")
        number = rest.partition(".")[0]
        if first == "layers" and number.isdigit():
            square = _part(row, "gradient", "norm") ** 2
            found[int(number)] = found.get(int(number), 0.0) + square
    return found


def _step_lines(bundle: Bundle) -> Iterator[str]:
    """The steps around the onset."""
    rows = sorted(bundle.lines_of(STEPS), key=lambda row: int(row["step"]))
    near = [row for row in rows if abs(int(row["step"]) - bundle.onset) <= 4]
    if not near:
        yield "no steps"
        return
    heads = ("step", "chunk", "loss", "grad_norm")
    cells = [[str(row["step"]), row["chunk"], *_norms(row)] for row in near]
    yield from table(heads, cells, ("chunk",))


def _norms(row: Mapping[str, Any]) -> list[str]:
    return [_number(row.get("loss")), _number(row.get("grad_norm"))]


def _part(row: Mapping[str, Any], part: str, key: str) -> float:
    return _float(row.get(part, {}).get(key))


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float | str) else float("nan")


def _number(value: Any) -> str:
    return "-" if value is None else f"{_float(value):.4g}"
