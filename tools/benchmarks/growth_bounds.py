"""Rows of the growth bench, and how fast each may grow with the number of ranks.

- 0 does not grow, 1 grows like the world; the reason stands beside the exponent.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Bound(NamedTuple):
    """How fast a row may grow, and why."""

    exponent: float
    why: str


NONE, ROOT, LINEAR = 0.0, 0.5, 1.0
BOUNDS: Mapping[tuple[str, str], Bound] = {
    ("groups of a rank", "groups"): Bound(NONE, "its own only"),
    ("groups of a rank", "bytes held"): Bound(LINEAR, "torch keeps a table of the ranks"),
    ("connections of a rank", "sockets"): Bound(ROOT, "rows of host groups"),
    ("meeting, all ranks", "reads of the store"): Bound(1.5, "each rank its own row"),
    ("nothing is wrong", "messages"): Bound(NONE, "one number is reduced"),
    ("nothing is wrong", "bytes"): Bound(NONE, "one number is reduced"),
    ("a table that ranks share", "bytes"): Bound(NONE, "sent once for each that differs"),
    ("chunk opened, a rank", "bytes"): Bound(NONE, "four numbers"),
    ("chunk opened, rank 0", "bytes"): Bound(LINEAR, "rank 0 compares all"),
    ("exchange of a step", "messages"): Bound(NONE, "over the stage, over stages"),
    ("exchange of a step", "bytes"): Bound(LINEAR, "8 bytes a rank: who is slow"),
    ("who is slow, rank 0", "ranks"): Bound(LINEAR, "rank 0 compares all"),
    ("save, side files of a rank", "bytes"): Bound(NONE, "its own blocks"),
    ("save, facts of files, rank 0", "bytes"): Bound(LINEAR, "two hashes a file"),
    ("save, manifest, rank 0", "bytes"): Bound(LINEAR, "two hashes a file"),
    ("start, manifest alone", "bytes"): Bound(ROOT, "one line for 512 files"),
    ("start, a rank reads", "files"): Bound(NONE, "its own"),
    ("start, a rank reads", "bytes"): Bound(NONE, "its own"),
    ("start, a rank, other layout", "bytes"): Bound(ROOT, "a few neighbours"),
    ("start, rank 0 reads", "bytes"): Bound(LINEAR, "rank 0 compares all names"),
    ("heartbeats, start", "files"): Bound(NONE, "ranks of the same machine"),
    ("heartbeats, after a failure", "files"): Bound(LINEAR, "at most 500 a second a rank"),
    ("order of the data", "bytes held"): Bound(NONE, "names and rows of chunks"),
    ("rows of a step, a rank", "rows"): Bound(NONE, "its share"),
    ("rendezvous of launchers", "bytes"): Bound(LINEAR, "torch's own, a list of nodes"),
}
"""Every row by part and unit."""
