"""Memory that two ranks of one machine map, and the socket of their notes: how they connect.

- The transports in it are `shared_pair`, `shared_mesh` and `shared_channel`. A note of a few bytes
  says that a block of the memory is complete; it also orders the memory accesses of the two
  processors.
- The memory has no name and the socket no file (`memfd_create`, abstract Unix socket), so nothing
  is left by a rank that is killed. Its socket then closes, and the other rank's read ends at once.
- Whoever cannot be reached this way (another machine, another network namespace, another user, no
  Linux) keeps gloo; both ranks decide alike.

Alternatives considered:
- A counter in the shared memory, polled: processors other than x86 may show it before the data.
- The socket for the data as well: two copies by the kernel instead of none.
- A collective library in C++: a compiler at the installation, or wheels for each platform.
"""

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SILENT_SECONDS = 3600
"""Longest wait for the other rank, as in a gloo group of the world: rank 0 may read files."""
CONNECT_SECONDS = 60.0
"""Longest wait for the other rank while connecting."""
_SECRET_BYTES = 16

Transport = TypeVar("Transport")
Connected = tuple[mmap.mmap, socket.socket]
"""The mapped memory of two ranks, and the socket of their notes."""


class Notes:
    """Notes of at most `size_bytes` between two ranks, in order."""

    def __init__(self, connected: socket.socket, size_bytes: int):
        """Take over a connected socket."""
        self._socket, self._size_bytes = connected, size_bytes
        connected.setblocking(True)
        limit = struct.pack("ll", SILENT_SECONDS, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connected.setsockopt(socket.SOL_SOCKET, option, limit)

    def tell(self, note: bytes) -> None:
        """Send a note. Raises RuntimeError when the other rank is gone or reads nothing."""
        try:
            self._socket.send(note)
        except BlockingIOError:
            raise _silent() from None
        except OSError as error:
            raise _reset(error) from error

    def hear(self) -> bytes:
        """Wait for the next note. Raises RuntimeError when the other rank is gone or silent."""
        try:
            return _checked(self._socket.recv(self._size_bytes))
        except BlockingIOError:
            raise _silent() from None
        except OSError as error:
            raise _reset(error) from error

    def heard(self) -> bytes | None:
        """Return the next note if it is there. Raises RuntimeError when the other rank is gone."""
        try:
            return _checked(self._socket.recv(self._size_bytes, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        except OSError as error:
            raise _reset(error) from error


def _checked(note: bytes) -> bytes:
    if not note:
        raise RuntimeError("shared memory: connection closed by the other rank")
    return note


def _silent() -> RuntimeError:
    return RuntimeError(f"shared memory: nothing from the other rank for {SILENT_SECONDS} s")


def _reset(error: OSError) -> RuntimeError:
    return RuntimeError(f"shared memory: connection reset: {error}")


@dataclass(frozen=True)
class TwoOfGroup:
    """Two ranks of a larger group, which tell each other of their memory through it."""

    group: dist.ProcessGroup
    other: int
    """The other one's rank in the group."""
    is_first: bool

    def pass_on(self, x: Tensor, from_first: bool) -> None:
        """Send `x` on one of the two, and fill it on the other. Collective of both."""
        if from_first == self.is_first:
            dist.send(x, group=self.group, group_dst=self.other)
        else:
            dist.recv(x, group=self.group, group_src=self.other)


Between: TypeAlias = dist.ProcessGroup | TwoOfGroup
"""How two ranks tell each other of their memory."""


def in_host_memory(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether a group's transfers are gloo's, between tensors of a CPU."""
    return group is not None and device.type == "cpu" and dist.get_backend(group) == "gloo"


def connect(
    size: int,
    rank: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    make: Callable[[mmap.mmap, socket.socket, int], Transport],
    memory_bytes: int,
) -> Transport | None:
    """Connect the two ranks of a group whose tensors are on `device`. Collective.

    - `rank` is the rank in the group of `size`.
    - `make` takes over the memory, the socket of the notes, and the rank.

    None, on both ranks alike, where they are not two ranks of gloo in host memory, or cannot share
    memory.
    """
    if size != 2 or group is None or not in_host_memory(group, device):
        return None
    return connect_through(group, rank, make, memory_bytes)


def connect_through(
    group: Between,
    rank: int,
    make: Callable[[mmap.mmap, socket.socket, int], Transport],
    memory_bytes: int,
) -> Transport | None:
    """Connect two ranks of host memory, of which `rank` (0 or 1) is one. Collective of both."""
    with ExitStack() as opened:
        connected = (_offer if rank == 0 else _take)(group, opened, memory_bytes)
        made = None if connected is None else make(*connected, rank)
    # A rank that failed has closed its socket, so the other did not wait for it.
    return made if _agreed(made is not None, group) else None


def _offer(group: Between, opened: ExitStack, memory_bytes: int) -> Connected | None:
    """Rank 0: make the memory, tell the other where it is, and hand it over."""
    secret = secrets.token_bytes(2 * _SECRET_BYTES)
    try:
        memory = opened.enter_context(_new_memory(memory_bytes))
        listener = opened.enter_context(_unix_socket())
        listener.bind(_address(secret))
        listener.listen()
        listener.settimeout(CONNECT_SECONDS)
    except OSError:
        secret = bytes(len(secret))

    told = _told(secret, group)
    if not _agreed(any(told), group):
        return None
    try:
        notes = opened.enter_context(_caller(listener, secret))
        socket.send_fds(notes, [b"m"], [memory.fileno()])
        return mmap.mmap(memory.fileno(), memory_bytes), notes.dup()
    except OSError:
        return None


def _take(group: Between, opened: ExitStack, memory_bytes: int) -> Connected | None:
    """Rank 1: connect to rank 0, and take the memory."""
    secret = _told(bytes(2 * _SECRET_BYTES), group)
    connected = any(secret)
    try:
        # Inside: some systems have no such sockets.
        notes = opened.enter_context(_unix_socket())
        notes.settimeout(CONNECT_SECONDS)
        if connected:
            notes.connect(_address(secret))
            notes.send(secret)
    except OSError:
        connected = False

    if not _agreed(connected, group):
        return None
    try:
        _, files, _, _ = socket.recv_fds(notes, 1, 1)
        memory = opened.enter_context(os.fdopen(files[0], "r+b", buffering=0))
        return mmap.mmap(memory.fileno(), memory_bytes), notes.dup()
    except (OSError, ValueError, IndexError):
        return None


def _new_memory(memory_bytes: int) -> BinaryIO:
    """Make memory without a name, and reserve it: a write must not find that there is none."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memory without a name")
    memory: BinaryIO = os.fdopen(os.memfd_create("k2train"), "r+b", buffering=0)
    try:
        os.posix_fallocate(memory.fileno(), 0, memory_bytes)
    except OSError:
        memory.close()
        raise
    return memory


def _unix_socket() -> socket.socket:
    """Return a socket that keeps notes apart."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _address(secret: bytes) -> bytes:
    """Return the abstract address: seen in one network namespace, and gone with its socket."""
    return b"\0k2train-" + secret[:_SECRET_BYTES].hex().encode()


def _caller(listener: socket.socket, secret: bytes) -> socket.socket:
    """Accept the rank that knows the secret: any process of this machine may call."""
    while True:
        notes, _ = listener.accept()
        notes.settimeout(CONNECT_SECONDS)
        if secrets.compare_digest(notes.recv(len(secret)), secret):
            return notes
        notes.close()


def _told(secret: bytes, group: Between) -> bytes:
    """Return the secret of rank 0. Collective."""
    sent = torch.tensor(list(secret), dtype=torch.uint8)
    if isinstance(group, TwoOfGroup):
        group.pass_on(sent, from_first=True)
    else:
        dist.broadcast(sent, group_src=0, group=group)
    return bytes(sent.tolist())


def _agreed(can: bool, group: Between) -> bool:
    """Whether both ranks can. Collective."""
    both = torch.tensor([int(can)])
    if isinstance(group, TwoOfGroup):
        first, second = both.clone(), both.clone()
        group.pass_on(first, from_first=True)
        group.pass_on(second, from_first=False)
        both = first * second
    else:
        dist.all_reduce(both, dist.ReduceOp.MIN, group=group)
    return bool(both.item())
