"""Transfers through shared memory against gloo's, and what happens when the other rank is gone.

The reference is gloo, which we did not write: every result must have its bits.
"""

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
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
from k2train.parallel.shared_pair import BLOCK_BYTES, SharedPair, connect_pair
from tests.support.gloo_pool import GlooPool
from tests.support.shared_memory import (
    CPU,
    differences,
    files_left_open,
    open_files,
    refused,
    silent_after,
)

SILENT = "shared memory: nothing from the other rank for 1 s"


def axis_of(launch: Launch) -> Axis:
    group = dist.group.WORLD
    assert group is not None
    axis = Axis("tp", launch.world_size, launch.rank, group)
    return replace(axis, pair=connect_pair(2, launch.rank, group, CPU))


def connected(launch: Launch) -> SharedPair:
    pair = axis_of(launch).pair
    assert pair is not None, "two processes of one machine share memory"
    return pair


def random(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 1000).to(dtype)


def results(axis: Axis, dtype: torch.dtype, size: int) -> list[Tensor]:
    """Of every collective, also of tensors with gaps."""
    x = random(dtype, 7 * size + axis.rank, 2 * size)
    shards = random(dtype, size + axis.rank, 2, size)
    gaps = random(dtype, axis.rank, 2, 5, 6)[:, :, ::2]
    return [
        all_reduce(x.clone(), axis),
        all_reduce(x.clone(), axis, dist.ReduceOp.MAX),
        all_gather(x, axis),
        reduce_scatter(x, axis),
        gather_shards(shards, axis, wait=True).wait(),
        all_reduce(gaps.clone(memory_format=torch.preserve_format), axis),
        all_gather(gaps, axis),
        reduce_scatter(gaps, axis),
    ]


def same_bits_job(launch: Launch) -> list[str]:
    shared = axis_of(launch)
    assert shared.pair is not None
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    return differences(results, shared, dtypes)


def test_the_bits_are_those_of_gloo(pool: GlooPool) -> None:
    """Catches parts at wrong places, a rest that is left out, a sum of the wrong rows, and one
    that is rounded elsewhere.
    """
    assert pool.run(2, same_bits_job) == [[], []]


