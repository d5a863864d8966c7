"""Changes by hand in a ledger: those still in effect, what was expected of them, and what came.

- A start from step N undoes the changes made after N or at it, since its checkpoint is older than
  they are, and the outcomes written after N. What it changes itself follows in its own `change`.
- The same change made again without a word keeps the reason and the expectation it had.
- A deferral stays: the order that a run follows is that of all its deferrals.

Alternatives considered:
- Pending expectations in the checkpoint: the ledger has them, and is what a person reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from k2train.expectation import Expectation, parse_expectation
from k2train.record.change_events import Change, Outcome
from k2train.record.event import Event
from k2train.record.events import ChunkDeferred, Entry, Resumed, Started

Stated = Change | ChunkDeferred


@dataclass(frozen=True)
class ByHand:
    """A change by hand, and the outcome of what was expected of it, if there is one yet."""

    event: Stated
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Pending:
    """An expectation without an outcome, stated after `stated_step` in the words `text`."""

    text: str
    expectation: Expectation
    stated_step: int

    def due_step(self, total_steps: int) -> int:
        """Step after which it is measured: at the latest the last one of the stage."""
        return min(self.stated_step + self.expectation.steps, total_steps)


def changes_in_effect(entries: Iterable[Entry]) -> list[ByHand]:
    """Return the changes by hand that no later start has undone, oldest first."""
    found: list[ByHand] = []
    undone: list[Change] = []
    for event in (entry.event for entry in entries):
        if isinstance(event, Started | Resumed):
            step = event.step if isinstance(event, Resumed) else 0
            later = [one.event for one in found if _is_undone(one.event, step)]
            undone = [event for event in later if isinstance(event, Change)]
            found = [_back_to(step, one) for one in found if not _is_undone(one.event, step)]
        elif isinstance(event, Change):
            found.append(ByHand(_with_words_of(event, undone)))
        elif isinstance(event, ChunkDeferred) and (event.why or event.expect):
            found.append(ByHand(event))
        elif isinstance(event, Outcome):
            found = [_answered(one, event) for one in found]
    return found


def pending_expectations(entries: Iterable[Entry]) -> list[Pending]:
    """Return what is expected of the changes in effect, and not measured yet."""
    pending = []
    for one in changes_in_effect(entries):
        text = one.event.expect
        if text is None or one.outcome is not None:
            continue
        try:
            pending.append(Pending(text, parse_expectation(text), one.event.step))
        except ValueError:
            # Of a newer version, or written by hand: it is shown, and never measured.
            continue
    return pending


def unfinished_deferral(entries: Sequence[Entry]) -> int | None:
    """Return the step that the next start goes back to at the latest; None for any.

    That of the deferrals by hand that no start has followed yet.
    """
    steps: list[int] = []
    for event in (entry.event for entry in entries):
        if isinstance(event, Started | Resumed):
            steps = []
        elif isinstance(event, ChunkDeferred):
            steps.append(event.step)
    return min(steps, default=None)


def change_lines(entries: Iterable[Entry]) -> list[str]:
    """Describe the changes in effect and their outcomes, a line each."""
    lines = []
    for one in changes_in_effect(entries):
        event = one.event
        lines.append(f"after step {event.step}: {what_text(event)}; {why_text(event.why)}")
        if one.outcome is not None:
            lines.append(f"  {outcome_text(one.outcome)}")
        elif event.expect is not None:
            lines.append(f"  expected: {event.expect}; not measured yet")
    return lines


def what_text(event: Stated) -> str:
    """Say what a change by hand is."""
    if isinstance(event, ChunkDeferred):
        return f"defer: {event.chunk} moved to position {event.order_index} of the order"
    by_kind: dict[str, list[str]] = {}
    for one in event.changes:
        by_kind.setdefault(one.kind, []).append(f"{one.key} {one.before} -> {one.after}")
    return (
        "; ".join(f"{kind}: {', '.join(found)}" for kind, found in by_kind.items()) or "no change"
    )


def why_text(why: str | None) -> str:
    """Say why a change was made, or that nobody said so."""
    return "no reason given" if why is None else f"why: {why}"


def outcome_text(outcome: Outcome) -> str:
    """Say what was expected, what was measured, and whether that is it."""
    expected = f"expected: {outcome.expect} (after step {outcome.stated_step})"
    if outcome.value is None:
        return f"{expected}; nothing was measured by step {outcome.step}"
    met = "met" if outcome.met else "not met"
    return f"{expected}; {outcome.value:.4f} at step {outcome.measured_step}: {met}"


def _is_undone(event: Event, step: int) -> bool:
    return isinstance(event, Change) and event.step >= step


def _back_to(step: int, one: ByHand) -> ByHand:
    """The same after a start from `step`, which undoes a later outcome."""
    later = one.outcome is not None and one.outcome.step > step
    return replace(one, outcome=None) if later else one


def _with_words_of(event: Change, undone: Iterable[Change]) -> Change:
    """The change with the reason and the expectation of the same one before, if it has none."""
    if event.why is not None or event.expect is not None or not event.changes:
        return event
    same = [one for one in undone if (one.step, one.changes) == (event.step, event.changes)]
    return replace(event, why=same[-1].why, expect=same[-1].expect) if same else event


def _answered(one: ByHand, outcome: Outcome) -> ByHand:
    asked = (one.event.expect, one.event.step)
    return replace(one, outcome=outcome) if asked == (outcome.expect, outcome.stated_step) else one
