"""Record of held-out scores: what the ledger holds of each set, and the lines of `held_out.jsonl`.

- The file has a line for each set that was scored, in the form of `metrics.jsonl`.

Alternatives considered:
- Keys of `metrics.jsonl`: its line of a step is written before the weights after it are scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from k2train.record.metrics import Record


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

    @classmethod
    def of_score(cls, step: int, attempt: int, score: SetScore) -> "HeldOutRecord":
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
        )


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
