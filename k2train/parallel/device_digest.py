"""State digest on the device: layout-free hash of weights and optimizer states, by torch.

- Each rank sums the rows that only it holds. One all-reduce of two integers per tensor and state
  gives every rank the digests of the whole state, the same in every layout.
- Integer products wrap modulo 2^64 on every device, so a device's digest equals that of a file
  (`k2train.state_digest`).

Alternatives considered:
- Copying the state to the host first: takes as long as a checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.comm_tracker import CommTracker, collective_scope
from k2train.parallel.grid import Axis
from k2train.parallel.host_group import HostGroup
from k2train.parallel.shard_layout import BufferSlot, ShardLayout
from k2train.state_digest import LANES, digest_text, multipliers, state_root

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
BLOCK = {"cpu": 2**15, "cuda": 2**21}
"""Elements at a time.

On a CPU: what its cache holds as 64-bit values. On a device: few launches and little memory.
"""


class Multipliers:
    """Row and column factors of the digest, for up to `rows` x `columns`; one copy per device."""

    def __init__(self, rows: int, columns: int):
        self.host = tuple(
            torch.from_numpy(multipliers(axis, n))
            for axis, n in (("rows", rows), ("columns", columns))
        )
        self._on: dict[torch.device, tuple[Tensor, ...]] = {torch.device("cpu"): self.host}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return (rows [2, n], columns [2, m]), int64, on a device."""
        if device not in self._on:
            self._on[device] = tuple(factors.to(device) for factors in self.host)
        return self._on[device]


