"""Growth bench: what a rank sends, holds and reads on worlds of any size, and how fast that grows.

- The code is that of a run, as one rank of a world of which no other process exists: torch's fake
  process group. Each of its collectives is counted with the bytes of its tensors on this rank.
- Manifests are those of K2-65B (`benchmarks.manifests`), the grid is tensor 8, pipeline 4.
- Every row has the exponent that it may have, and why: 0 does not grow, 1 grows like the world.
- Numbers are exact. CPU seconds stand beside them and judge nothing.

Alternatives considered:
- Many processes: 64 at most on one machine, and a quadratic part hides among them.
"""

import json
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch.distributed import distributed_c10d as c10d
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.growth_bounds import BOUNDS
from benchmarks.manifests import CHUNKS, PIPELINE, TENSOR, World, reads_of
from k2train.checkpoint.gathered_files import pack_files
from k2train.checkpoint.manifest import MANIFEST
from k2train.data.order import ChunkOrder, rank_rows
from k2train.guard.stragglers import WINDOW, Stragglers
from k2train.optim.grad_norm import share
from k2train.parallel.agreement import Agreement, SaveError
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.plan.connections import connections
from k2train.plan.layout import Layout
from k2train.text import table
from k2train.train.dry_run import BACKEND, fake_world
from k2train.train.step_flags import SECONDS
from k2train.watchdog.heartbeat import Observer
from k2train.watchdog.own_heartbeat import Member
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog

WORLDS = (480, 4096, 16384)
SEQUENCES = 16384
"""Sequences of a step, on every world."""
NODE = 8
"""Ranks of a machine, which has one launcher."""
SLACK = 0.05
"""By how much an exponent may be above its bound: a constant part bends it."""


class Measured(NamedTuple):
    """A number of one part on one world, and the CPU seconds that it took."""

    number: float
    seconds: float = 0.0


_NUMBER: TypeAdapter[int | None] = TypeAdapter(int | None)


class _Messages(TorchDispatchMode):
    """A context that counts the collectives inside, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            found = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
            self.messages += 1
            self.bytes += sum(one.nbytes for one in found)
        return func(*args, **(kwargs or {}))


Found = dict[tuple[str, str], Measured]


def growth_of(folder: Path, world_size: int) -> Found:
    """Measure every part on one world, a multiple of 32; files are written in `folder`."""
    layout = Layout.for_world(world_size, TENSOR, PIPELINE)
    found: Found = {}
    _groups(found, layout)
    for rank in (0, world_size // 2 + 1):
        with fake_world(rank, world_size):
            _agreements(found, ProcessGrid(layout, rank, torch.device("cpu"), None, BACKEND))
    _slow_ranks(found, layout)
    _manifests(found, folder, world_size)
    _heartbeats(found, folder, world_size)
    _data(found, layout)
    found["rendezvous of launchers", "bytes"] = _timed(partial(_rendezvous, world_size // NODE))
    assert set(found) == set(BOUNDS), "every row has a bound"
    return found


def _timed(work: Callable[[], float]) -> Measured:
    began = time.process_time()
    number = work()
    return Measured(number, time.process_time() - began)


def _groups(found: Found, layout: Layout) -> None:
    """The grid of a rank that is in all kinds of groups."""
    with fake_world(0, layout.world_size):
        tracemalloc.start()
        began = time.process_time()
        grid = ProcessGrid(layout, 0, torch.device("meta"), None, BACKEND)
        seconds = time.process_time() - began
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        found["groups of a rank", "groups"] = Measured(len(c10d._world.pg_map), seconds)
        found["groups of a rank", "bytes held"] = Measured(held)
        del grid
    made = connections(layout, "cuda")
    found["connections of a rank", "sockets"] = Measured(made.sockets)
    found["meeting, all ranks", "reads of the store"] = Measured(made.store_reads)


def _agreements(found: Found, grid: ProcessGrid) -> None:
    """What a rank exchanges; of most parts the largest of the ranks that are asked."""
    # On devices both host groups are as this one; here the first is the default group.
    agreement = Agreement(grid, background=True)

    def nothing_wrong() -> None:
        agreement.do(lambda: None, lambda error: SaveError(str(error)))
        agreement.first("")
        agreement.lowest(None, TEXTS)
        # No other rank is there to send more than nothing.
        agreement.from_first(None, _NUMBER)

    with _counted(found, "nothing is wrong"):
        nothing_wrong()
    with _counted(found, "a table that ranks share"):
        agreement.distinct([f"layers.{n}.weight" for n in range(180)], TEXTS)
    with _counted(found, "chunk opened, " + ("rank 0" if grid.rank == 0 else "a rank")):
        agreement.first("")
        agreement.to_first(torch.zeros(4, dtype=torch.int64))
        agreement.from_first(None, _NUMBER)
    with _counted(found, "exchange of a step"):
        flags = [0.0] * (SECONDS + grid.layout.world_size)
        share(torch.zeros(728, dtype=torch.float64), flags, grid.stage, grid.pp)
    if grid.rank == 0:
        with _counted(found, "save, facts of files, rank 0"):
            agreement.to_first(pack_files({}, 0))


@contextmanager
def _counted(found: Found, part: str) -> Iterator[None]:
    began, messages = time.process_time(), _Messages()
    with messages:
        yield
    seconds = time.process_time() - began
    for unit, number in (("messages", messages.messages), ("bytes", messages.bytes)):
        key = part, unit
        if key in BOUNDS:
            found[key] = max(Measured(number, seconds), found.get(key, Measured(0)))


def _slow_ranks(found: Found, layout: Layout) -> None:
    seconds = [1.0 + rank % 7 / 1000 for rank in range(layout.world_size)]
    stragglers = Stragglers(layout)
    for step in range(WINDOW + 1):
        stragglers.observe(step, seconds)

    def observe() -> float:
        assert stragglers.observe(WINDOW + 1, seconds) is None
        return len(seconds)

    found["who is slow, rank 0", "ranks"] = _timed(observe)


def _manifests(found: Found, folder: Path, world_size: int) -> None:
    world = World(folder, world_size)

    def size(work: Callable[[], None]) -> float:
        before = {file: file.stat().st_size for file in world.path.rglob("*.json")}
        work()
        after = {file: file.stat().st_size for file in world.path.rglob("*.json")}
        return sum(after.values()) - sum(before.values())

    def side_files() -> None:
        world.write_side_files(world.rank)

    found["save, side files of a rank", "bytes"] = _timed(partial(size, side_files))
    for rank in world.neighbours():
        if rank != world.rank:
            world.write_side_files(rank)
    found["save, manifest, rank 0", "bytes"] = _timed(partial(size, world.write_manifest))
    manifest = (world.path / MANIFEST).stat().st_size
    found["start, manifest alone", "bytes"] = Measured(manifest)

    def read(part: str, work: Callable[[], object]) -> None:
        began = time.process_time()
        files, size = reads_of(work)
        seconds = time.process_time() - began
        for unit, number in (("files", files), ("bytes", size)):
            if (part, unit) in BOUNDS:
                found[part, unit] = Measured(number, seconds)

    read("start, a rank reads", partial(world.read, all_files=False))
    read("start, a rank, other layout", world.read_elsewhere)
    read("start, rank 0 reads", partial(world.read, all_files=True))


def _heartbeats(found: Found, folder: Path, world_size: int) -> None:
    rank = world_size // 2
    limits = Timeouts(1.0, 60.0, 60.0, 60.0, 60.0)
    watchdog = Watchdog(
        folder, Member(rank, world_size), limits, lambda text: None, lambda: (0, "", "", 0.0)
    )
    looked_for = watchdog._threads[0]._unseen_ranks
    found["heartbeats, start", "files"] = Measured(len(looked_for))
    observer = Observer(folder, world_size, watchdog._own.process, time.monotonic)

    def read_all() -> float:
        observer.sample()
        return observer.ranks

    found["heartbeats, after a failure", "files"] = _timed(read_all)


def _data(found: Found, layout: Layout) -> None:
    names = tuple(f"chunk_{n:03d}" for n in range(CHUNKS))
    order = ChunkOrder(names, (940 * SEQUENCES,) * CHUNKS, SEQUENCES)

    def held() -> float:
        order.position(order.total_steps)
        return len(json.dumps(vars(order)))

    found["order of the data", "bytes held"] = _timed(held)

    def rows() -> float:
        # What does not divide is refused by a run; here the rest is left out.
        even = SEQUENCES - SEQUENCES % layout.data
        return sum(map(len, rank_rows(range(even), layout.data - 1, layout.data, 1)))

    found["rows of a step, a rank", "rows"] = _timed(rows)


class _Store:
    """A store of torchrun's that takes a state and keeps its length."""

    name = "length"

    def __init__(self) -> None:
        self.bytes = 0

    def get_state(self) -> None:
        """Nothing is there yet."""

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool]:
        """Take the state of the only writer."""
        self.bytes = len(state)
        return state, token, True


