"""Symmetric-memory matmuls: torch's fused all-gather-matmul and matmul-reduce-scatter.

- Every rank reads the others' blocks directly from their memory, by copies that use no compute
  units. It multiplies each block as it arrives and sends each result block when it is done.
- So a transfer hides behind its own product. Overlap by streams
  (`k2train.parallel.collective_matmul`) hides it behind another product and uses compute units for
  it.
- torch calls these operators experimental, so a run uses them only when `parallel.symmetric_memory`
  is set.

Alternatives considered:
- Transformer Engine's user buffers, Megatron-LM's counterpart: they bring a second communicator.

Source: torch.distributed._symmetric_memory (torch 2.13).
"""

from functools import cache

import torch
import torch.distributed._symmetric_memory
from torch import Tensor

from k2train.errors import ConfigError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import Axis


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
def require_symmetric_memory(ranks: int, sequence: bool, plain_product: bool) -> None:
    """Raise ConfigError when `ranks` of one axis cannot use symmetric memory, naming why."""
    needs = "parallel.symmetric_memory needs"
    if not sequence:
        raise ConfigError(
            f"{needs} parallel.sequence: true: a replicated "
            "activation has no blocks to fuse a product with"
        )

    if not plain_product:
        raise ConfigError(
            f"{needs} kernels.matmul: torch: "
            "the fused products multiply in the dtype of their factors"
        )

    if not hasattr(torch.ops.symm_mem, "fused_matmul_reduce_scatter"):
        raise ConfigError(
            f"{needs} torch.distributed._symmetric_memory, "
            f"torch {torch.__version__} does not have it"
        )

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices < ranks:
        raise ConfigError(
            f"{needs} the {ranks} ranks of parallel.tensor on CUDA devices of one machine, "
            f"{devices} are visible; set it to false"
        )

    for one, other in ((a, b) for a in range(devices) for b in range(devices) if a != b):
        if not torch.cuda.can_device_access_peer(one, other):
            raise ConfigError(
                f"{needs} devices that read each other's memory, "
                f"CUDA device {one} cannot read {other}; set it to false"
            )
