"""Collective agreement on host objects: all ranks get the same result or raise the same error.

- Saving uses the background group, so that its thread never meets training collectives.
- A rank that failed alone would leave the others in the next collective until the group's timeout.
- Objects travel as JSON of an agreed form (`parallel/messages`), never as pickles: first the
  lengths, then the bytes.

Alternatives considered:
- torch's collectives of objects: they unpickle what comes over the network.
- Messages of their exact lengths, one broadcast for each rank: a thousand collectives.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from k2train.errors import UnavailableError, UserError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import (
    MAX_BYTES,
    PROBLEM,
    DiskRefused,
    ErrorFacts,
    MessageError,
    SaveError,
    decode,
    encode,
)

__all__ = ["Agreement", "DiskRefused", "Problem", "SaveError"]

T = TypeVar("T")
MAX_GATHERED_BYTES = 2**33
"""Limit of what one rank receives in an exchange, each message as long as the longest."""
Problem = str | UnavailableError
"""What is wrong ("" for nothing), or why a rank cannot say."""

_TOLD = TypeAdapter(tuple[str, bool])


class Agreement:
    """Exchange of small values between all ranks. Every method is collective.

    - `form` says what a value is, for sender and receiver. Every method raises MessageError on
      every rank when a message is too long.
    - In the group of the main thread. `what` names an exchange for the watchdog: without a name, it
      would take the ranks that wait in it for stuck.
    - `background`: in the group of the saving thread, which has no phase of its own.
    """

    def __init__(self, grid: ProcessGrid, background: bool = False):
        self.group = grid.background if background else grid.host
        self.comm = None if background else grid.comm
        self.rank, self.world_size = grid.rank, grid.layout.world_size

    def do(self, part: Callable[[], T], refused: Callable[[OSError], SaveError]) -> T:
        """Run `part` on every rank; every rank raises the first error there was.

        Returns this rank's result. `refused` turns an OSError into the SaveError to raise. Errors
        arrive as their kind in `messages.KINDS`; bugs are a SaveError with their text.
        """
        value: Any = None
        problem: Exception | None = None
        try:
            value = part()
        except OSError as error:
            problem = refused(error)
        except (UserError, SaveError, UnavailableError) as error:
            problem = error
        except Exception as error:
            # The other ranks must learn of any error, or they would wait for this rank.
            problem = SaveError(f"a checkpoint could not be saved: rank {self.rank}: {error!r}")

        for failure in self.all(None if problem is None else ErrorFacts.of(problem), PROBLEM):
            if failure is not None:
                raise failure.error()
        result: T = value
        return result

    def all(self, value: T, form: TypeAdapter[T], what: str = "") -> list[T]:
        """Gather every rank's value on every rank."""
        content = encode(value, form)
        with collective_scope(self.comm, what):
            lengths = self._lengths(content)
            received = _rows(lengths)
            if received:
                dist.all_gather(received, _row(content, lengths), group=self.group)
        return _decoded(received, lengths, form)

    def distinct(self, value: T, form: TypeAdapter[T], what: str = "") -> list[T]:
        """Gather the values that differ on every rank: each from its lowest rank.

        For tables that most ranks share: what is sent does not grow with the world.
        """
        content = encode(value, form)
        mine = torch.frombuffer(bytearray(sha256(content).digest()), dtype=torch.uint8)
        hashes = torch.empty(self.world_size, mine.numel(), dtype=torch.uint8)
        with collective_scope(self.comm, what):
            dist.all_gather(list(hashes.unbind()), mine, group=self.group)

        rows = map(bytes, hashes.numpy())
        holders = {row: rank for rank, row in reversed(list(enumerate(rows)))}
        return [self._broadcast(content, rank, form, what) for rank in sorted(holders.values())]

    def first(self, problem: Problem, what: str = "") -> tuple[int, str] | None:
        """Return the lowest rank with a problem, and its problem; None when no rank has one.

        Raises UnavailableError on every rank when one of them could not look.
        """
        told = self.all((str(problem), isinstance(problem, UnavailableError)), _TOLD, what)
        problems = [(rank, text, away) for rank, (text, away) in enumerate(told) if text]
        for rank, text, away in problems:
            if away:
                raise UnavailableError(f"rank {rank}: {text}")
        return problems[0][:2] if problems else None

    def to_first(self, row: torch.Tensor) -> torch.Tensor:
        """Gather every rank's host tensor [...] on rank 0 as [world, ...]; others get an empty one.

        Tensors, because objects of a large world take seconds to make.
        """
        rows = row.new_empty((self.world_size if self.rank == 0 else 0, *row.shape))
        dist.gather(row, list(rows.unbind()) or None, dst=0, group=self.group)
        return rows

    def from_first(self, value: T, form: TypeAdapter[T], what: str = "") -> T:
        """Broadcast rank 0's value to every rank. The values of other ranks are not used."""
        content = encode(value, form) if self.rank == 0 else b""
        return self._broadcast(content, 0, form, what)

    def _broadcast(self, content: bytes, source: int, form: TypeAdapter[T], what: str) -> T:
        """Return the value whose message is `content` on rank `source`."""
        length = torch.tensor([len(content) if self.rank == source else 0])
        with collective_scope(self.comm, what):
            dist.broadcast(length, src=source, group=self.group)
            lengths = [int(length)]
            if not _is_sent(lengths):
                row = None
            else:
                row = _row(content if self.rank == source else b"", lengths)
                dist.broadcast(row, src=source, group=self.group)
        return _decoded([] if row is None else [row], lengths, form)[0]

    def sum(self, value: torch.Tensor, what: str = "") -> torch.Tensor:
        """Sum a host tensor of integers over all ranks, in place."""
        with collective_scope(self.comm, what):
            dist.all_reduce(value, group=self.group)
        return value

    def _lengths(self, content: bytes) -> list[int]:
        """Bytes of every rank's message."""
        lengths = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_gather(list(lengths.split(1)), torch.tensor([len(content)]), group=self.group)
        found: list[int] = lengths.tolist()
        return found


