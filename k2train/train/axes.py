"""Communication of an engine's axes: what `auto` means on the devices of a run.

- Overlap and gathering again follow from the device type, symmetric memory from what the ranks'
  devices can read.
- Every rank decides alike: about symmetric memory they agree, since each sees its own machine only.
"""

from dataclasses import replace

from k2train.model.kernels.select import Kernels
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.parallel.symmetric_memory import shared_problem
from k2train.train.setup import Setup


def axes_of(setup: Setup, grid: ProcessGrid, connected: bool = False) -> tuple[Axis, Axis]:
    """Return this rank's (tensor, data) axes with the configured communication.

    `connected`: the tensor-parallel ranks can use symmetric memory, which `auto` then does.
    """
    symmetric = setup.config.parallel.symmetric_memory
    overlap = setup.overlap(grid.device.type)
    tp = replace(
        grid.tp,
        sequence=setup.sequence,
        overlap=overlap,
        regather=setup.regather(grid.device.type),
        symmetric=connected if symmetric == "auto" else symmetric,
    )
    return tp, replace(grid.dp, overlap=overlap)


def unconnected(setup: Setup, grid: ProcessGrid, kernels: Kernels) -> str:
    """Say why `parallel.symmetric_memory: auto` is off; "" where it is on, or was not asked.

    Collective on a CUDA device.
    """
    if setup.config.parallel.symmetric_memory != "auto":
        return ""
    return shared_problem(grid, setup.sequence, kernels.product is None)
