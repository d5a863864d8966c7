"""Dry run of all ranks: every send meets its receive, every collective all of its members.

- One rank of each pipeline rank is run at both ends of the tensor and data axes. The ranks between
  run the same program on the same shapes.
- The groups of the whole world are compared: each rank is in the group that its peers name.
- Sends and receives between two stages are compared in order, by bytes; collectives by their kind,
  axis and bytes.

Alternatives considered:
- Running every rank: 480 times the same twelve programs.
"""

from collections.abc import Callable, Sequence

from k2train.config.load import Config
from k2train.plan.layout import Coordinate, Layout
from k2train.train.dry_run import DryRun, dry_run
from k2train.train.dry_trace import Transfer
from k2train.train.setup import Setup

AXES = ("tp", "dp", "pp", "stage")


def dry_run_all(
    config: Config, world_size: int, show: Callable[[str], None] = lambda text: None
) -> tuple[list[DryRun], list[str]]:
    """Run the ranks that stand for all others; also what does not meet, a line each.

    `show` is told what is run. Raises ConfigError.
    """
    layout = Setup.of(config, world_size).layout
    problems = group_problems(layout)
    runs: list[DryRun] = []
    neighbours: list[DryRun] = []
    """The first of each pipeline rank."""
    for pp in range(layout.pipeline):
        corners = sorted({layout.rank(c) for c in _corners(layout, pp)})
        for rank in corners:
            show(f"rank {rank} of {world_size}")
            runs.append(dry_run(config, world_size, rank))
        problems += collective_problems(runs[-len(corners) :])

        neighbours.append(runs[-len(corners)])
    return runs, problems + transfer_problems(neighbours)


def _corners(layout: Layout, pp: int) -> list[Coordinate]:
    """First and last rank of the tensor and data axes at a pipeline rank."""
    return [Coordinate(pp, 0, 0), Coordinate(pp, layout.data - 1, layout.tensor - 1)]


def group_problems(layout: Layout) -> list[str]:
    """Say which rank is in a group that its first rank does not name."""
    problems = []
    for axis in AXES:
        # A group is named by its first rank, and kept once.
        groups: dict[int, range] = {}
        for rank in range(layout.world_size):
            peers = layout.peer_range(rank, axis)
            first = groups.setdefault(peers[0], peers) if rank == peers[0] else groups.get(peers[0])
            if peers != first or rank not in peers:
                problems.append(f"{axis}: rank {rank} is in another group than rank {peers[0]}")
    return problems


def collective_problems(runs: Sequence[DryRun]) -> list[str]:
    """Say where ranks of one pipeline rank call collectives that differ."""
    first, *others = runs
    problems = []
    for run in others:
        mine, theirs = (_collectives(one.transfers) for one in (first, run))
        if mine != theirs:
            at = next(
                (n for n, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(mine), len(theirs)),
            )
            problems.append(
                f"collective {at + 1}: rank {first.rank} calls {_text(mine, at)}, "
                f"rank {run.rank} {_text(theirs, at)}"
            )
    return problems


def transfer_problems(runs: Sequence[DryRun]) -> list[str]:
    """Say which sends and receives of neighbouring pipeline ranks do not meet, in their order."""
    problems = []
    for sender, source in enumerate(runs):
        for receiver, target in enumerate(runs):
            sent = _between(source.transfers, "send", receiver)
            taken = _between(target.transfers, "receive", sender)
            if sent != taken:
                problems.append(
                    f"rank {source.rank} sends {len(sent)} tensors of {sum(sent)} bytes to rank "
                    f"{target.rank}, which receives {len(taken)} of {sum(taken)} bytes"
                )
    return problems


def _between(transfers: Sequence[Transfer], kind: str, peer: int) -> list[int]:
    return [t.num_bytes for t in transfers if (t.kind, t.peer) == (kind, peer)]


def _collectives(transfers: Sequence[Transfer]) -> list[tuple[str, str, int]]:
    return [(t.kind, t.axis, t.num_bytes) for t in transfers if t.peer is None]


def _text(calls: Sequence[tuple[str, str, int]], at: int) -> str:
    if at >= len(calls):
        return "none"
    kind, axis, size = calls[at]
    return f"{kind} {axis} of {size} bytes"
