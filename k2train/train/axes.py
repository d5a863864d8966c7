"""Communication of an engine's axes: what `auto` means on the devices of a run.

- Overlap and gathering again follow from the device type, symmetric memory from what the ranks'
  devices can read.
- Two to four ranks in host memory that wait for their transfers share memory, where they can; so
  do two ranks of a pipeline.
- Every rank decides alike: about both memories they agree, since each sees its own machine only.
"""

from dataclasses import replace

from k2train.model.kernels.select import Kernels
from k2train.parallel.grid import Axis, ProcessGrid, share_memory
from k2train.parallel.shared_channel import connect_channel
from k2train.parallel.symmetric_memory import shared_problem
from k2train.train.setup import Setup


def axes_of(setup: Setup, grid: ProcessGrid, connected: bool = False) -> tuple[Axis, Axis, Axis]:
    """Return this rank's (tensor, data, pipeline) axes with the configured communication.

    `connected`: the tensor-parallel ranks can use symmetric memory, which `auto` then does.
    Collective over the three axes.
    """
    symmetric = setup.config.parallel.symmetric_memory
    overlap = setup.overlap(grid.device.type)
    tp = replace(
        _shared(setup, grid, grid.tp),
        sequence=setup.sequence,
        overlap=overlap,
        regather=setup.regather(grid.device.type),
        symmetric=connected if symmetric == "auto" else symmetric,
    )
    dp = replace(_shared(setup, grid, grid.dp), overlap=overlap)
    channel = None
    if setup.config.parallel.shared_memory != "off":
        channel = connect_channel(grid.pp.size, grid.pp.rank, grid.pp.group, grid.device)
    return tp, dp, replace(grid.pp, channel=channel)


def _shared(setup: Setup, grid: ProcessGrid, axis: Axis) -> Axis:
    """Connect an axis by shared memory, where its ranks have it and wait for transfers.

    Collective over the axis.
    """
    if setup.config.parallel.shared_memory == "off" or setup.overlap(grid.device.type):
        return axis
    return share_memory(axis, grid.device)


def unconnected(setup: Setup, grid: ProcessGrid, kernels: Kernels) -> str:
    """Say why `parallel.symmetric_memory: auto` is off; "" where it is on, or was not asked.

    Collective on a CUDA device.
    """
    if setup.config.parallel.symmetric_memory != "auto":
        return ""
    return shared_problem(grid, setup.sequence, kernels.product is None)
