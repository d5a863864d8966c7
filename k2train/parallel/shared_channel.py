"""Sends and receives between two ranks of one machine through shared memory, in place of gloo's.

- A send copies the tensor into free blocks of memory that both ranks map, and tells the other rank
  by notes over a socket (see `shared_memory`). It never waits for the other rank.
- A receive is posted and waited for later, as with gloo. Who waits reads the notes in their order,
  and copies each block to where its tensor was posted, or aside if it was not yet.
- A tensor for which too few blocks are free goes by gloo, and a note says so. So nothing is ever
  queued here, and ranks that also wait for each other elsewhere cannot block each other.
- What is received is what was sent, bit for bit.

Alternatives considered:
- To wait for a free block: two tensor-parallel ranks in an exchange, and their neighbours in the
  pipeline, can then wait in a circle.
- To hand out the shared block without a copy: the first stage's input is kept until its backward,
  and the sender would find no free block.
"""

import mmap
import socket
import struct
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.shared_memory import Notes, connect
from k2train.plan.transfer_memory import CHANNEL_BLOCK_BYTES, CHANNEL_BLOCKS, CHANNEL_BYTES

BLOCK_BYTES, BLOCKS = CHANNEL_BLOCK_BYTES, CHANNEL_BLOCKS
_NOTE = struct.Struct("qqq")
"""(tag, bytes of the tensor, block): a block that is filled. Blocks of a tensor follow each other.
"""
_READ = -1
"""In place of a tag: the other rank has read this block."""
_BY_GLOO = -1
"""In place of a block: the tensor comes by gloo."""


@dataclass
class _Arrival:
    """A tensor that is posted, or on its way: its bytes, and how many are here."""

    bytes: Tensor
    """uint8 [bytes of the tensor]."""
    filled: int = 0
    work: Any = None
    """Its receive by gloo."""


class Receipt:
    """A posted receive."""

    def __init__(self, channel: "SharedChannel", arrival: _Arrival, into: Tensor):
        self._channel, self._arrival, self._into = channel, arrival, into

    def wait(self) -> None:
        """Wait until the tensor is complete.

        Raises RuntimeError when the other rank is gone, or is silent for `SILENT_SECONDS`.
        """
        arrival = self._arrival
        while arrival.work is None and arrival.filled < len(arrival.bytes):
            self._channel.take()
        if arrival.work is not None:
            arrival.work.wait()
        if arrival.bytes is not self._into:
            self._into.copy_(arrival.bytes)


class SharedChannel:
    """Blocks of two ranks, and their notes. One thread of each rank uses it."""

    def __init__(self, memory: mmap.mmap, notes: socket.socket, rank: int):
        """Take over the mapped blocks of both ranks, and a connected socket."""
        blocks = torch.frombuffer(memory, dtype=torch.uint8).view(2, BLOCKS, BLOCK_BYTES)
        self._mine, self._theirs = blocks[rank].unbind(), blocks[1 - rank].unbind()
        self._notes, self._other = Notes(notes, _NOTE.size), 1 - rank
        self.group: dist.ProcessGroup | None = None
        """Group of the two ranks, for what does not fit."""

        # The block that was read last is filled next: it is in the caches.
        self._free = list(range(BLOCKS))
        self._posted: dict[int, deque[_Arrival]] = defaultdict(deque)
        self._early: dict[int, deque[_Arrival]] = defaultdict(deque)
        self._current: _Arrival | None = None
        finalize(self, notes.close)

    def send(self, tensor: Tensor, tag: int) -> Any:
        """Send a contiguous tensor.

        Returns None when it may be overwritten at once, else gloo's work: it must stay until that
        is complete. Raises RuntimeError when the other rank is gone.
        """
        sent = _bytes_of(tensor)
        parts = sent.split(BLOCK_BYTES)
        if len(self._free) < len(parts):
            self._take_what_is_there()
        if len(self._free) < len(parts):
            self._notes.tell(_NOTE.pack(tag, len(sent), _BY_GLOO))
            return dist.isend(tensor, group=self.group, group_dst=self._other, tag=tag)

        for part in parts:
            number = self._free.pop()
            self._mine[number][: len(part)].copy_(part)
            self._notes.tell(_NOTE.pack(tag, len(sent), number))
        return None

    def receive(self, into: Tensor, tag: int) -> Receipt:
        """Post a receive into a contiguous tensor, the next one of this tag."""
        target = _bytes_of(into)
        early = self._early.get(tag)
        if early:
            arrival = early.popleft()
            self._check(arrival, len(target), tag)
        else:
            arrival = _Arrival(target)
            self._posted[tag].append(arrival)
        return Receipt(self, arrival, target)

    def take(self) -> None:
        """Wait for the next note, and do what it says."""
        self._obey(self._notes.hear())

    def _take_what_is_there(self) -> None:
        """Do what the notes say that have come."""
        while (note := self._notes.heard()) is not None:
            self._obey(note)

    def _obey(self, note: bytes) -> None:
        """Free a block of ours, or copy one of the other rank."""
        tag, size, number = _NOTE.unpack(note)
        if tag == _READ:
            self._free.append(number)
            return

        arrival = self._current or self._begun(tag, size)
        if number == _BY_GLOO:
            arrival.work = dist.irecv(
                arrival.bytes, group=self.group, group_src=self._other, tag=tag
            )
            return

        end = min(arrival.filled + BLOCK_BYTES, size)
        part = slice(arrival.filled, end)
        arrival.bytes[part].copy_(self._theirs[number][: end - arrival.filled])
        arrival.filled = end
        self._current = arrival if end < size else None
        self._notes.tell(_NOTE.pack(_READ, 0, number))

    def _begun(self, tag: int, size: int) -> _Arrival:
        """Return where the next tensor of a tag goes."""
        posted = self._posted.get(tag)
        if posted:
            arrival = posted.popleft()
            self._check(arrival, size, tag)
            return arrival
        arrival = _Arrival(torch.empty(size, dtype=torch.uint8))
        self._early[tag].append(arrival)
        return arrival

    @staticmethod
    def _check(arrival: _Arrival, size: int, tag: int) -> None:
        if len(arrival.bytes) != size:
            raise RuntimeError(
                f"shared memory: tensor {tag} has {len(arrival.bytes)} bytes on one rank, {size} "
                "on the other: they are not in one transfer"
            )


def _bytes_of(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as its bytes: uint8 [bytes]."""
    return tensor.detach().view(-1).view(torch.uint8)


def connect_channel(
    size: int, rank: int, group: dist.ProcessGroup | None, device: torch.device
) -> SharedChannel | None:
    """Connect two ranks for sends, or return None on both; `connect` says where. Collective."""
    made = connect(size, rank, group, device, SharedChannel, CHANNEL_BYTES)
    if made is not None:
        made.group = group
    return made
