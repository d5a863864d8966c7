"""Ledger events of changes by hand: what a person changed, why, what it was to bring, what it did.

- `change` is written by the start that makes the change, `outcome` by the run when the time comes.
- A deferral by hand is a `chunk_deferred` with a reason.
"""

from dataclasses import dataclass

from k2train.record.event import Event


@dataclass(frozen=True, kw_only=True)
class KeyChange:
    """A config key that was changed, its values as YAML.

    `kind` is rate (of the schedule), defer (chunks in another order), skip (chunks left out) or
    config.
    """

    kind: str
    key: str
    before: str
    after: str


class Change(Event, name="change"):
    """A start after `step` makes changes by hand; none where only an expectation is stated.

    `why` is run.why, `expect` run.expect. Both are undone by a start from `step` or before.
    """

    attempt: int
    step: int
    changes: tuple[KeyChange, ...]
    why: str | None = None
    expect: str | None = None


class Outcome(Event, name="outcome"):
    """What became of an expectation that was stated after `stated_step`, due after `due_step`.

    - `step` is when it was written, `measured_step` the last one that the value depends on.
    - Without `value` nothing was measured by then, and the expectation is neither met nor missed.
    """

    attempt: int
    step: int
    expect: str
    stated_step: int
    due_step: int
    measured_step: int | None = None
    value: float | None = None
    met: bool | None = None
