"""Communication tracking: everything that crosses ranks is counted, named and timed.

No value changes.
"""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from k2train.launch.environment import Launch
from k2train.parallel.collectives import (
    all_gather,
    all_gather_start,
    all_reduce,
    all_reduce_start,
    reduce_scatter,
)
from k2train.parallel.comm_tracker import CommTracker, collective_scope, wait_scope
from k2train.parallel.device_digest import RootAllReduce, StateAudit, StateDigest
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.parallel.param_gather import gather_shards
from k2train.parallel.pipeline import Executor
from k2train.parallel.replica_check import replica_problem
from k2train.plan.layout import Layout
from k2train.plan.schedule import build_programs
from k2train.train.forward_check import run_forward_check
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

CPU = torch.device("cpu")


class Listening(CommTracker):
    """Keeps the names of all exchanges and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def collective(self, name: str) -> CommTracker:
        self.names.append(name)
        return super().collective(name)

    def wait(self, name: str) -> CommTracker:
        self.names.append(f"wait {name}")
        return super().wait(name)


def collectives_job(launch: Launch, overlap: bool) -> dict[str, Any]:
    comm = Listening()
    axis = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD, comm=comm)
    quiet = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(launch.rank))
    values = []

    for one in (axis, quiet):
        shards = torch.zeros(launch.world_size, 5)
        shards[launch.rank] = float(launch.rank)
        started = all_reduce_start(x.clone(), one, wait=not overlap)
        values.append(
            [
                started.wait(),
                all_gather(x, one),
                all_gather_start(x, one).wait(),
                reduce_scatter(x.clone(), one),
                gather_shards(shards, one, wait=not overlap).wait(),
            ]
        )

    equal = all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    if launch.rank == 0:
        time.sleep(0.3)

    before, entered = comm.blocked_seconds, time.monotonic()
    all_reduce(x, axis)
    return {
        "equal": equal,
        "names": comm.names,
        "count": comm.count,
        "current": comm.current,
        "cell": comm.cells[0],
        "waited": comm.blocked_seconds - before,
        "entered": entered,
        "took": time.monotonic() - entered,
    }


@pytest.mark.parametrize(("world", "overlap"), [(2, False), (2, True), (4, True)])
def test_collectives_are_counted_named_and_unchanged(
    pool: GlooPool, world: int, overlap: bool
) -> None:
    answers = pool.run(world, collectives_job, overlap)
    for rank, found in enumerate(answers):
        assert found["equal"]
        begun = [name for name in found["names"] if not name.startswith("wait ")]
        assert begun == [
            "all-reduce dp",
            "all-gather dp",
            "all-gather dp",
            "reduce-scatter dp",
            "all-gather of weights dp",
            "all-reduce dp",
        ]
        assert found["count"] == found["cell"] == 6
        assert found["current"] == ""
        assert ("wait all-reduce dp" in found["names"]) == overlap
        assert "wait all-gather dp" in found["names"], "a started gather is waited for"
        assert "wait all-gather of weights dp" in found["names"]
        # What rank 0 slept before it came was no waiting; the others waited for it.
        late = answers[0]["entered"] - found["entered"]
        assert late - 0.2 < found["waited"] <= found["took"], (rank, late)


def pipeline_job(launch: Launch) -> list[str]:
    comm = Listening()
    pp = Axis("pp", launch.world_size, launch.rank, dist.group.WORLD, comm=comm)
    programs = build_programs("gpipe", launch.world_size, 2, 1)
    layer = nn.Linear(3, 3)
    executor = Executor({launch.rank: layer}, launch.world_size, pp, CPU)
    executor.run(
        programs[launch.rank],
        lambda m: torch.ones(2, 3),
        lambda y, m: y.sum(),
        (2, 3),
        torch.float32,
    )

    return comm.names


def test_transfers_of_a_pipeline_are_named(pool: GlooPool) -> None:
    first, last = pool.run(2, pipeline_job)
    assert "send forward of micro-batch 1, stage 0" in first
    assert "wait recv backward of micro-batch 0, stage 0" in first
    assert "wait recv forward of micro-batch 1, stage 1" in last
    assert "send backward of micro-batch 0, stage 1" in last


def grid_job(launch: Launch) -> tuple[bool, bool]:
    grid = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU)
    own = CommTracker()
    given = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU, own)
    one = all(axis.comm is grid.comm for axis in (grid.tp, grid.dp, grid.pp, grid.stage))
    return one, given.dp.comm is own


def test_all_axes_of_a_grid_report_to_one_place(pool: GlooPool) -> None:
    assert pool.run(2, grid_job) == [(True, True)] * 2


def checks_job(launch: Launch, config: Any) -> list[tuple[str, str, str]]:
    """Of each plain collective that checks of the state make: what it is, and what the traffic said
    before and after it.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    engine.optimizer.finish()
    shards, shard_layout = engine.optimizer.flat_shards, engine.gradients.shard_layout
    digest = StateDigest(shard_layout, engine.names, list(shards), grid.tp)
    root, guard = RootAllReduce(digest, None, grid.comm), StateAudit(digest, None, grid.comm)
    found: list[tuple[str, str, str]] = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def seen_from(name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            before = grid.comm.current
            done = plain[name](*given, **named)
            found.append((name, before, grid.comm.current))
            return done

        return call

    try:
        for name in plain:
            setattr(dist, name, seen_from(name))
        guard.keep(root(shards, 1, 1).local_sums)
        assert guard.problem(shards) is None
        run_forward_check(engine)
        if launch.rank == 1:
            shard_layout.slots[0].parameter.data.view(-1)[0] += 1.0
        assert replica_problem(shard_layout, shards, grid) is not None
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)

    assert grid.comm.current == ""
    return found


