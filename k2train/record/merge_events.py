"""Ledger event of a merge: which checkpoints became which one, with what weights and hashes."""

from dataclasses import dataclass

from k2train.record.event import Event


@dataclass(frozen=True, kw_only=True)
class MergedFrom:
    """A checkpoint that was merged: its path, and what its manifest was then."""

    path: str
    step: int
    weight: float
    manifest_sha256: str
    root: str | None = None


class CheckpointsMerged(Event, name="checkpoints_merged"):
    """Checkpoints became another one, `checkpoint`, a path below the run's directory.

    `weights` is mean, linear or given; `parents` are in the order of the sum.
    """

    checkpoint: str
    step: int
    weights: str
    parents: tuple[MergedFrom, ...]
    bytes: int
    manifest_sha256: str
    root: str
