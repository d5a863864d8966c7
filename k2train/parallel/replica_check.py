"""Whether copies that must be equal are: weights over data-parallel ranks, whole tensors over tensor-parallel ones.

Each rank makes a digest of its weights as the forward pass reads them, and one of its own rows of the master weights,
rounded to the weights' dtype. The latter, added up over data-parallel ranks, is the digest that every copy must have: so
one small sum shows a copy that differs, and also which one, be there only two of them. Of tensors that each tensor-parallel
rank holds whole (norms) the optimizer's states are copies too; nothing else tells those apart, so of three or more the
odd one is named, and of two both. Refused: comparing copies with one another only, which with two cannot say who.

Every step writes the weights anew from the master weights. So this must be asked between the backward pass and the update:
after it, a damaged copy is gone and only its gradient is left.

Only when something differs do ranks tell each other in words, and all of them then draw the same conclusion.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.collectives import all_gather, all_reduce
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.device_digest import Multipliers, tensor_sums
from k2train.parallel.grad_buffer import BufferSlot, ShardLayout
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from k2train.state_digest import digest_text

MASTER = "master"
SHOWN = 3


@dataclass(frozen=True)
class Copy:
    """What one rank says of its copy of one tensor."""

    used: str
    """Digest of the weights in use."""
    wanted: str
    """Digest of the rounded master weights, of all rows."""
    own_rows: bool
    """Whether this rank's own rows in use are its rounded master weights."""
    finite: bool
    states: Mapping[str, str] | None = None
    """Digests of the optimizer's states, where other tensor-parallel ranks hold the same rows."""


