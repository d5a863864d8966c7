"""The process grid: a Layout with communication groups and a device, passed as an argument and never global.

The DeviceMesh has the axes (pp, tp, dp): tensor before data, so that an optimizer shard is written as "tensor-parallel
slice first, then rows over data-parallel ranks" in one DTensor. The numbering of ranks is the Layout's (tp innermost).
A world of one gets a process group too: one path, and `size == 1` is what turns a collective into nothing.
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.parallel.comm_tracker import CommTracker
from k2train.plan.layout import Coordinate, Layout


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it; `group` is None when the axis has one member."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    overlap: bool = False
    """Whether collectives along it are started ahead of their use, and computation goes on meanwhile."""
    regather: bool = False
    """tp with sequence parallelism: keep a part of a product's input and gather it again in the backward pass."""
    symmetric: bool = False
    """tp: products fused with their collectives over symmetric memory."""
    comm: CommTracker | None = field(default=None, compare=False, repr=False)
    """Where what crosses this axis is counted and named."""

    def __str__(self) -> str:
        return f"{self.name} {self.rank}/{self.size}"


SINGLE = {name: Axis(name, 1, 0, None) for name in ("pp", "dp", "tp", "stage")}


class ProcessGrid:
    """Layout + DeviceMesh + device of this process. Axes: `tp`, `dp`, `pp`, and `stage` (tp x dp of one pipeline rank)."""

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
        """Of all axes; what goes over `host` is counted by whoever sends it, what the saving thread sends is not."""
        ranks = torch.empty(layout.pipeline, layout.tensor, layout.data, dtype=torch.int)
        for pp in range(layout.pipeline):
            for tp in range(layout.tensor):
                for dp in range(layout.data):
                    ranks[pp, tp, dp] = layout.rank(Coordinate(pp=pp, dp=dp, tp=tp))
        self.mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("pp", "tp", "dp"))
        self.stage_mesh = self.mesh["tp", "dp"]
        host = (
            self.mesh
            if device.type == "cpu"
            else DeviceMesh("cpu", ranks, mesh_dim_names=("pp", "tp", "dp"))
        )
        self.host_mesh = host["tp", "dp"]
        """(tp, dp) of this pipeline rank for tensors in host memory."""
        self.tp = self._axis("tp", layout.tensor, self.coordinate.tp)
        self.dp = self._axis("dp", layout.data, self.coordinate.dp)
        self.pp = self._axis("pp", layout.pipeline, self.coordinate.pp)
        stage_size = layout.tensor * layout.data
        stage_rank = self.coordinate.tp * layout.data + self.coordinate.dp
        flat = self.stage_mesh._flatten("stage").get_group() if stage_size > 1 else None
        self.stage = Axis("stage", stage_size, stage_rank, flat, comm=self.comm)
        self.host = dist.new_group(backend="gloo", timeout=timedelta(minutes=60))
        """All ranks over gloo, for what is not a training collective."""
        self.background = dist.new_group(backend="gloo", timeout=timedelta(minutes=60))
        """The same for the thread that saves: two threads on one group would pair each other's collectives."""

    def _axis(self, name: str, size: int, rank: int) -> Axis:
        group = self.mesh[name].get_group() if size > 1 else None
        return Axis(name, size, rank, group, comm=self.comm)

    def __str__(self) -> str:
        c = self.coordinate
        return f"rank {self.rank} of {self.layout.world_size} (pp {c.pp}, dp {c.dp}, tp {c.tp}) on {self.device}"


def choose_device(launch: Launch) -> torch.device:
    """The accelerator of this local rank where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK ({launch.local_rank}) needs a CUDA device of its own, {torch.cuda.device_count()} are visible; lower --nproc-per-node"
        )
    return torch.device("cuda", launch.local_rank)


def start_process_group(
    launch: Launch, device: torch.device, timeout_seconds: float = 600.0
) -> None:
    """Create the default process group: gloo on CPU, NCCL on CUDA with gloo beside it for host tensors."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def stop_process_group() -> None:
    """Leave together: on gloo a rank that leaves early makes the others abort at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
