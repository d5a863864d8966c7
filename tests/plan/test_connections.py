"""Connections of a rank: the formula against sockets that gloo really opens, and large worlds."""

import os

import pytest
import torch
import torch.distributed as dist

from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid
from k2train.plan.connections import OTHER_FILES, connections
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool


def open_files() -> tuple[int, int]:
    """Open sockets of this process, and all its open files."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        # The listing itself is gone by now.
        if os.path.lexists(path := f"/proc/self/fd/{name}"):
            links.append(os.readlink(path))
    return sum(link.startswith("socket:") for link in links), len(links)


def count_job(launch: Launch, layout: Layout) -> list[int]:
    """Sockets and files that one gloo group of all ranks takes, then those of a grid without its
    default group.
    """
    before = open_files()
    dist.new_group(backend="gloo")
    one = open_files()
    ProcessGrid(layout, launch.rank, torch.device("cpu"))
    # A connection is in place on both ends only when both have got that far.
    dist.barrier()
    grid = open_files()
    return [one[0] - before[0], one[1] - before[1], grid[0] - one[0], grid[1] - one[1]]


@pytest.mark.parametrize(
    "layout",
    (
        Layout(data=2),
        Layout(tensor=2, data=2),
        Layout(tensor=2, pipeline=2, data=2),
        Layout(tensor=4, pipeline=2),
    ),
    ids=str,
)
def test_the_formula_counts_what_gloo_opens(pool: GlooPool, layout: Layout) -> None:
    """Catches a group that is made twice, or that connects more ranks than the plan says."""
    planned, world = connections(layout, "cpu"), layout.world_size
    for sockets, files, grid_sockets, grid_files in pool.run(world, count_job, layout):
        assert sockets == world
        assert grid_sockets + sockets == planned.sockets
        assert grid_files + files == planned.files - world - OTHER_FILES


def test_large_worlds() -> None:
    """Catches sockets that grow with the number of all-rank groups; numbers counted by hand."""
    k2 = Layout(tensor=8, pipeline=4, data=15)
    cpu, cuda = connections(k2, "cpu"), connections(k2, "cuda")
    # Stage 120, tp 8, dp 15, pp 4, and the world twice.
    assert cpu.sockets == 120 + 8 + 15 + 4 + 2 * 480 and cpu.device_groups == ()
    assert cuda.sockets == 2 * 480 and sorted(cuda.device_groups) == [4, 8, 15, 120]
    assert cuda.store_reads == 480 * 2 * 479
    # Four groups of more than two ranks and two pipeline neighbours, as measured elsewhere.
    assert cuda.communicators == 6
    assert cuda.communicator_bytes == 4 * 688_000_000 + 2 * 544_000_000
    assert cpu.communicators == cpu.communicator_bytes == 0

    # Rows of 64 and 128 ranks, and as many rows; twice.
    for world, pipeline, row in ((4096, 8, 64), (16384, 16, 128)):
        made = connections(Layout.for_world(world, 8, pipeline), "cuda")
        assert made.sockets == 4 * row and made.files == 4 * row + 12 + world + OTHER_FILES
        assert made.store_reads == 2 * (world * (row - 1) + row * (row - 1))


def test_axes_with_the_same_ranks_count_once() -> None:
    """Catches a communicator for a stage that is only its tensor-parallel group."""
    assert connections(Layout(tensor=2, pipeline=2), "cuda").device_groups == (2, 2)
    assert connections(Layout(data=4), "cuda").device_groups == (4,)
    assert connections(Layout(), "cuda").device_groups == ()