def _problem(lengths: list[int]) -> str:
    """Say which message is too long; "" if none is. All ranks say the same."""
    longest = max(lengths)
    if not 0 <= min(lengths) <= longest <= MAX_BYTES:
        return (
            f"rank {lengths.index(longest)} would send {longest} bytes to other ranks at once, "
            f"the limit is {MAX_BYTES}"
        )
    if longest * len(lengths) > MAX_GATHERED_BYTES:
        return (
            f"{len(lengths)} messages of up to {longest} bytes are more than a rank takes at once "
            f"({MAX_GATHERED_BYTES} bytes)"
        )
    return ""


def _refuse_if_too_long(lengths: list[int]) -> None:
    if problem := _problem(lengths):
        raise MessageError(problem)


def _is_sent(lengths: list[int]) -> bool:
    """Return whether any byte follows the lengths."""
    return max(lengths) > 0 and not _problem(lengths)


def _row(content: bytes, lengths: list[int]) -> torch.Tensor:
    """The message as bytes [longest], with zeros after its end."""
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    if content:
        row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return row


def _rows(lengths: list[int]) -> list[torch.Tensor]:
    """Room for the messages of all ranks, each [longest]; none where nothing is sent."""
    if not _is_sent(lengths):
        return []
    return list(torch.zeros(len(lengths), max(lengths), dtype=torch.uint8))


def _decoded(received: list[torch.Tensor], lengths: list[int], form: TypeAdapter[T]) -> list[T]:
    """The values of all messages. Raises MessageError when one was too long to be sent.

    After the collective's scope: no connection was lost.
    """
    _refuse_if_too_long(lengths)
    if not received:
        return [decode(b"", form) for _ in lengths]
    return [
        decode(row[:length].numpy().tobytes(), form)
        for row, length in zip(received, lengths, strict=True)
    ]
