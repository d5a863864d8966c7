"""Process grid: which groups a rank makes, in which order, and with which backend."""

from collections import defaultdict
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.launch.environment import Launch
from k2train.parallel import grid as module
from k2train.parallel import host_group
from k2train.parallel.grid import HOST_TIMEOUT, ProcessGrid
from k2train.plan.connections import connections
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool

K2 = Layout(tensor=8, pipeline=4, data=15)


class Recorded:
    """`torch.distributed` of one rank of a world that is not there; notes the groups it makes."""

    def __init__(self, world: int, backend: str):
        self.world, self.backend = world, backend
        self.made: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.group = SimpleNamespace(WORLD="default")

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.world

    def new_group(self, ranks: Any = None, **options: Any) -> str:
        self.made.append((tuple(range(self.world)) if ranks is None else tuple(ranks), options))
        return f"group {len(self.made)}"


def grids(
    layout: Layout, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> list[Recorded]:
    """What every rank of the layout makes."""
    monkeypatch.setattr(module.c10d, "get_backend_config", lambda _: backend)
    monkeypatch.setattr(module.c10d, "_set_pg_timeout", lambda *_: None)
    ranks = []
    for rank in range(layout.world_size):
        recorded = Recorded(layout.world_size, backend)
        monkeypatch.setattr(module, "dist", recorded)
        monkeypatch.setattr(host_group, "dist", recorded)
        ProcessGrid(layout, rank, torch.device(device))
        ranks.append(recorded)
    return ranks


@pytest.mark.parametrize("layout", (K2, Layout(tensor=2, pipeline=2), Layout(data=4)), ids=str)
def test_a_rank_makes_its_own_groups_only(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches groups of others, each a barrier of the world, and one made twice for two axes."""
    for recorded in grids(layout, "cuda:nccl", "cuda", monkeypatch):
        planned = connections(layout, "cuda")
        axes = [ranks for ranks, options in recorded.made if options.get("backend") is None]
        below_the_world = [n for n in planned.device_groups if n < layout.world_size]
        assert sorted(map(len, axes)) == sorted(below_the_world)
        hosts = [options for _, options in recorded.made if options.get("backend") == "gloo"]
        assert len(hosts) == len(planned.gloo_groups) == 2


def test_all_ranks_make_a_group_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two ranks that wait for each other in two groups, and one that a group lacks.

    Every rank makes its next group when all of its ranks are at it.
    """
    todo = [[ranks for ranks, _ in one.made] for one in grids(K2, "cuda:nccl", "cuda", monkeypatch)]
    while any(todo):
        waiting = defaultdict(set)
        for rank, left in enumerate(todo):
            if left:
                assert rank in left[0]
                waiting[left[0]].add(rank)
        complete = [ranks for ranks, there in waiting.items() if there == set(ranks)]
        assert complete, "every rank waits for one that is elsewhere"
        for ranks in complete:
            for rank in ranks:
                todo[rank].pop(0)


def test_no_group_waits_for_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a barrier of all ranks for each group, where its own ranks are enough."""
    (first, *_) = grids(K2, "cuda:nccl", "cuda", monkeypatch)
    for ranks, options in first.made:
        assert len(ranks) == 480 or options["use_local_synchronization"]


@pytest.mark.parametrize(("backend", "own"), (("cpu:gloo,cuda:gloo", 0), ("cuda:nccl", 1)))
def test_the_host_group_is_the_default_one_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, backend: str, own: int
) -> None:
    """Catches a third group of all ranks with gloo, and none where the default is NCCL alone."""
    for recorded in grids(Layout(tensor=2, data=2), backend, "cuda", monkeypatch):
        worlds = [options for ranks, options in recorded.made if len(ranks) == 4]
        assert len(worlds) == own + 1, "the saving thread has its own"
        assert all(options["timeout"] == HOST_TIMEOUT for options in worlds)


def groups_job(launch: Launch, layout: Layout) -> list[Any]:
    grid = ProcessGrid(layout, launch.rank, torch.device("cpu"))
    found: list[Any] = []
    for axis in (grid.tp, grid.dp, grid.pp, grid.stage):
        if axis.group is None:
            found.append(([launch.rank], 0))
        else:
            found.append((dist.get_process_group_ranks(axis.group), dist.get_rank(axis.group)))
            assert found[-1][1] == axis.rank
    backend: Any = grid.host.row._get_backend(torch.device("cpu"))
    return [*found, backend.options._timeout]


def test_groups_hold_the_ranks_of_the_layout(pool: GlooPool) -> None:
    """Catches a group of other ranks than the layout's, and a rank that is another in its group."""
    layout = Layout(tensor=2, pipeline=2, data=2)
    for rank, (tp, dp, pp, stage, timeout) in enumerate(pool.run(8, groups_job, layout)):
        at = layout.coordinate(rank)
        for axis, (ranks, index) in (("tp", tp), ("dp", dp), ("pp", pp)):
            assert tuple(ranks) in layout.groups(axis) and ranks[index] == rank
            assert index == getattr(at, axis)
        assert stage[0] == [0, 1, 2, 3] if at.pp == 0 else [4, 5, 6, 7]
        assert timeout == HOST_TIMEOUT and timedelta(minutes=30) < HOST_TIMEOUT
