"""Comparison of a replay with the record: step by step, root by root, and the state at its end.

- Where the setting is that of the run, every bit is compared. Pipeline degree, schedule and stages
  change no bit, so they may differ. Under `run.exact` neither do data degree and micro-batches.
- Otherwise losses and norms are compared within the bound of rounding, and the tensors of the end
  within `STATE_BOUND`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from k2train.parallel.device_digest import StateRoot
from k2train.record.followed_events import FollowedStep
from k2train.record.jsonl import json_value
from k2train.record.metrics import RootRecord, StepRecord
from k2train.replay.session import Distance
from k2train.state_digest import short_digests
from k2train.train.followed import changed_facts, step_difference
from k2train.train.rounding import Rounding
from k2train.train.state import TrainState

NO_BIT = {"pipeline", "schedule", "stages_per_rank", "layers_per_stage"}
"""Facts of a setting that change no bit."""
EXACT_NO_BIT = {*NO_BIT, "data", "micro_sequences", "bucket_bytes", "threads"}
"""The same under `run.exact`, which computes with one thread."""
SHOWN = 3


def what_changes_bits(
    trained: Mapping[str, str], replay: Mapping[str, str], exact: bool
) -> tuple[str, ...]:
    """Facts in which two settings differ, and which may change bits."""
    without = EXACT_NO_BIT if exact else NO_BIT
    before, now = (
        {key: value for key, value in facts.items() if key not in without}
        for facts in (trained, replay)
    )
    return changed_facts(before, now)


def recorded_step(row: StepRecord) -> FollowedStep:
    """Return a metrics row as a step to compare with."""
    first, last = (*row.rows, 0, 0)[:2]
    return FollowedStep(
        step=row.step,
        chunk=row.chunk,
        rows=(first, last),
        ids=row.ids or "",
        lr=row.lr,
        loss=row.loss,
        grad_norm=row.grad_norm,
        applied=row.applied,
    )


@dataclass
class Differences:
    """What a replay found: differences in the order of the steps, and how far apart numbers are."""

    steps: int = 0
    roots: int = 0
    found: list[tuple[int, str]] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "grad_norm": 0.0})

    def step(
        self, before: FollowedStep, now: FollowedStep, after: int, rounding: Rounding | None
    ) -> None:
        """Compare a step, number `after` from the checkpoint; None: every bit of it."""
        self.steps += 1
        if not before.ids:
            # Written by a version that recorded none.
            now = FollowedStep(**{**vars(now), "ids": ""})
        if (before.chunk, before.rows) != (now.chunk, now.rows):
            text = (
                f"read {now.chunk} rows {now.rows[0]}-{now.rows[1] - 1}, recorded {before.chunk} "
                f"rows {before.rows[0]}-{before.rows[1] - 1}"
            )
            self.found.append((now.step, f"step {now.step} {text}"))
            return
        for name in self.largest:
            was, found = getattr(before, name), getattr(now, name)
            if was == was and found == found and was:
                self.largest[name] = max(self.largest[name], abs(found - was) / abs(was))
        if problem := step_difference(before, now, after, rounding):
            self.found.append((now.step, f"step {now.step} {problem}"))

    def metrics(self, row: StepRecord, tokens: int, update_norm: float | None) -> None:
        """Compare what a metrics row says besides the numbers of the step.

        Older files lack some of them; a norm that may not be the same bits is None.
        """
        for name, was, now in (
            ("consumed_tokens", row.consumed_tokens or tokens, tokens),
            ("update_norm", row.update_norm, update_norm),
        ):
            if was is not None and now is not None and was != now:
                self.found.append((row.step, f"step {row.step} has {name} {now}, recorded {was}"))

    def root(self, step: int, recorded: Mapping[str, str], now: StateRoot, root: str) -> None:
        """Compare the root after a step; `recorded` are short digests of its tensors, if known."""
        self.roots += 1
        mine = short_digests(now.digests)
        apart = [name for name in mine if recorded and recorded.get(name) != mine[name]]
        if root == now.root and not apart:
            return
        more = f" and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
        what = f": {', '.join(apart[:SHOWN])}{more} differ" if apart else ""
        self.found.append(
            (step, f"step {step} has state root {now.root[:16]}, recorded {root[:16]}{what}")
        )

    def tensors(
        self, step: int, name: str, distances: list[Distance], bounds: Mapping[str, float]
    ) -> None:
        """Compare the tensors of checkpoint `name`; `bounds` are relative, by state."""
        far = [
            part
            for part in distances
            if not part.relative <= bounds.get(part.name.rpartition(".")[2], 0.0)
        ]
        far.sort(key=lambda part: -part.relative)
        for part in far[:SHOWN]:
            self.found.append(
                (
                    step,
                    f"{name}: {part.name} is {part.relative:.3g} (relative) from the recorded one, "
                    f"an element at most {part.largest:.3g}",
                )
            )

    def training_state(
        self, step: int, name: str, recorded: TrainState, now: TrainState, alone: bool
    ) -> None:
        """Compare what a checkpoint keeps besides tensors.

        `alone`: one start did all steps and saved both ends. Another one tells its spike guard of
        itself, which the steps do not show.
        """
        self.found += [
            (step, f"{name}: {key} of the training state is another than the steps make")
            for key in training_state_differences(recorded, now, alone)
        ]


def training_state_differences(
    recorded: TrainState, now: TrainState, alone: bool = True
) -> list[str]:
    """Names of what differs in two training states: counts, last loss and guards."""
    known, mine = recorded.to_json(), now.to_json()
    for state in (known, mine):
        # What a policy has begun is decided by the run, not by its steps.
        state["guard"].pop("reaction", None)
        if not alone:
            del state["guard"]["spikes"]
    return [key for key in known if json_value(known[key]) != json_value(mine[key])]


def roots_apart(row: StepRecord, root: RootRecord | None) -> str:
    """Say that the two records of a step's root differ; "" where they do not."""
    if root is None or root.attempt != row.attempt or row.state_root in (None, root.root):
        # The row of another attempt is of a step that was undone.
        return ""
    return (
        f"step {row.step} has state root {str(row.state_root)[:16]} in metrics.jsonl, "
        f"{root.root[:16]} in state_roots.jsonl"
    )


def known_root(row: StepRecord | None, root: RootRecord | None) -> tuple[str, Mapping[str, str]]:
    """Return the recorded root of a step and short digests of its tensors; "" for none."""
    if row is not None and root is not None and root.attempt != row.attempt:
        # Of a step that was undone.
        root = None
    found = (row.state_root if row is not None else None) or (root.root if root else "")
    return found or "", root.tensors if root is not None else {}