def slow_job(launch: Launch) -> bool:
    """Rank 1 reads each block after rank 0 had time to write the next ones."""
    pair, parts = connected(launch), 5
    mine = torch.arange(parts * BLOCK_BYTES // 8) + launch.rank
    found = torch.zeros_like(mine)

    def receive(part: slice, theirs: Tensor) -> None:
        if launch.rank == 1:
            time.sleep(0.05)
        found[part] = theirs

    pair.exchange(mine, receive)
    return torch.equal(found, torch.arange(len(mine)) + 1 - launch.rank)


def test_no_block_is_written_before_it_was_read(pool: GlooPool) -> None:
    """Catches one block instead of two: a fast rank would send a slow one the next numbers."""
    assert pool.run(2, slow_job) == [True, True]


UNLIKE: dict[str, Callable[[SharedPair, int], None]] = {
    "another size": lambda pair, rank: pair.exchange(torch.zeros(4 + rank), _ignored),
    "another dtype of as many bytes": lambda pair, rank: pair.exchange(
        torch.zeros(8 if rank else 4, dtype=(torch.bfloat16, torch.float32)[1 - rank]), _ignored
    ),
    "another collective": lambda pair, rank: pair.exchange(
        torch.zeros(4), _ignored, ("all-gather tp", "all-reduce tp")[rank]
    ),
    "one block of a larger one": lambda pair, rank: pair.exchange(
        torch.zeros((1 + rank) * BLOCK_BYTES // 4), _ignored
    ),
}
"""What two ranks do that are not in one collective."""


def _ignored(part: slice, theirs: Tensor) -> None:
    pass


def unlike_job(launch: Launch, case: str) -> str:
    pair = connected(launch)
    return refused(lambda: UNLIKE[case](pair, launch.rank))


@pytest.mark.parametrize("case", UNLIKE)
def test_ranks_in_unlike_exchanges_are_told(pool: GlooPool, case: str) -> None:
    """Catches the numbers of another exchange taken for those of this one, also where both have
    as many bytes.
    """
    first, second = pool.run(2, unlike_job, case)
    start = "shared memory: this rank is in "
    assert first.startswith(start) and second.startswith(start)
    mine, theirs = (told.removeprefix(start).split(", the other in ") for told in (first, second))
    assert mine[0] == theirs[1].split(": ")[0] != theirs[0] == mine[1].split(": ")[0]


def gradient_job(launch: Launch) -> tuple[bool, bool]:
    """Whether a sum of tensors that require gradients is right, and has no history after it."""
    axis = axis_of(launch)
    assert axis.pair is not None
    x = torch.ones(3, requires_grad=True) * (launch.rank + 1)
    found = torch.zeros(3)
    for _ in range(3):
        axis.pair.exchange(x, lambda part, theirs: found[part].copy_(theirs))
    return torch.equal(found, torch.full((3,), 2.0 - launch.rank)), axis.pair.blocks.requires_grad


def test_what_is_sent_has_no_history(pool: GlooPool) -> None:
    """Catches blocks that autograd records, and keeps the graph of everything sent."""
    assert pool.run(2, gradient_job) == [(True, False)] * 2


def gone_job(launch: Launch) -> str:
    pair = connected(launch)
    if launch.rank == 1:
        del pair
        return "gone"
    # The second note meets a closed socket in any case.
    for _ in range(2):
        told = refused(lambda: pair.exchange(torch.zeros(4), lambda part, theirs: None))
    return told


def test_a_rank_that_is_gone_ends_the_wait(pool: GlooPool) -> None:
    """Catches a survivor that waits for an hour, and an error that no collective's reader knows."""
    told, _ = pool.run(2, gone_job)
    assert told.startswith("shared memory: connection ")


def test_notes_have_a_limit_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a read or a write that waits without end for a rank that is there and does nothing.

    The limits are looked at first: without them this test would wait as long.
    """
    monkeypatch.setattr(shared_memory, "SILENT_SECONDS", 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        notes = shared_memory.Notes(ours, 8)
        limit = struct.pack("ll", 1, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            assert ours.getsockopt(socket.SOL_SOCKET, option, len(limit)) == limit

        def fill() -> None:
            while True:
                notes.tell(bytes(8))

        assert refused(notes.hear) == SILENT
        assert refused(fill) == SILENT


def silent_job(launch: Launch) -> str:
    told = "slept"
    with silent_after(1):
        pair = connected(launch)
        if launch.rank == 0:
            told = refused(lambda: pair.exchange(torch.zeros(4), lambda part, theirs: None))
    dist.barrier()
    return told


def test_a_silent_rank_is_not_waited_for_without_end(pool: GlooPool) -> None:
    """Catches a read without a limit."""
    assert pool.run(2, silent_job)[0] == SILENT


BROKEN: dict[str, tuple[int, Any, str]] = {
    "no memory": (0, shared_memory, "_new_memory"),
    "no socket to listen": (0, shared_memory, "_unix_socket"),
    "no socket to call": (1, shared_memory, "_unix_socket"),
    "no way to the other": (1, shared_memory, "_address"),
    "nothing arrives": (0, socket, "send_fds"),
    "no mapping": (1, shared_memory.mmap, "mmap"),
}


def cannot_job(launch: Launch, case: str) -> tuple[bool, int, int]:
    """With one rank's part broken: whether there is a pair, a sum by gloo, and files left open."""
    rank, where, name = BROKEN[case]

    def fails(*given: Any, **named: Any) -> Any:
        raise OSError("not here")

    before, kept = open_files(), getattr(where, name)
    if launch.rank == rank:
        setattr(where, name, fails)
    try:
        axis = axis_of(launch)
    finally:
        setattr(where, name, kept)
    left = open_files() - before
    return axis.pair is None, int(all_reduce(torch.tensor([launch.rank + 1]), axis)), left


@pytest.mark.parametrize("case", BROKEN)
def test_where_one_cannot_both_keep_gloo(pool: GlooPool, case: str) -> None:
    """Catches ranks that decide unlike, which would wait for each other, and open files."""
    assert pool.run(2, cannot_job, case) == [(True, 3, 0)] * 2


def stranger_job(launch: Launch) -> tuple[bytes, int]:
    """Who calls before rank 1, without the secret: what it receives; and what rank 1 receives."""
    group, told = dist.group.WORLD, shared_memory._told
    assert group is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:

        def told_and_called(secret: bytes, group: Any) -> bytes:
            found = told(secret, group)
            if launch.rank == 1:
                stranger.connect(shared_memory._address(found))
                stranger.send(bytes(len(found)))
            return found

        shared_memory._told = told_and_called
        try:
            pair = connect_pair(2, launch.rank, group, CPU)
        finally:
            shared_memory._told = told
        got = stranger.recv(8) if launch.rank == 1 else b""

    assert pair is not None
    found = torch.zeros(1)
    pair.exchange(torch.ones(1) + launch.rank, lambda part, theirs: found.copy_(theirs))
    return got, int(found)


def test_memory_goes_to_who_knows_the_secret(pool: GlooPool) -> None:
    """Catches gradients of a run that any process of the machine may read and write."""
    assert pool.run(2, stranger_job) == [(b"", 2), (b"", 1)]


def open_files_job(launch: Launch) -> int:
    return files_left_open(lambda: connected(launch), 10)


def test_a_pair_that_is_dropped_leaves_nothing_open(pool: GlooPool) -> None:
    """Catches a socket or a mapping for each time that a run goes back to a checkpoint."""
    assert pool.run(2, open_files_job) == [0, 0]
