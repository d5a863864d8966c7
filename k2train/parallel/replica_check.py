"""Replica check: verify that replicated weights are identical, and name the rank that differs.

- Compares weights over data-parallel ranks, and whole tensors over tensor-parallel ranks.
- Each rank digests its weights in use, and its own rows of the master weights rounded to the
  weights' dtype. The latter, summed over data-parallel ranks, is the digest that every copy must
  have. So one small sum finds a copy that differs, and also which one, even with two copies.
- Tensors that each tensor-parallel rank holds whole (norms) have replicated optimizer states too.
  Nothing else tells those apart: of three or more the odd one is named, of two both.
- Must run between the backward pass and the update. Every step rewrites the weights from the master
  weights, so after the update a damaged copy is gone and only its gradient is left.
- Ranks exchange texts only when something differs, and then all draw the same conclusion.

Alternatives considered:
- Comparing copies only with one another: with two copies that cannot name the damaged one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from k2train.parallel.agreement import Agreement
from k2train.parallel.collectives import all_gather, all_reduce
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.device_digest import Multipliers, tensor_sums
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.parallel.shard_layout import BufferSlot, ShardLayout
from k2train.plan.layout import Layout
from k2train.state_digest import digest_text

MASTER = "master"
SHOWN = 3


@dataclass(frozen=True)
class ReplicaReport:
    """One rank's report about its copy of one tensor."""

    used: str
    """Digest of the weights in use."""
    expected: str
    """Digest of the rounded master weights, over all rows."""
    own_rows: bool
    """Whether this rank's own rows in use equal its rounded master weights."""
    finite: bool
    states: Mapping[str, str] | None = None
    """Digests of the optimizer's states, where other tensor-parallel ranks hold the same rows."""


_REPORTS = TypeAdapter(dict[str, ReplicaReport])


