"""Gathers and scatters of three and four ranks through shared memory: gloo's bits, or gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k2train.launch.environment import Launch
from k2train.parallel import shared_memory
from k2train.parallel.collectives import all_gather, all_reduce, reduce_scatter
from k2train.parallel.grid import Axis
from k2train.parallel.param_gather import gather_shards
from k2train.parallel.shared_mesh import SharedMesh, connect_mesh
from k2train.plan.transfer_memory import MESH_SIZES as SIZES_OF_A_MESH
from tests.support.forkserver import PATIENCE_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.shared_memory import (
    CPU,
    SIZES,
    differences,
    files_left_open,
    open_files,
    refused,
    silent_after,
)

STUCK_SECONDS = int(PATIENCE_SECONDS / 2)
"""Longest wait for another rank in these tests: less than the job is waited for."""


def mesh_of(launch: Launch) -> SharedMesh | None:
    return connect_mesh(launch.world_size, launch.rank, dist.group.WORLD, CPU)


def axis_of(launch: Launch) -> Axis:
    mesh = mesh_of(launch)
    assert mesh is not None, "processes of one machine share memory"
    return Axis("tp", launch.world_size, launch.rank, dist.group.WORLD, mesh=mesh)


def results(axis: Axis, dtype: torch.dtype, size: int) -> list[Tensor]:
    """Of every collective, also of tensors with gaps, and what it leaves of its input."""
    generator = torch.Generator().manual_seed(7 * size + axis.rank)
    x = (torch.randn(axis.size * size, generator=generator) * 1000).to(dtype)
    gaps = (torch.randn(axis.size, 5, 6, generator=generator) * 1000).to(dtype)[:, :, ::2]
    shards = x.clone().view(axis.size, size)
    return [
        all_gather(x, axis),
        reduce_scatter(x, axis),
        gather_shards(shards, axis, wait=True).wait(),
        all_gather(gaps, axis),
        reduce_scatter(gaps, axis),
        all_reduce(x.clone(), axis),
        x,
    ]


def same_bits_job(launch: Launch) -> list[str]:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    # Those of several blocks are the pairs' own test.
    with silent_after(STUCK_SECONDS):
        return differences(results, axis_of(launch), dtypes, SIZES[:-1])


def partners_of(size: int, rank: int) -> list[int]:
    """Ranks that one exchanges with, in its order."""
    found: list[int] = []

    class Pair:
        def __init__(self, other: int):
            self.other = other

        def exchange(self, *given: object) -> None:
            found.append(self.other)

    pairs: Any = {other: Pair(other) for other in range(size) if other != rank}
    blocks = torch.zeros(size, 1)
    SharedMesh(pairs, rank).swap(blocks, blocks, "all-gather")
    return found


@pytest.mark.parametrize("size", SIZES_OF_A_MESH)
def test_no_rank_waits_in_a_circle(size: int) -> None:
    """Catches an order of partners in which each waits for one that waits for another.

    Two ranks exchange when each is the other's next partner.
    """
    left = {rank: partners_of(size, rank) for rank in range(size)}
    for rank, partners in left.items():
        assert sorted([rank, *partners]) == list(range(size))
    while any(left.values()):
        heads = [(rank, partners[0]) for rank, partners in left.items() if partners]
        ready = [rank for rank, other in heads if left[other][:1] == [rank]]
        assert ready, f"every rank waits: {heads}"
        for rank in ready:
            left[rank].pop(0)


@pytest.mark.parametrize("world", (3, 4))
def test_the_bits_are_those_of_gloo(pool: GlooPool, world: int) -> None:
    """Catches a block of another rank, a partner that waits for another, a sum in the order of
    turns, and an own block that is left out.
    """
    assert pool.run(world, same_bits_job) == [[]] * world


def sizes_job(launch: Launch) -> bool:
    return mesh_of(launch) is None


def test_other_sizes_keep_gloo(pool: GlooPool) -> None:
    """Catches memory that grows with the square of the ranks, and a second way for two."""
    assert pool.run(2, sizes_job) == [True] * 2
    assert pool.run(5, sizes_job) == [True] * 5


def cannot_job(launch: Launch) -> tuple[bool, int, int]:
    """With one rank that maps nothing: whether there is a mesh, a sum, and files left open."""
    # gloo opens its own between two ranks at their first transfer.
    mesh_of(launch)
    before, plain = open_files(), shared_memory.mmap.mmap

    def fails(*given: object) -> None:
        raise OSError("not here")

    if launch.rank == 2:
        setattr(shared_memory.mmap, "mmap", fails)  # noqa: B010
    try:
        mesh = mesh_of(launch)
    finally:
        setattr(shared_memory.mmap, "mmap", plain)  # noqa: B010
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD, mesh=mesh)
    total = int(reduce_scatter(torch.full((3,), launch.rank + 1), axis))
    return mesh is None, total, open_files() - before


def test_where_one_cannot_all_keep_gloo(pool: GlooPool) -> None:
    """Catches ranks that decide unlike, of which some would wait for the others."""
    assert pool.run(3, cannot_job) == [(True, 6, 0)] * 3


def gone_job(launch: Launch) -> str:
    with silent_after(STUCK_SECONDS):
        axis = axis_of(launch)
    if launch.rank == 1:
        del axis
        return "gone"
    # The second note meets a closed socket in any case.
    return [refused(lambda: all_gather(torch.zeros(4), axis)) for _ in range(2)][-1]


def test_a_rank_that_is_gone_ends_the_wait(pool: GlooPool) -> None:
    """Catches a survivor that waits for an hour: the one whose turn it is ends, and so the next."""
    told = pool.run(3, gone_job)
    assert all(told[rank].startswith("shared memory: connection ") for rank in (0, 2)), told


def open_files_job(launch: Launch) -> int:
    # gloo opens its own between two ranks at their first transfer.
    mesh_of(launch)
    return files_left_open(lambda: mesh_of(launch), 3)


def test_memory_that_is_dropped_leaves_nothing_open(pool: GlooPool) -> None:
    """Catches sockets, groups or mappings for each time that a run goes back to a checkpoint."""
    assert pool.run(3, open_files_job) == [0] * 3
