"""Process grid: a Layout plus communication groups and a device.

- Passed as an argument, never global.
- Ranks are numbered by the Layout (tp innermost).
- A rank makes the groups that it is in, and no others: a group along each axis, two host groups of
  all ranks. Axes with the same ranks share a group.
- A gloo group connects each of its ranks with each other one. So the groups along the axes get
  gloo only where tensors are in host memory (`plan.connections` counts the sockets).
- A world of one gets a process group too: there is one code path, and `size == 1` turns a
  collective into a no-op.

Alternatives considered:
- DeviceMesh: every rank makes every group of the world, 216 of them for 480 ranks, each behind a
  barrier of all ranks, with gloo beside NCCL.
- gloo's connections at first use (TORCH_GLOO_LAZY_INIT): a rank that dies before them can leave
  others in a connection that has no timeout (pytorch/gloo#520).
- `device_id` for the default group: unbatched sends and receives would then share its communicator
  with everything else in it, one after the other (pytorch#154132).
"""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from k2train.errors import ConfigError
from k2train.launch.environment import (
    RANKS_PER_DEVICE,
    Launch,
    read_ranks_per_device,
    store_file,
)
from k2train.parallel.comm_tracker import CommTracker
from k2train.parallel.host_group import HostGroup, make_host_groups
from k2train.parallel.shared_channel import SharedChannel
from k2train.parallel.shared_mesh import SharedMesh, connect_mesh
from k2train.parallel.shared_pair import SharedPair, connect_pair
from k2train.plan.layout import Layout


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
    pair: SharedPair | None = field(default=None, compare=False, repr=False)
    """Memory that two ranks share, through which their blocking collectives go; None: the group."""
    mesh: SharedMesh | None = field(default=None, compare=False, repr=False)
    """Memory that three or four ranks share, for their blocking gathers and scatters; None: the
    group.
    """
    channel: SharedChannel | None = field(default=None, compare=False, repr=False)
    """For pp: memory through which two ranks send and receive; None: the group."""
    comm: CommTracker | None = field(default=None, compare=False, repr=False)
    """Counts and names the collectives along this axis."""

    def __str__(self) -> str:
        return f"{self.name} {self.rank}/{self.size}"


def share_memory(axis: Axis, device: torch.device) -> Axis:
    """Connect the ranks of an axis by shared memory, where two to four have it. Collective."""
    place = axis.size, axis.rank, axis.group, device
    return replace(axis, pair=connect_pair(*place), mesh=connect_mesh(*place))


SINGLE = {name: Axis(name, 1, 0, None) for name in ("pp", "dp", "tp", "stage")}


HOST_TIMEOUT = timedelta(minutes=60)
"""Longest wait in a group of host tensors: rank 0 may read or write files meanwhile."""


class ProcessGrid:
    """Layout, process groups and device of this process.

    Axes: `tp`, `dp`, `pp`, and `stage` (tp x dp of one pipeline rank). Construction is collective.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        device: torch.device,
        comm: CommTracker | None = None,
        host_backend: str = "gloo",
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

        default = dist.group.WORLD
        assert default is not None, "the default group exists"
        self._groups = {tuple(range(layout.world_size)): default}
        """Groups of this rank by their ranks; an axis that spans the world has the default group.
        """
        self.tp = self._axis("tp")
        self.dp = self._axis("dp")
        self.pp = self._axis("pp")
        self.stage = self._axis("stage")

        self.host, self.background = _host_groups(default, rank, layout.world_size, host_backend)
        """All ranks, for everything that is not a training collective; and for the saving thread.

        Two threads on one group would mix up each other's collectives: gloo numbers them in the
        order in which a rank begins them, and the threads of two ranks need not take turns alike.
        """

    def _axis(self, name: str) -> Axis:
        """Make this rank's group along an axis, of the default group's backend; collective."""
        ranks = self.layout.peers(self.rank, name)
        group = None
        if len(ranks) > 1:
            group = self._groups.get(ranks)
            if group is None:
                # Without a barrier of the world: every rank makes its groups in this order.
                group = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
                self._groups[ranks] = group
        return Axis(name, len(ranks), ranks.index(self.rank), group, comm=self.comm)

    def __str__(self) -> str:
        c = self.coordinate
        return (
            f"rank {self.rank} of {self.layout.world_size} "
            f"(pp {c.pp}, dp {c.dp}, tp {c.tp}) on {self.device}"
        )


def choose_device(launch: Launch) -> torch.device:
    """Return the accelerator of this local rank, or the CPU where there is none.

    With K2TRAIN_RANKS_PER_DEVICE consecutive local ranks share one. Raises ConfigError when there
    is no CUDA device for the local rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    shared, visible = read_ranks_per_device(), torch.cuda.device_count()
    index = launch.local_rank // shared
    if index >= visible:
        own = "a CUDA device of its own"
        needs = own if shared == 1 else f"device {index} ({shared} ranks each)"
        raise ConfigError(
            f"LOCAL_RANK ({launch.local_rank}) needs {needs}, {visible} are visible; lower "
            f"--nproc-per-node, or raise {RANKS_PER_DEVICE} to share devices (slow, for checks)"
        )
    return torch.device("cuda", index)


def _host_groups(
    default: dist.ProcessGroup, rank: int, world_size: int, backend: str
) -> list[HostGroup]:
    """Return two groups of all ranks: `default` and another where it takes host tensors.

    Collective.
    """
    make = partial(make_host_groups, rank, world_size, backend, HOST_TIMEOUT)
    if f"cpu:{backend}" not in c10d.get_backend_config(default):
        return make(count=2)
    # Made with a shorter limit, which is for ranks that never come.
    # Its public name is newer than the oldest torch that is supported.
    getattr(dist, "set_timeout", c10d._set_pg_timeout)(HOST_TIMEOUT, default)
    return [HostGroup(rank, world_size, world_size, default), *make()]


def start_process_group(
    launch: Launch, device: torch.device, timeout_seconds: float = 600.0
) -> None:
    """Create the default process group: gloo on CPU, NCCL on CUDA. Collective.

    Groups along the axes take its backend. Where ranks share a device, gloo for both: it copies
    through host memory, and has no transfers between two ranks, so a pipeline needs a device each.
    """
    backend = "gloo" if device.type == "cpu" else "nccl"
    if device.type == "cuda" and read_ranks_per_device() > 1:
        backend = "cpu:gloo,cuda:gloo"
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


def stop_process_group(host: HostGroup | None = None) -> None:
    """Destroy the process group after a barrier, in `host` if there is one. Collective.

    On gloo a rank that leaves early makes the others abort at exit. The grid's `host` spares NCCL
    a communicator of all ranks, which nothing else needs.
    """
    if dist.is_initialized():
        if host is None:
            dist.barrier()
        else:
            host.barrier()
        dist.destroy_process_group()
