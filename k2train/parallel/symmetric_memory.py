"""Products fused with their transfers over symmetric memory: torch's own operators, and whether they can be had.

Every rank reads the others' blocks straight from their memory by copies that take no compute units, multiplies each as it
comes, and sends each block of a result as it is made. So a transfer hides behind its own product, where overlap by streams
(`k2train.parallel.collective_matmul`) hides it behind another one, and takes compute units for it. torch calls the operators
experimental, so a run takes them only when `parallel.symmetric_memory` says so.

Source: torch.distributed._symmetric_memory (torch 2.13); there Megatron-LM's counterpart is Transformer Engine's user
buffers, refused here for the second communicator that they bring.
"""

from functools import cache

import torch
import torch.distributed._symmetric_memory
from torch import Tensor

from k2train.errors import ConfigError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import Axis


def gather_multiply(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """x [n/tp, k], matrix [k, m] -> x of all ranks [n, k], and its product [n, m]."""
    assert axis.group is not None, "an axis of one exchanges nothing"
    with collective_scope(axis.comm, "all-gather in a product tp"):
        whole, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
            x, [matrix], 0, axis.group.group_name, return_A=True
        )
    return whole, y


def multiply_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """x [n, k], matrix [k, m] -> this rank's rows [n/tp, m] of the products' sum over ranks."""
    assert axis.group is not None, "an axis of one exchanges nothing"
    with collective_scope(axis.comm, "reduce-scatter in a product tp"):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x, matrix, "sum", 0, axis.group.group_name
        )


@cache
def require_symmetric_memory(ranks: int, sequence: bool, plain_product: bool) -> None:
    """Raise ConfigError, with what is missing, where `ranks` of one axis cannot exchange so."""
    needs = "parallel.symmetric_memory needs"
    if not sequence:
        raise ConfigError(
            f"{needs} parallel.sequence: true: a replicated activation has no blocks to fuse a product with"
        )
    if not plain_product:
        raise ConfigError(
            f"{needs} kernels.matmul: torch: the fused products multiply in the dtype of their factors"
        )
    if not hasattr(torch.ops.symm_mem, "fused_matmul_reduce_scatter"):
        raise ConfigError(
            f"{needs} torch.distributed._symmetric_memory, torch {torch.__version__} is without it"
        )
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices < ranks:
        raise ConfigError(
            f"{needs} the {ranks} ranks of parallel.tensor on CUDA devices of one machine, {devices} are visible; set it to false"
        )
    for one, other in ((a, b) for a in range(devices) for b in range(devices) if a != b):
        if not torch.cuda.can_device_access_peer(one, other):
            raise ConfigError(
                f"{needs} devices that read each other's memory, CUDA device {one} cannot read {other}; set it to false"
            )
