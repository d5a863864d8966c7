"""Record of held-out scores: of the ledger, and the lines of `metrics.jsonl` and `held_out.jsonl`.

- `metrics.jsonl` has one line for each evaluation: all sets under the key `held_out`, with the step
  whose weights were scored. It follows the line of that step.
- `held_out.jsonl` has a line for each set, in the form of `metrics.jsonl`. `score_files` keeps the
  two alike.

Alternatives considered:
- Keys of a step's own line: it is written before the weights after it are scored, and a kill during
  a long evaluation must not cost it.
- Keys of the next step's line: they would stand beside another step, and the last evaluation of a
  run has no next line.
- The step's line once more with its losses: who sums up tokens or seconds counts the step twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from k2train.record.jsonl import NON_FINITE
from k2train.record.line_check import Row
from k2train.record.metrics import SCORES_KEY, Record


@dataclass(frozen=True, kw_only=True)
class SubsetScore:
    """Held-out loss of the rows of one subset, in nats a target."""

    name: str
    loss: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """Held-out loss of a set, in nats a target, and the rows that it is the mean of."""

    name: str
    loss: float
    rows: int
    rows_left_out: int
    targets: int
    subsets: tuple[SubsetScore, ...] = ()


@dataclass(frozen=True)
class HeldOutRecord(Record):
    """A line of `held_out.jsonl`: a set, scored with the weights after a step."""

    set: str = ""
    loss: float = 0.0
    rows: int = 0
    rows_left_out: int = 0
    targets: int = 0
    subsets: Mapping[str, float] = field(default_factory=dict)
    """Loss by subset."""
    seconds: float | None = None
    """Time that it took, by targets where several sets were scored; None in older files."""

    def row(self) -> Row:
        found = super().row()
        if found["seconds"] is None:
            del found["seconds"]
        return found

    @classmethod
    def of(cls, row: Row) -> Self:
        found = super().of(row)
        parts = {name: NON_FINITE.get(str(loss), loss) for name, loss in found.subsets.items()}
        return replace(found, subsets=parts)

    @classmethod
    def of_score(
        cls, step: int, attempt: int, score: SetScore, seconds: float | None = None
    ) -> "HeldOutRecord":
        """Return the line of a score."""
        return cls(
            step,
            attempt,
            score.name,
            score.loss,
            score.rows,
            score.rows_left_out,
            score.targets,
            {part.name: part.loss for part in score.subsets},
            seconds,
        )


@dataclass(frozen=True)
class ScoresRecord(Record):
    """A line of `metrics.jsonl` that is no step: the held-out losses of the weights after one."""

    held_out: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Set -> `loss`, `rows`, `rows_left_out`, `targets`, `subsets` and `seconds` of its score."""

    @classmethod
    def is_of(cls, row: Row) -> bool:
        return SCORES_KEY in row

    @classmethod
    def of_records(cls, records: Sequence[HeldOutRecord]) -> "ScoresRecord":
        """Return the line of an evaluation, from those of its sets."""
        sets = {}
        for record in records:
            values = record.row()
            sets[record.set] = {key: values[key] for key in values if key not in _OF_LINE}
        return cls(records[0].step, records[0].attempt, sets)

    def records(self) -> list[HeldOutRecord]:
        """Return the lines of its sets. Raises ValueError when they are not scores."""
        if not all(isinstance(values, dict) for values in self.held_out.values()):
            raise ValueError("is not the record of an evaluation")
        return [
            HeldOutRecord.of({"step": self.step, "attempt": self.attempt, "set": name, **values})
            for name, values in self.held_out.items()
        ]


_OF_LINE = ("step", "attempt", "set")


def score_lines(scores: "tuple[SetScore, ...]", own: str) -> list[str]:
    """Describe what the line of a checkpoint does not say: other sets, and the subsets of all.

    `own` is the set whose loss that line has.
    """
    lines = []
    for score in scores:
        parts = [f"{part.name} {part.loss:.4f}" for part in score.subsets]
        by_subset = f"; by subset: {', '.join(parts)}" if len(parts) > 1 else ""
        if score.name != own:
            lines.append(f"held-out set {score.name}: {loss_text(score)}{by_subset}")
        elif by_subset:
            lines.append(f"held-out loss{by_subset.removeprefix(';')}")
    return lines


def loss_text(score: SetScore) -> str:
    """A loss and the rows that it is the mean of: `loss 6.2029 over 44 rows`."""
    left_out = score.rows_left_out
    of = f" of {score.rows + left_out:,}" if left_out else ""
    return f"loss {score.loss:.4f} over {score.rows:,}{of} rows"