@torch.no_grad()
def tensor_sums(values: Tensor, row: int, column: int, factors: Multipliers) -> Tensor:
    """Digest sums, int64 [2], of a block that starts at (`row`, `column`) of its global tensor.

    `values` [n] or [n, ...] is contiguous, fp32 or bf16. `column` counts elements of the global
    row. A block must hold whole rows, or be cut in dimension 1 of two.
    """
    a, b = factors.on(values.device)
    total = torch.zeros(LANES, dtype=torch.int64, device=values.device)
    if values.numel() == 0:
        return total

    bits = values.detach().view(BITS[values.dtype]).reshape(values.shape[0], -1)
    # Blocks keep the 64-bit copy small.
    rows, width = bits.shape
    block = BLOCK.get(values.device.type, BLOCK["cuda"])
    across, down = min(width, block), max(1, block // width)

    for top in range(0, rows, down):
        height = min(down, rows - top)
        for left in range(0, width, across):
            wide = bits[top : top + height, left : left + across].long()
            for lane in range(LANES):
                sums = (wide * b[lane].narrow(0, column + left, wide.shape[1])).sum(dim=1)
                total[lane] += (sums * a[lane].narrow(0, row + top, height)).sum()

    return total


class StateDigest:
    """Digests of the parameter slices of one `ShardLayout`.

    - `names`: all global tensors of the model, in one order.
    - `states`: the optimizer's states of each.
    - `tp`: the tensor-parallel axis, over which a whole tensor is counted once.
    """

    def __init__(
        self, shard_layout: ShardLayout, names: Sequence[str], states: Sequence[str], tp: Axis
    ):
        self.shard_layout, self.names, self.states, self.tp = (
            shard_layout,
            tuple(names),
            tuple(states),
            tp,
        )
        self.keys = [f"{name}.{state}" for name in self.names for state in self.states]
        """NAME.state of each row of `sums`."""
        self._index = {name: index for index, name in enumerate(self.names)}
        shapes = [slot.param_slice.global_shape for slot in shard_layout.slots]
        self._factors = Multipliers(
            max((shape[0] for shape in shapes), default=1),
            max((prod(shape[1:]) for shape in shapes), default=1),
        )

    def sums(self, shards: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's sums, int64 [names * states, 2], rows as in `keys`.

        `shards` are fp32 [elements] by state. Tensors counted by other ranks are 0. The (wrapping)
        sum over all ranks is the input of `digests`.
        """

        device = shards[self.states[0]].device
        found = torch.zeros(
            len(self.names), len(self.states), LANES, dtype=torch.int64, device=device
        )

        for slot in self.shard_layout.slots:
            # A tensor that every tensor-parallel rank holds whole is counted once.
            if slot.param_slice.dim is None and self.tp.rank != 0:
                continue
            for number, state in enumerate(self.states):
                row, column = self._origin(slot)
                block = self.shard_layout.local(shards[state], slot)
                found[self._index[slot.param_slice.name], number] = tensor_sums(
                    block, row, column, self._factors
                )

        return found.view(-1, LANES)

    def _origin(self, slot: BufferSlot) -> tuple[int, int]:
        """Row and column of this rank's first element in the global tensor."""
        param_slice, (first, _) = slot.param_slice, slot.rows(self.shard_layout.dp)
        if param_slice.dim in (None, 0):
            return (0 if param_slice.dim is None else param_slice.start) + first, 0
        assert param_slice.dim == 1, f"{param_slice.name}: split in dimension {param_slice.dim}"
        return first, param_slice.start * prod(param_slice.global_shape[2:])

    def digests(self, summed: Tensor) -> dict[str, str]:
        """Return {NAME.state: 32 hexadecimal digits} from all ranks' sum [names * states, 2]."""
        return {
            key: digest_text(pair) for key, pair in zip(self.keys, summed.tolist(), strict=True)
        }


@dataclass(frozen=True)
class StateRoot:
    """Root of a state and the digests it is made of; the same on every rank."""

    root: str
    digests: Mapping[str, str]
    """{NAME.state: digest}."""
    local_sums: Tensor
    """This rank's sums, int64 [names * states, 2], to be kept by `StateAudit`."""


class RootAllReduce:
    """Computes the root of the whole state with one all-reduce of host tensors.

    `group` is that of all ranks for host tensors; None: the default group, which is one on a CPU.
    """

    def __init__(
        self,
        digest: StateDigest,
        group: HostGroup | None = None,
        comm: CommTracker | None = None,
    ) -> None:
        self.digest, self.comm = digest, comm
        self._all_reduce = dist.all_reduce if group is None else group.all_reduce

    def __call__(self, shards: Mapping[str, Tensor], step: int, adam_steps: int) -> StateRoot:
        """Return the root of fp32 `shards` by state, on every rank. Collective."""
        local_sums = self.digest.sums(shards)
        # On the host, where they are read: a group of devices would need a communicator for this.
        summed = local_sums.to("cpu", copy=True)
        with collective_scope(self.comm, "all-reduce of the root of the state"):
            self._all_reduce(summed)
        digests = self.digest.digests(summed)
        return StateRoot(state_root(digests, step, adam_steps), digests, local_sums)


class StateAudit:
    """State audit: detect changes to the optimizer's flat shards between two updates.

    - Shards have no replica to compare with. Their sums are kept after an update
      (`StateRoot.local_sums`, no second pass) and computed again before the next one. Nothing may
      write in between.
    - Tensors that several tensor-parallel ranks hold whole are audited on the first of them.
      `replica_check` compares the others with it.
    """

    def __init__(
        self,
        digest: StateDigest,
        group: HostGroup | None = None,
        comm: CommTracker | None = None,
    ) -> None:
        self.digest, self.comm = digest, comm
        self._all_reduce = dist.all_reduce if group is None else group.all_reduce
        self._kept: Tensor | None = None

    def keep(self, sums: Tensor) -> None:
        """Remember `StateDigest.sums` of the current shards. Call on all ranks or on none."""
        self._kept = sums

    def forget(self) -> None:
        """Forget the sums before a legitimate write (loading a checkpoint)."""
        self._kept = None

    def problem(self, shards: Mapping[str, Tensor]) -> str | None:
        """Return one line naming what changed on which rank since `keep`, or None; the same on all.

        Collective.

        Without kept sums the result is None and nothing is communicated. Forgets the sums.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            return None

        # For each row the rank that found a change, counted from 1. The highest rank is reported.
        found_here = (self.digest.sums(shards) != kept).any(dim=1).cpu()
        changed = found_here.long() * (dist.get_rank() + 1)

        with collective_scope(self.comm, "all-reduce of changes of the state"):
            self._all_reduce(changed, op=dist.ReduceOp.MAX)

        found = [
            (key, rank - 1)
            for key, rank in zip(self.digest.keys, changed.tolist(), strict=True)
            if rank
        ]
        if not found:
            return None

        key, rank = found[0]
        more = f"; {len(found) - 1} more changed" if len(found) > 1 else ""
        return f"{key} on rank {rank} changed between two updates, when nothing writes it{more}"