def test_checks_of_the_state_name_their_exchanges(pool: GlooPool) -> None:
    """Else a rank that hangs in one looks like one that is in no collective, and is ended for
    it.
    """
    for found in pool.run(2, checks_job, tiny_config()):
        # The differing tensors and their digests: lengths, then messages.
        assert [name for name, *_ in found].count("all_gather") == 4
        # Who of the probe has something to say, among them.
        assert [name for name, *_ in found].count("all_reduce") >= 3
        assert all(before and before == after for _, before, after in found), found


def test_an_exchange_that_raises_is_remembered() -> None:
    comm = CommTracker()
    with pytest.raises(RuntimeError), collective_scope(comm, "all-reduce tp"):
        raise RuntimeError("connection closed")
    with pytest.raises(RuntimeError), wait_scope(comm, "another"):
        raise RuntimeError("after that")
    assert (comm.broken, comm.current, comm.last) == ("all-reduce tp", "", "all-reduce tp")


def test_a_wait_shows_its_name_and_is_no_new_exchange() -> None:
    comm = CommTracker()
    with collective_scope(comm, "one"):
        assert comm.position()[:3] == (1, "one", "one")
    with wait_scope(comm, "two"):
        assert comm.position()[:3] == (1, "two", "one")
    with collective_scope(None, "nothing"), wait_scope(None, "nothing"):
        pass
    assert comm.position()[1] == ""


class Nothing:
    """The least that a context written in Python can do: the unit of what counting costs."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_counting_costs_little() -> None:
    """Catches a file, a lock that is waited for, or a log line in every collective."""
    comm, nothing = CommTracker(), Nothing()
    seconds: dict[str, list[float]] = {"counted": [], "nothing": []}
    for _ in range(20):
        for name, made in (
            ("counted", lambda: collective_scope(comm, "all-reduce tp")),
            ("nothing", lambda: nothing),
        ):
            began = time.thread_time()
            for _ in range(1000):
                with made():
                    pass
            seconds[name].append(time.thread_time() - began)
    # Measured 2.2 times. Processor time of this thread, the best of 20 short rounds: what else
    # runs does not count.
    assert min(seconds["counted"]) < 5 * min(seconds["nothing"]), seconds
