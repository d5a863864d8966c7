"""First contact: one small exchange in every group and between pipeline neighbours, before step 1.

- NCCL makes a communicator when a group is first used, and one for each pair that sends and
  receives. Without this, that is inside the first step, and a rank that does not come looks like a
  device that hangs.
- Each exchange has a name in the communication tracker, so the watchdog says which group and which
  rank, within `watch.start_seconds`. What arrives is checked.
- Groups come in the same order on all ranks, then pairs of neighbours in ascending order: no two
  ranks can wait for each other in two of them.
- On gloo the same exchanges run over connections that are there already.

Alternatives considered:
- `device_id` for the default group, which connects at once: see `parallel.grid`.
- A barrier of all ranks: one more communicator, which proves nothing of those that are used.
"""

import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from k2train.errors import UnavailableError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.plan.action import Action

Pair = tuple[int, int]


def neighbours(programs: Iterable[Sequence[Action]]) -> list[Pair]:
    """Return the pairs of pipeline ranks that exchange something in `programs`, ascending."""
    pairs = {
        (min(pp, action.peer), max(pp, action.peer))
        for pp, program in enumerate(programs)
        for action in program
        if action.peer is not None
    }
    return sorted(pairs)


def make_contact(grid: ProcessGrid, pairs: Sequence[Pair]) -> str:
    """Exchange one number in every group of this rank and with its neighbours among `pairs`.

    Collective. Returns a line that says with whom, and in how many seconds. Raises
    UnavailableError when a wrong number arrives.
    """
    began = time.monotonic()
    axes = [axis for axis in (grid.tp, grid.dp, grid.stage, grid.pp) if axis.size > 1]
    for axis in axes:
        _meet(grid, axis)
    own = [pair for pair in pairs if grid.pp.rank in pair]
    for pair in own:
        _pass(grid, pair)

    if not axes:
        return "groups: none, this process is alone"
    names = ", ".join(f"{axis.name} {axis.size}" for axis in axes)
    pipeline = f", {len(own)} pipeline neighbour{'s' * (len(own) != 1)}" if own else ""
    return f"first contact of {names}{pipeline}: {time.monotonic() - began:.2f} s"


def _meet(grid: ProcessGrid, axis: Axis) -> None:
    """Sum 1 over an axis."""
    number = torch.ones(1, device=grid.device)
    with collective_scope(grid.comm, f"first contact of {axis.name} ({axis.size} ranks)"):
        dist.all_reduce(number, group=axis.group)
        # Reading it waits for the device.
        found = float(number)
    _check(f"group {axis.name} of {axis.size} ranks", found, float(axis.size))


def _pass(grid: ProcessGrid, pair: Pair) -> None:
    """Send a number from the lower to the upper rank of a pair, and another one back."""
    lower, upper = pair
    what = f"first contact of pipeline ranks {lower} and {upper}"
    for source, target in ((lower, upper), (upper, lower)):
        number = torch.full((1,), float(source + 1), device=grid.device)
        with collective_scope(grid.comm, what):
            if grid.pp.rank == source:
                work = dist.isend(number, group=grid.pp.group, group_dst=target)
            else:
                number.zero_()
                work = dist.irecv(number, group=grid.pp.group, group_src=source)
            assert work is not None, "both ranks are in the group"
            work.wait()
            found = float(number)
        _check(f"pipeline rank {target} from {source}", found, float(source + 1))


def _check(where: str, found: float, expected: float) -> None:
    if found != expected:
        raise UnavailableError(
            f"the first exchange of {where} gave {found:g} instead of {expected:g}: ranks, links "
            "or the communication library are at fault; nothing was trained"
        )
