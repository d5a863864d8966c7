"""Sends through shared memory: the bits that were sent, whatever the order, and never a wait.

The reference is the tensor itself, which both ranks draw from the same seed, and gloo.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.launch.environment import Launch
from k2train.parallel import shared_memory
from k2train.parallel.shared_channel import (
    BLOCK_BYTES,
    BLOCKS,
    SharedChannel,
    connect_channel,
)
from tests.support.gloo_pool import GlooPool
from tests.support.shared_memory import CPU, SIZES, files_left_open, refused

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALL = [(dtype, size) for dtype in DTYPES for size in SIZES]


def connected(launch: Launch) -> SharedChannel:
    channel = connect_channel(2, launch.rank, dist.group.WORLD, CPU)
    assert channel is not None, "two processes of one machine share memory"
    return channel


def drawn(rank: int, tag: int) -> Tensor:
    """The tensor of a tag that `rank` sends: any bits, also those that are no number."""
    dtype, size = ALL[tag % len(ALL)]
    generator = torch.Generator().manual_seed(2 * tag + rank)
    count = size * dtype.itemsize
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype)


def received(channel: SharedChannel, launch: Launch, tags: list[int], late: bool) -> list[int]:
    """Tags whose tensors differ from what the other rank sent.

    Received in this order; `late`: posted when those before it are there, else all at once.
    """
    intos = [torch.zeros_like(drawn(0, tag)) for tag in tags]
    if late:
        for tag, into in zip(tags, intos, strict=True):
            channel.receive(into, tag).wait()
    else:
        receipts = [channel.receive(into, tag) for tag, into in zip(tags, intos, strict=True)]
        for receipt in reversed(receipts):
            receipt.wait()
    return [
        tag
        for tag, into in zip(tags, intos, strict=True)
        if not torch.equal(into.view(torch.uint8), drawn(1 - launch.rank, tag).view(torch.uint8))
    ]


def same_bits_job(launch: Launch) -> list[list[int]]:
    """Both send all, and receive it in other orders; the tags repeat."""
    channel, tags = connected(launch), list(range(len(ALL)))
    wrong = []
    for late in (False, True):
        for order in (tags, tags[::-1], tags[::2] + tags[1::2]):
            works = []
            for tag in tags:
                tensor = drawn(launch.rank, tag)
                work = channel.send(tensor, tag)
                if work is None:
                    # It is not needed any more.
                    tensor.view(torch.uint8).zero_()
                works.append((work, tensor))
            wrong.append(received(channel, launch, order, late))
            for work, _ in works:
                if work is not None:
                    work.wait()
    return wrong


def test_what_arrives_is_what_was_sent(pool: GlooPool) -> None:
    """Catches parts at wrong places, a rest left out, a tensor under another's tag, a block that is
    filled again before it was read, and a send that keeps reading its tensor.
    """
    assert pool.run(2, same_bits_job) == [[[]] * 6] * 2


def ahead_job(launch: Launch) -> tuple[list[bool], list[int], list[bool]]:
    """Rank 0 sends all before rank 1 receives anything: which sends went through memory, what
    arrived wrong, and which went through memory once all was read.
    """
    channel, count = connected(launch), BLOCKS + 3
    tensors = [torch.full((BLOCK_BYTES // 8,), float(n)) for n in range(count)]
    went, wrong = [], []
    again: list[bool] = []
    if launch.rank == 0:
        works = [channel.send(tensor, n) for n, tensor in enumerate(tensors)]
        dist.barrier()
        went = [work is None for work in works]
        for work in works[BLOCKS:]:
            work.wait()
    else:
        dist.barrier()
        intos = [torch.empty_like(tensor) for tensor in tensors]
        for n in reversed(range(count)):
            channel.receive(intos[n], n).wait()
        wrong = [n for n in range(count) if not torch.equal(intos[n], tensors[n])]
    dist.barrier()

    if launch.rank == 0:
        again = [channel.send(tensor, n) is None for n, tensor in enumerate(tensors[:BLOCKS])]
    dist.barrier()
    return went, wrong, again


def test_a_send_never_waits_for_the_other_rank(pool: GlooPool) -> None:
    """Catches a send that blocks while the other rank is elsewhere, one that is lost, and blocks
    that are never free again.
    """
    (went, _, again), (_, wrong, _) = pool.run(2, ahead_job)
    assert went == [True] * BLOCKS + [False] * 3
    assert (wrong, again) == ([], [True] * BLOCKS)


def gone_job(launch: Launch, sends: bool) -> str:
    channel = connected(launch)
    if launch.rank == 1:
        del channel
        dist.barrier()
        return "gone"
    dist.barrier()
    if sends:
        return refused(lambda: channel.send(torch.zeros(4), 0))
    return refused(channel.receive(torch.zeros(4), 0).wait)


def test_a_rank_that_is_gone_ends_the_wait(pool: GlooPool) -> None:
    """Catches a survivor that waits for an hour, and an error that no collective's reader knows."""
    for sends in (False, True):
        told, _ = pool.run(2, gone_job, sends)
        assert told.startswith("shared memory: connection "), told


def silent_job(launch: Launch) -> str:
    kept, shared_memory.SILENT_SECONDS = shared_memory.SILENT_SECONDS, 1
    try:
        channel = connected(launch)
        told = refused(channel.receive(torch.zeros(4), 0).wait) if launch.rank == 0 else ""
    finally:
        shared_memory.SILENT_SECONDS = kept
    dist.barrier()
    return told


def test_a_silent_rank_is_not_waited_for_without_end(pool: GlooPool) -> None:
    """Catches a read without a limit."""
    assert pool.run(2, silent_job)[0] == "shared memory: nothing from the other rank for 1 s"


def unlike_job(launch: Launch, late: bool) -> str:
    channel, told = connected(launch), ""
    if launch.rank == 0:
        channel.send(torch.zeros(5), 6)
        channel.send(torch.zeros(4), 7)
    elif late:
        channel.receive(torch.zeros(4), 7).wait()
        told = refused(lambda: channel.receive(torch.zeros(4), 6).wait())
    else:
        told = refused(channel.receive(torch.zeros(4), 6).wait)
    dist.barrier()
    return told


def test_another_size_is_told(pool: GlooPool) -> None:
    """Catches half a tensor, or one beyond its end, whether it came before its post or after."""
    for late, sizes in ((False, "16 bytes on one rank, 20"), (True, "20 bytes on one rank, 16")):
        _, told = pool.run(2, unlike_job, late)
        assert told.startswith(f"shared memory: tensor 6 has {sizes} on the other: "), told


def open_files_job(launch: Launch) -> int:
    return files_left_open(lambda: connected(launch), 10)


def test_a_channel_that_is_dropped_leaves_nothing_open(pool: GlooPool) -> None:
    """Catches a socket or a mapping for each time that a run goes back to a checkpoint."""
    assert pool.run(2, open_files_job) == [0, 0]
