"""Process grid: a Layout plus communication groups and a device.

- Passed as an argument, never global.
- The DeviceMesh has the axes (pp, tp, dp). Tensor precedes data, so that one DTensor describes an
  optimizer shard: tensor-parallel slice first, then rows over data-parallel ranks.
- Ranks are numbered by the Layout (tp innermost).
- A world of one gets a process group too: there is one code path, and `size == 1` turns a
  collective into a no-op.
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from k2train.errors import ConfigError
from k2train.launch.environment import Launch, store_file
from k2train.parallel.comm_tracker import CommTracker
from k2train.plan.layout import Coordinate, Layout


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as seen by this rank. `group` is None when the axis has one member."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    sequence: bool = False
    """For tp: activations between layers are split along the sequence over this axis. False on an
    axis of one rank.
    """
    overlap: bool = False
    """Whether collectives along this axis start ahead of their use and run beside computation."""
    regather: bool = False
    """With `sequence`: keep only this rank's part of a product's input and gather it again in the
    backward pass.
    """
    symmetric: bool = False
    """For tp: fuse products with their collectives over symmetric memory."""
    comm: CommTracker | None = field(default=None, compare=False, repr=False)
    """Counts and names the collectives along this axis."""

    def __str__(self) -> str:
        return f"{self.name} {self.rank}/{self.size}"


SINGLE = {name: Axis(name, 1, 0, None) for name in ("pp", "dp", "tp", "stage")}


class ProcessGrid:
    """Layout, DeviceMesh and device of this process.

    Axes: `tp`, `dp`, `pp`, and `stage` (tp x dp of one pipeline rank). Construction is collective.
    """

    def __init__(
        self, layout: Layout, rank: int, device: torch.device, comm: CommTracker | None = None
    ):
        assert dist.is_initialized(), "the process group must exist before the grid"
        assert dist.get_world_size() == layout.world_size, "layout and world differ"
        self.layout = layout
        self.rank = rank
        self.device = device
        self.coordinate = layout.coordinate(rank)
        self.comm = comm or CommTracker()
        """Tracks all axes.

        Users of `host` count their own collectives; the saving thread's are not counted.
        """

        ranks = torch.empty(layout.pipeline, layout.tensor, layout.data, dtype=torch.int)
        for pp in range(layout.pipeline):
            for tp in range(layout.tensor):
                for dp in range(layout.data):
                    ranks[pp, tp, dp] = layout.rank(Coordinate(pp=pp, dp=dp, tp=tp))

        self.mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("pp", "tp", "dp"))
        self.stage_mesh = self.mesh["tp", "dp"]

        # The same mesh on the CPU, for tensors that never reach the accelerator.
        host = (
            self.mesh
            if device.type == "cpu"
            else DeviceMesh("cpu", ranks, mesh_dim_names=("pp", "tp", "dp"))
        )
        self.host_mesh = host["tp", "dp"]
        """(tp, dp) mesh of this pipeline rank for tensors in host memory."""

        self.tp = self._axis("tp", layout.tensor, self.coordinate.tp)
        self.dp = self._axis("dp", layout.data, self.coordinate.dp)
        self.pp = self._axis("pp", layout.pipeline, self.coordinate.pp)

        stage_size = layout.tensor * layout.data
        stage_rank = self.coordinate.tp * layout.data + self.coordinate.dp
        flat = self.stage_mesh._flatten("stage").get_group() if stage_size > 1 else None
        self.stage = Axis("stage", stage_size, stage_rank, flat, comm=self.comm)

        self.host = dist.new_group(backend="gloo", timeout=timedelta(minutes=60))
        """gloo group of all ranks, for everything that is not a training collective."""
        self.background = dist.new_group(backend="gloo", timeout=timedelta(minutes=60))
        """A second gloo group for the saving thread.

        Two threads on one group would mix up each other's collectives.
        """

    def _axis(self, name: str, size: int, rank: int) -> Axis:
        group = self.mesh[name].get_group() if size > 1 else None
        return Axis(name, size, rank, group, comm=self.comm)

    def __str__(self) -> str:
        c = self.coordinate
        return (
            f"rank {self.rank} of {self.layout.world_size} "
            f"(pp {c.pp}, dp {c.dp}, tp {c.tp}) on {self.device}"
        )


def choose_device(launch: Launch) -> torch.device:
    """Return the accelerator of this local rank, or the CPU where there is none.

    Raises ConfigError when the local rank has no CUDA device of its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK ({launch.local_rank}) needs a CUDA device of its own, "
            f"{torch.cuda.device_count()} are visible; lower --nproc-per-node"
        )
    return torch.device("cuda", launch.local_rank)


def start_process_group(
    launch: Launch, device: torch.device, timeout_seconds: float = 600.0
) -> None:
    """Create the default process group: gloo on CPU; on CUDA NCCL, with gloo for host tensors.

    Collective.
    """
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # A world of one meets nobody, whoever started it.
    if launch.world_size == 1:
        store: dist.Store = dist.HashStore()
    elif (path := store_file(launch.world_size)) is not None:
        store = dist.FileStore(str(path), launch.world_size)
    else:
        # A port on the first machine, found by the variables of the launcher.
        dist.init_process_group(backend, timeout=timeout)
        return
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )


def stop_process_group() -> None:
    """Destroy the process group after a barrier. Collective.

    On gloo a rank that leaves early makes the others abort at exit.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
