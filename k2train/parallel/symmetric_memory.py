"""Symmetric-memory matmuls: torch's fused all-gather-matmul and matmul-reduce-scatter.

- Every rank reads the others' blocks directly from their memory, by copies that use no compute
  units. It multiplies each block as it arrives and sends each result block when it is done.
- So a transfer hides behind its own product. Overlap by streams
  (`k2train.parallel.collective_matmul`) hides it behind another product and uses compute units for
  it.
- torch calls these operators experimental, so a run uses them only when `parallel.symmetric_memory`
  is `true`, or `auto` on ranks whose devices read each other's memory.

Alternatives considered:
- Transformer Engine's user buffers, Megatron-LM's counterpart: they bring a second communicator.

Source: torch.distributed._symmetric_memory (torch 2.13).
"""

from functools import cache

import torch
import torch.distributed._symmetric_memory
from torch import Tensor

from k2train.errors import ConfigError
from k2train.parallel.agreement import Agreement
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import Axis, ProcessGrid


def gather_multiply(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Fused all-gather and product over symmetric memory. Collective.

    x [n/tp, k], matrix [k, m] -> x of all ranks [n, k], product [n, m].
    """
    assert axis.group is not None, "an axis of one rank has nothing to exchange"
    with collective_scope(axis.comm, "all-gather in a product tp"):
        whole, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
            x, [matrix], 0, axis.group.group_name, return_A=True
        )
    return whole, y


def multiply_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """Fused product and reduce-scatter over symmetric memory. Collective.

    x [n, k], matrix [k, m] -> this rank's rows [n/tp, m] of the sum over ranks.
    """
    assert axis.group is not None, "an axis of one rank has nothing to exchange"
    with collective_scope(axis.comm, "reduce-scatter in a product tp"):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x, matrix, "sum", 0, axis.group.group_name
        )


@cache
def symmetric_memory_problem(
    ranks: int, sequence: bool, plain_product: bool, first: int = 0
) -> str | None:
    """Say what `ranks` of one axis lack for symmetric memory; None: nothing.

    `first` is the CUDA device of the axis's first rank; the others follow it, so a negative one is
    on another machine.
    """
    if not sequence:
        return (
            "parallel.sequence: true: a replicated activation has no blocks to fuse a product with"
        )

    if not plain_product:
        return "kernels.matmul: torch: the fused products multiply in the dtype of their factors"

    if not hasattr(torch.ops.symm_mem, "fused_matmul_reduce_scatter"):
        return (
            "torch.distributed._symmetric_memory, "
            f"torch {torch.__version__} does not have it; set it to false"
        )

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= first <= devices - ranks:
        return (
            f"the {ranks} ranks of parallel.tensor on CUDA devices of one machine, "
            f"{devices} are visible; set it to false"
        )

    peers = range(first, first + ranks)
    for one, other in ((a, b) for a in peers for b in peers if a != b):
        if not torch.cuda.can_device_access_peer(one, other):
            return (
                "devices that read each other's memory, "
                f"CUDA device {one} cannot read {other}; set it to false"
            )
    return None


def require_symmetric_memory(axis: Axis, plain_product: bool) -> None:
    """Raise ConfigError when the ranks of an axis cannot use symmetric memory, naming why."""
    problem = symmetric_memory_problem(
        axis.size, axis.sequence, plain_product, first_device(axis.rank)
    )
    if problem is not None:
        raise ConfigError(f"parallel.symmetric_memory needs {problem}")


def shared_problem(grid: ProcessGrid, sequence: bool, plain_product: bool) -> str:
    """Say what some rank's tensor-parallel peers lack for symmetric memory; "" if none does.

    Collective on a CUDA device, so that all ranks decide alike.
    """
    if grid.device.type != "cuda" or grid.tp.size == 1:
        return f"{grid.tp.size} ranks of parallel.tensor on {grid.device.type}"
    mine = symmetric_memory_problem(
        grid.tp.size, sequence, plain_product, first_device(grid.tp.rank)
    )
    found = Agreement(grid).first(mine or "", "agreement on symmetric memory")
    return "" if found is None else f"rank {found[0]} needs {found[1].split(';')[0]}"


def first_device(rank: int) -> int:
    """Return the CUDA device of an axis's first rank, from that of this one, the `rank`-th."""
    return torch.cuda.current_device() - rank if torch.cuda.is_available() else 0
