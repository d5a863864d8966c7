"""`evaluation/divide.py`: catches results in another order, lost, or of another replica."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
from pydantic import TypeAdapter

from k2train.errors import UserError
from k2train.evaluation.divide import divided
from k2train.inference.model import LanguageModel
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool

FORM: TypeAdapter[list[int]] = TypeAdapter(list[int])


@dataclass
class OnlyGrid:
    """What a model is to the division: its grid."""

    grid: ProcessGrid | None
    layout: Layout


def job(launch: Launch, tensor: int, count: int, bad: int | None) -> Any:
    import torch

    layout = Layout.for_world(launch.world_size, tensor)
    grid = ProcessGrid(layout, launch.rank, torch.device("cpu"))
    seen: list[int] = []

    def work(batch: int) -> int:
        if batch == bad:
            raise UserError(f"batch {batch} is wrong")
        seen.append(batch)
        return batch * batch

    model = cast(LanguageModel, OnlyGrid(grid, layout))
    try:
        return divided(model, range(count), work, FORM), seen
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("world", "tensor", "count"), [(4, 2, 5), (3, 1, 7), (3, 1, 2), (2, 2, 3)])
def test_each_batch_is_done_by_one_replica(
    pool: GlooPool, world: int, tensor: int, count: int
) -> None:
    found = pool.run(world, job, tensor, count, None)
    assert [results for results, _ in found] == [[n * n for n in range(count)]] * world
    done = [n for rank, (_, seen) in enumerate(found) if rank % tensor == 0 for n in seen]
    assert sorted(done) == list(range(count))


def test_an_error_is_that_of_every_rank(pool: GlooPool) -> None:
    """Catches ranks that wait for a replica that has given up."""
    assert pool.run(4, job, 2, 6, 3) == ["batch 3 is wrong"] * 4


def test_one_process() -> None:
    model = cast(LanguageModel, OnlyGrid(None, Layout()))
    assert divided(model, [3, 1], lambda n: n + 1, FORM) == [4, 2]
