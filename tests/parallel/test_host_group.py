"""Host group: rows and their first ranks give what one group gives, and so do agreements."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.errors import UnavailableError
from k2train.launch.environment import Launch
from k2train.parallel.agreement import Agreement
from k2train.parallel.comm_tracker import CommTracker
from k2train.parallel.host_group import make_host_groups
from k2train.parallel.messages import TEXT
from k2train.plan.connections import FLAT_RANKS, host_row_ranks
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool


def exchange_job(launch: Launch, flat_ranks: int) -> list[Any]:
    rank, world = launch.rank, launch.world_size
    groups = make_host_groups(rank, world, "gloo", timedelta(seconds=200), 2, flat_ranks)
    # The second of two, which finds the first ranks of rows in more groups.
    group = groups[1]
    found: list[Any] = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
        x = torch.tensor([rank - 3, rank * rank, 7])
        group.all_reduce(x, op)
        found.append(x.tolist())
    for source in range(world):
        x = torch.tensor([10 * rank, rank])
        group.broadcast(x, source)
        found.append(x.tolist())
    x = torch.tensor([[rank, 5], [-rank, 6]])
    found += [group.gather(x).tolist(), group.all_gather(x).tolist()]
    group.barrier()

    grid: Any = SimpleNamespace(
        host=group, comm=CommTracker(), rank=rank, layout=Layout(data=world)
    )
    agreement = Agreement(grid)
    found += [
        agreement.all(f"rank {rank}" * (rank + 1), TEXT),
        agreement.first("" if rank < 4 else f"problem {rank}"),
        agreement.first(UnavailableError("") if rank == 1 else ""),
        agreement.lowest(f"rank {rank}" if rank in (2, 4) else None, TEXT),
        agreement.distinct(f"value {rank // 2}", TEXT),
        agreement.from_first("first" if rank == 0 else "other", TEXT),
        agreement.sum(torch.tensor([rank])).tolist(),
        agreement.largest(torch.tensor([-rank, rank])).tolist(),
    ]
    return [*found, [group.width, group.rows]]


@pytest.mark.parametrize(("world", "rows"), ((7, [3, 3]), (5, [3, 2])))
def test_rows_give_what_one_group_gives(pool: GlooPool, world: int, rows: list[int]) -> None:
    """Catches a row that is left out or counted twice, a short last row, and ranks in another
    order.
    """
    split = pool.run(world, exchange_job, 2)
    assert all(found.pop() == rows for found in split)
    one = pool.run(world, exchange_job, FLAT_RANKS)
    assert all(found.pop() == [world, 1] for found in one)
    assert split == one
    # By hand, so that both cannot be wrong alike.
    assert split[1][0] == [
        sum(range(world)) - 3 * world,
        sum(n * n for n in range(world)),
        7 * world,
    ]
    assert split[0][world + 3] == [[[n, 5], [-n, 6]] for n in range(world)]
    assert split[1][world + 3] == [] and split[1][world + 4] == split[0][world + 3]
    first, _, lowest, distinct = split[3][world + 6 : world + 10]
    assert first == (4, "problem 4") and lowest == (2, "rank 2")
    assert distinct == [f"value {n}" for n in range((world + 1) // 2)]


def test_no_rank_has_many_neighbours() -> None:
    """Catches a row that grows with the world."""
    assert [host_row_ranks(world) for world in (480, 512, 513, 4096, 16384)] == [
        480,
        512,
        23,
        64,
        128,
    ]
