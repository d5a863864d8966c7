"""Training state of a run besides weights and moments: saved in the manifest, restored from it.

- Each field is a key of the manifest, under the same name. A new item of the state is one field.
- Equal on every rank. What a restart computes anew (data position, learning rate) is no part of it.

Alternatives considered:
- Attributes of the trainer with a save and a load of their own: one that is forgotten shows only
  after a restart.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from k2train.checkpoint.manifest import SaveFacts
from k2train.errors import CheckpointError
from k2train.guard.nonfinite import NonFiniteCounter
from k2train.guard.reaction import Reaction
from k2train.guard.spikes import SpikeAlert
from k2train.json_record import first_mistake

GUARD_KEYS = {"finite": ("in_a_row", "total"), "spikes": ("losses", "log_grads", "open")}
"""Keys of the guards' states that every checkpoint has."""


@dataclass
class Guards:
    """State of the guards that judge each step."""

    finite: NonFiniteCounter = field(default_factory=NonFiniteCounter)
    spikes: SpikeAlert = field(default_factory=SpikeAlert)
    reaction: Reaction = field(default_factory=Reaction)


@dataclass
class TrainState:
    """Training state after `step` steps of this stage."""

    step: int = 0
    adam_steps: int = 0
    """Updates applied to the moments, as far as they are kept, over all stages."""
    loss: float | None = None
    """Loss of the last applied step."""
    parent: dict[str, Any] | None = None
    """The stage before, and how this one took over from it."""
    guard: Guards = field(default_factory=Guards)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's keys, as a reader of the manifest finds them: a tuple is a list."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def of(cls, manifest: SaveFacts) -> Self:
        """Restore the state that was saved with a checkpoint.

        Raises CheckpointError when the manifest does not hold it.
        """
        # A field that is added later may be missing in an older checkpoint. These never are.
        guards = manifest.guard or {}
        missing = [
            f"guard.{name}.{key}"
            for name, keys in GUARD_KEYS.items()
            for key in keys
            if isinstance(part := guards.get(name, {}), dict) and key not in part
        ]
        if manifest.guard is not None and missing:
            raise _no_state(f"{missing[0]} is missing")

        names = {item.name for item in fields(cls)}
        try:
            state = TypeAdapter(cls).validate_python(
                {"guard": None, **manifest.model_dump(include=names, exclude_unset=True)}
            )
        except ValidationError as error:
            raise _no_state(first_mistake(error)) from None
        if problem := state.contradiction():
            raise _no_state(problem)
        return state

    def contradiction(self) -> str:
        """Say which numbers of the state cannot be true together; "" if all can."""
        finite, onset, parent = self.guard.finite, self.guard.spikes.open_since, self.parent or {}
        if not finite.in_a_row <= finite.total <= self.step:
            return (
                f"guard.finite counts {finite.in_a_row} steps in a row and {finite.total} in all, "
                f"of {self.step}"
            )
        if onset is not None and onset > self.step:
            return f"guard.spikes.open.onset ({onset}) is after step {self.step}"

        if problem := self.guard.reaction.contradiction(self.step):
            return problem

        # Moments come from the stage before, with the updates applied to them there.
        before = parent.get("parent_adam_steps", 0) if parent.get("moments_kept", True) else 0
        if self.adam_steps > before + self.step:
            return f"adam_steps ({self.adam_steps}) is more than step ({self.step})" + (
                f" and those of the stage before ({before})" if before else ""
            )
        return ""


def _no_state(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the manifest does not hold the training state: {problem}; it was changed or damaged"
    )