def _rendezvous(nodes: int) -> float:
    """Bytes of the state that each launcher reads about once a second."""
    patience = dynamic_rendezvous.RendezvousTimeout()
    settings = dynamic_rendezvous.RendezvousSettings(
        "growth", nodes, nodes, patience, timedelta(seconds=5), 3
    )
    store = _Store()
    holder = dynamic_rendezvous._BackendRendezvousStateHolder(store, settings)
    for number in range(nodes):
        node = dynamic_rendezvous._NodeDesc(f"node{number:05d}.cluster", 10000 + number, 0)
        holder.state.participants[node] = number
        holder.state.last_heartbeats[node] = datetime.now(UTC)
    holder.mark_dirty()
    holder.sync()
    return store.bytes


def exponent(worlds: Sequence[int], numbers: Sequence[float]) -> float:
    """Exponent with which a number grows between the two largest worlds, given in ascending order.

    Up to `plan.connections.FLAT_RANKS` ranks groups are made in another way, so the smallest say
    little of the largest.
    """
    (a, b), (low, high) = worlds[-2:], numbers[-2:]
    return math.log(high / low) / math.log(b / a) if low > 0 and high > 0 else 0.0


def growth_report(folder: Path, worlds: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return the table of all parts on two or more worlds, ascending, and what grows too fast."""
    found = [growth_of(folder, world) for world in worlds]
    rows, problems = [], []
    for (part, unit), bound in BOUNDS.items():
        measured = [one[part, unit] for one in found]
        numbers = [one.number for one in measured]
        grows = exponent(worlds, numbers)
        if grows > bound.exponent + SLACK:
            problems.append(
                f"{part}: {unit} grow with the world's power {grows:.2f}, at most "
                f"{bound.exponent:g} is allowed ({bound.why})"
            )
        rows.append(
            (
                part,
                unit,
                *(f"{number:,.0f}" for number in numbers),
                *(f"{one.seconds:.3f}" for one in measured),
                f"{grows:.2f}",
                f"{bound.exponent:g}",
                bound.why,
            )
        )
    sizes = [f"{world:,}" for world in worlds]
    headings = ("part", "unit", *sizes, *(f"s, {size}" for size in sizes), "grows", "may", "why")
    return table(headings, rows, left=("part", "unit", "why")), problems
