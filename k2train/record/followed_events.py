"""Ledger events on checkpoints and restarts: the two steps after a checkpoint, and resume drills.

- A manifest is hashed before the next step begins, so its two steps are an event that names the
  manifest's hash. The ledger's chain protects them as it protects the checkpoint.
- Numbers are written with all their digits: a float in JSON is read back to the same bits.

Alternatives considered:
- Keys of the manifest: it would change after other files and other runs have recorded its hash.
- A file beside the manifest: it can be lost or swapped, and is then no evidence.
"""

from dataclasses import dataclass
from typing import Any

from k2train.record.event import Event


@dataclass(frozen=True, kw_only=True)
class FollowedStep:
    """A step after a checkpoint: what it read, the rate it used, and what came out.

    `applied` is false for a step whose update was skipped: its numbers count all the same.
    """

    step: int
    chunk: str
    rows: tuple[int, int]
    ids: str
    lr: float
    loss: float
    grad_norm: float
    applied: bool


class CheckpointFollowed(Event, name="checkpoint_followed"):
    """The first steps that were trained from the state of a checkpoint, two unless the run ended.

    `setting` is what their bits depend on: layout, kernels, versions and machine. `config`
    is a digest of what the run computes.
    """

    attempt: int
    checkpoint: str
    manifest_sha256: str
    setting: dict[str, Any]
    config: str
    steps: tuple[FollowedStep, ...]


class ResumeDrilled(Event, name="resume_drilled"):
    """The first steps from a loaded checkpoint were compared with those on record.

    `bits`: whether they had to be equal to the bit; otherwise `changed` says what is another.
    `same`: whether they are, or within the bound of rounding; `difference` is the first one.
    `reloaded`: whether the run loaded a checkpoint that it had just saved.
    """

    attempt: int
    checkpoint: str
    manifest_sha256: str
    setting: dict[str, Any]
    reloaded: bool
    steps: int
    bits: bool
    changed: tuple[str, ...]
    same: bool
    difference: str | None = None