class ReplicaCheck:
    """The comparison for the parameters of one `ShardLayout`."""

    def __init__(self, table: ShardLayout, grid: ProcessGrid):
        self.table, self.grid = table, grid
        shapes = [slot.piece.shape for slot in table.slots]
        rows, columns = (max((n for n in sizes), default=1) for sizes in _sizes(shapes))
        self._factors = Multipliers(max(rows, 1), max(columns, 1))
        self._whole = [slot for slot in table.slots if slot.piece.dim is None and grid.tp.size > 1]

    @torch.no_grad()
    def problem(self, lines: Mapping[str, Tensor]) -> str | None:
        """One line naming tensor and rank, or None; collective, the same on every rank.

        `lines` are the optimizer's, fp32 [elements] by state. All weights must have arrived (`optimizer.finish`).
        """
        used, finite, wanted = self._weights(lines[MASTER])
        states, equal = self._states(lines)
        wrong = (used != wanted).any(dim=1) | ~finite
        named = {
            slot.piece.name
            for slot, bad in zip(self.table.slots, wrong.tolist(), strict=True)
            if bad
        }
        named |= {
            slot.piece.name
            for slot, same in zip(self._whole, equal.tolist(), strict=True)
            if not same
        }
        flag = torch.tensor([len(named)], dtype=torch.int64, device=self.grid.device)
        with collective_scope(self.grid.comm, "all-reduce of differing copies"):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not int(flag):
            return None
        told: list[set[str]] = [set() for _ in range(self.grid.layout.world_size)]
        with collective_scope(self.grid.comm, "all-gather of differing tensors"):
            dist.all_gather_object(told, named, group=self.grid.host)
        suspects = set().union(*told)
        mine = {}
        for number, slot in enumerate(self.table.slots):
            if slot.piece.name in suspects:
                mine[slot.piece.name] = Copy(
                    digest_text(used[number].tolist()),
                    digest_text(wanted[number].tolist()),
                    self._own_rows(slot, lines[MASTER]),
                    bool(finite[number]),
                    states.get(slot.piece.name),
                )
        copies: list[dict[str, Copy]] = [{} for _ in told]
        with collective_scope(self.grid.comm, "all-gather of digests of copies"):
            dist.all_gather_object(copies, mine, group=self.grid.host)
        return conclusion(copies, self.grid.layout)

    def _weights(self, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each slot: digest of the weights in use [slots, 2], whether they are finite [slots], digest wanted."""
        count, device = len(self.table.slots), master.device
        used, wanted = (torch.zeros(count, 2, dtype=torch.int64, device=device) for _ in range(2))
        finite = torch.ones(count, dtype=torch.bool, device=device)
        for number, slot in enumerate(self.table.slots):
            weights = slot.piece.of(slot.parameter.data)
            used[number] = tensor_sums(weights, 0, 0, self._factors)
            if weights.numel():
                # Of values of which one is not a number neither extreme is: one pass, no mask.
                finite[number] = torch.stack(torch.aminmax(weights)).isfinite().all()
            rounded = self.table.local(master, slot).to(weights.dtype)
            wanted[number] = tensor_sums(rounded, slot.rows(self.table.dp)[0], 0, self._factors)
        return used, finite, all_reduce(wanted, self.table.dp)

    def _states(self, lines: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], Tensor]:
        """Of what tensor-parallel ranks hold whole: {NAME: {state: digest}}, and whether all of them agree [tensors]."""
        found = torch.zeros(
            len(self._whole), len(lines), 2, dtype=torch.int64, device=self.grid.device
        )
        for number, slot in enumerate(self._whole):
            for place, line in enumerate(lines.values()):
                found[number, place] = tensor_sums(
                    self.table.local(line, slot), 0, 0, self._factors
                )
        if not self._whole:
            return {}, torch.ones(0, dtype=torch.bool)
        everyone = all_gather(found, self.grid.tp).view(self.grid.tp.size, *found.shape)
        texts = {
            slot.piece.name: {
                state: digest_text(pair) for state, pair in zip(lines, pairs, strict=True)
            }
            for slot, pairs in zip(self._whole, found.tolist(), strict=True)
        }
        return texts, (everyone == found).all(dim=0).flatten(1).all(dim=1)

    def _own_rows(self, slot: BufferSlot, master: Tensor) -> bool:
        start, stop = slot.rows(self.table.dp)
        weights = slot.piece.of(slot.parameter.data)[start:stop]
        rounded = self.table.local(master, slot).to(weights.dtype)
        pair = [tensor_sums(values, 0, 0, self._factors) for values in (weights, rounded)]
        return bool((pair[0] == pair[1]).all())


def replica_problem(
    table: ShardLayout, lines: Mapping[str, Tensor], grid: ProcessGrid
) -> str | None:
    """One line naming the first tensors and ranks whose copies differ, None when all agree; see `ReplicaCheck`."""
    return ReplicaCheck(table, grid).problem(lines)


def _sizes(shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    return [shape[0] for shape in shapes], [prod(shape[1:]) for shape in shapes]


def conclusion(copies: Sequence[Mapping[str, Copy]], layout: Layout) -> str | None:
    """Who is wrong, from what every rank (the index) says of its copies of the tensors in question."""
    found: list[str] = []
    for name in sorted({name for held in copies for name in held}):
        accused: list[int] = []
        for group in layout.groups("dp"):
            if said := {rank: copies[rank][name] for rank in group if name in copies[rank]}:
                found += _weights_apart(name, said, accused)
        for group in layout.groups("tp"):
            said = {rank: copies[rank][name] for rank in group if name in copies[rank]}
            if not set(said) & set(accused):
                found += _states_apart(name, said)
    if not found:
        return None
    more = f"; and {len(found) - SHOWN} more findings" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _weights_apart(name: str, said: Mapping[int, Copy], accused: list[int]) -> list[str]:
    """Findings about the weights in use of one data-parallel group; ranks found are added to `accused`."""
    found = []
    if broken := [rank for rank, copy in said.items() if not copy.finite]:
        accused += broken
        found.append(f"weights of {name} are not finite on {_ranks(broken)}")
    good = [rank for rank, copy in said.items() if copy.used == copy.wanted]
    odd = (
        [rank for rank in said if rank not in good]
        if good
        else _odd({r: copy.used for r, copy in said.items()})
    )
    rotten = (
        []
        if good
        else [rank for rank, copy in said.items() if not copy.own_rows and rank not in odd]
    )
    if not (good or odd or rotten):
        odd = list(said)
    for ranks, text in (
        (odd, f"weights of {name} on {{}} are not those of the other copies and of the optimizer"),
        (rotten, f"master weights of {name} on {{}} do not round to the weights in use"),
    ):
        if told := [rank for rank in ranks if rank not in broken]:
            accused += told
            found.append(text.format(_ranks(told)))
    return found


def _states_apart(name: str, said: Mapping[int, Copy]) -> list[str]:
    """Findings about what the ranks of one tensor-parallel group all hold of a tensor."""
    held = {rank: copy.states for rank, copy in said.items() if copy.states is not None}
    found = []
    for state in next(iter(held.values()), {}):
        digests = {rank: states[state] for rank, states in held.items()}
        if len(set(digests.values())) == 1:
            continue
        odd = _odd(digests)
        told = _ranks(odd) if odd else f"one of {_ranks(list(digests))}"
        found.append(f"{name}.{state} on {told} differs from the other copies")
    return found


def _odd(digests: Mapping[int, str]) -> list[int]:
    """The ranks that differ from more than half of all; none where there is no such half."""
    (most, count), *_ = Counter(digests.values()).most_common(1)
    return (
        [rank for rank, digest in digests.items() if digest != most]
        if 2 * count > len(digests)
        else []
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
