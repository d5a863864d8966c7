"""Finding of a run's verification, and the names of the files that it reads."""

from collections.abc import Sequence
from typing import NamedTuple

from k2train.record.events import Entry, Event

LEDGER, METRICS, ROOTS, CONFIG = "ledger.jsonl", "metrics.jsonl", "state_roots.jsonl", "config.yaml"
HELD_OUT = "held_out.jsonl"

Entries = Sequence[tuple[int, Entry]]
"""Readable entries of a ledger with their lines."""


class Problem(NamedTuple):
    """One finding; `note` when a kill explains it."""

    text: str
    note: bool = False


def events_of(entries: Entries) -> list[tuple[int, Event]]:
    """Events of the entries, with their lines."""
    return [(line, entry.event) for line, entry in entries]