class ReplicaCheck:
    """Replica check for the parameters of one `ShardLayout`."""

    def __init__(self, shard_layout: ShardLayout, grid: ProcessGrid):
        self.shard_layout, self.grid = shard_layout, grid
        shapes = [slot.param_slice.shape for slot in shard_layout.slots]
        rows, columns = (max((n for n in sizes), default=1) for sizes in _sizes(shapes))
        self._factors = Multipliers(max(rows, 1), max(columns, 1))
        self._whole = [
            slot for slot in shard_layout.slots if slot.param_slice.dim is None and grid.tp.size > 1
        ]

    @torch.no_grad()
    def problem(self, shards: Mapping[str, Tensor]) -> str | None:
        """Return one line naming tensor and rank, or None; the same on every rank. Collective.

        `shards` are the optimizer's flat shards, fp32 [elements] by state. All weights must have
        arrived (`optimizer.finish`).
        """
        used, finite, expected = self._weight_digests(shards[MASTER])
        states, equal = self._state_digests(shards)
        wrong = (used != expected).any(dim=1) | ~finite

        named = {
            slot.param_slice.name
            for slot, bad in zip(self.shard_layout.slots, wrong.tolist(), strict=True)
            if bad
        }
        named |= {
            slot.param_slice.name
            for slot, same in zip(self._whole, equal.tolist(), strict=True)
            if not same
        }

        # One number decides whether ranks need to exchange any text.
        flag = torch.tensor([len(named)], dtype=torch.int64)
        with collective_scope(self.grid.comm, "all-reduce of differing copies"):
            self.grid.host.all_reduce(flag, op=dist.ReduceOp.MAX)

        if not int(flag):
            return None

        agreement = Agreement(self.grid)
        told = agreement.all(sorted(named), TEXTS, "all-gather of differing tensors")
        differing = {name for names in told for name in names}

        own_reports = {}
        for number, slot in enumerate(self.shard_layout.slots):
            if slot.param_slice.name in differing:
                own_reports[slot.param_slice.name] = ReplicaReport(
                    digest_text(used[number].tolist()),
                    digest_text(expected[number].tolist()),
                    self._own_rows(slot, shards[MASTER]),
                    bool(finite[number]),
                    states.get(slot.param_slice.name),
                )

        copies = agreement.all(own_reports, _REPORTS, "all-gather of digests of copies")
        return diagnose_replicas(copies, self.grid.layout)

    def _weight_digests(self, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digests of the weights in use [slots, 2], finite or not [slots], expected digests."""
        count, device = len(self.shard_layout.slots), master.device
        used, expected = (torch.zeros(count, 2, dtype=torch.int64, device=device) for _ in range(2))
        finite = torch.ones(count, dtype=torch.bool, device=device)

        for number, slot in enumerate(self.shard_layout.slots):
            weights = slot.param_slice.of(slot.parameter.data)
            used[number] = tensor_sums(weights, 0, 0, self._factors)
            if weights.numel():
                # One NaN makes both extremes NaN: one pass, no mask.
                finite[number] = torch.stack(torch.aminmax(weights)).isfinite().all()
            rounded = self.shard_layout.local(master, slot).to(weights.dtype)
            expected[number] = tensor_sums(
                rounded, slot.rows(self.shard_layout.dp)[0], 0, self._factors
            )

        return used, finite, all_reduce(expected, self.shard_layout.dp)

    def _state_digests(
        self, shards: Mapping[str, Tensor]
    ) -> tuple[dict[str, dict[str, str]], Tensor]:
        """Digests of tensors held whole by tensor-parallel ranks, and whether all agree [tensors].

        The digests are {NAME: {state: digest}}.
        """
        found = torch.zeros(
            len(self._whole), len(shards), 2, dtype=torch.int64, device=self.grid.device
        )

        for number, slot in enumerate(self._whole):
            for index, shard in enumerate(shards.values()):
                found[number, index] = tensor_sums(
                    self.shard_layout.local(shard, slot), 0, 0, self._factors
                )

        if not self._whole:
            return {}, torch.ones(0, dtype=torch.bool)

        gathered = all_gather(found, self.grid.tp).view(self.grid.tp.size, *found.shape)
        texts = {
            slot.param_slice.name: {
                state: digest_text(pair) for state, pair in zip(shards, pairs, strict=True)
            }
            for slot, pairs in zip(self._whole, found.tolist(), strict=True)
        }
        return texts, (gathered == found).all(dim=0).flatten(1).all(dim=1)

    def _own_rows(self, slot: BufferSlot, master: Tensor) -> bool:
        start, stop = slot.rows(self.shard_layout.dp)
        weights = slot.param_slice.of(slot.parameter.data)[start:stop]
        rounded = self.shard_layout.local(master, slot).to(weights.dtype)
        pair = [tensor_sums(values, 0, 0, self._factors) for values in (weights, rounded)]
        return bool((pair[0] == pair[1]).all())


def replica_problem(
    shard_layout: ShardLayout, shards: Mapping[str, Tensor], grid: ProcessGrid
) -> str | None:
    """Return one line naming the first copies that differ, or None. Collective.

    See `ReplicaCheck`.
    """
    return ReplicaCheck(shard_layout, grid).problem(shards)


def _sizes(shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    return [shape[0] for shape in shapes], [prod(shape[1:]) for shape in shapes]


def diagnose_replicas(copies: Sequence[Mapping[str, ReplicaReport]], layout: Layout) -> str | None:
    """Name the wrong copies, given every rank's reports on the tensors in question."""
    found: list[str] = []
    for name in sorted({name for held in copies for name in held}):
        damaged: list[int] = []
        for group in layout.groups("dp"):
            if reports := {rank: copies[rank][name] for rank in group if name in copies[rank]}:
                found += _weight_findings(name, reports, damaged)
        for group in layout.groups("tp"):
            reports = {rank: copies[rank][name] for rank in group if name in copies[rank]}
            if not set(reports) & set(damaged):
                found += _state_findings(name, reports)

    if not found:
        return None

    more = f"; and {len(found) - SHOWN} more findings" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _weight_findings(
    name: str, reports: Mapping[int, ReplicaReport], damaged: list[int]
) -> list[str]:
    """Findings on the weights in use of one data-parallel group.

    Adds the ranks found to `damaged`.
    """
    found = []
    if broken := [rank for rank, copy in reports.items() if not copy.finite]:
        damaged += broken
        found.append(f"weights of {name} are not finite on {_ranks(broken)}")

    # A copy is good when it has the expected digest. Without a good one the majority decides.
    good = [rank for rank, copy in reports.items() if copy.used == copy.expected]
    odd = (
        [rank for rank in reports if rank not in good]
        if good
        else _minority({r: copy.used for r, copy in reports.items()})
    )

    bad_masters = (
        []
        if good
        else [rank for rank, copy in reports.items() if not copy.own_rows and rank not in odd]
    )

    if not (good or odd or bad_masters):
        odd = list(reports)

    for ranks, text in (
        (odd, f"weights of {name} on {{}} are not those of the other copies and of the optimizer"),
        (bad_masters, f"master weights of {name} on {{}} do not round to the weights in use"),
    ):
        if newly := [rank for rank in ranks if rank not in broken]:
            damaged += newly
            found.append(text.format(_ranks(newly)))

    return found


def _state_findings(name: str, reports: Mapping[int, ReplicaReport]) -> list[str]:
    """Findings on optimizer states that the ranks of one tensor-parallel group all hold."""
    held = {rank: copy.states for rank, copy in reports.items() if copy.states is not None}
    found = []
    for state in next(iter(held.values()), {}):
        digests = {rank: states[state] for rank, states in held.items()}
        if len(set(digests.values())) == 1:
            continue
        odd = _minority(digests)
        where = _ranks(odd) if odd else f"one of {_ranks(list(digests))}"
        found.append(f"{name}.{state} on {where} differs from the other copies")
    return found


def _minority(digests: Mapping[int, str]) -> list[int]:
    """Ranks that differ from the majority; none when no value has more than half."""
    (most, count), *_ = Counter(digests.values()).most_common(1)
    return (
        [rank for rank, digest in digests.items() if digest != most]
        if 2 * count > len(digests)
        else []
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
