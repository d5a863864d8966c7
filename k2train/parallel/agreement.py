"""Collective agreement on host objects: all ranks get the same result or raise the same error.

- Saving uses the background group, so that its thread never meets training collectives.
- A rank that failed alone would leave the others in the next collective until the group's timeout.
- Objects travel as JSON of an agreed form (`parallel/messages`), never as pickles: first the
  lengths, then the bytes.
- Where nobody has anything to say, or all the same, one number is reduced: what a rank sends and
  receives does not grow with the world. Only `all` gathers on every rank, and `to_first` on one.

Alternatives considered:
- torch's collectives of objects: they unpickle what comes over the network.
- Messages of their exact lengths, one broadcast for each rank: a thousand collectives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from k2train.errors import UnavailableError, UserError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import (
    MAX_BYTES,
    PROBLEM,
    TEXT,
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

        failure = self.lowest(None if problem is None else ErrorFacts.of(problem), PROBLEM)
        if failure is not None and failure[1] is not None:
            raise failure[1].error()
        result: T = value
        return result

    def all(self, value: T, form: TypeAdapter[T], what: str = "") -> list[T]:
        """Gather every rank's value on every rank."""
        content = encode(value, form)
        with collective_scope(self.comm, what):
            lengths = self._lengths(content)
            rows = None
            if _is_sent(lengths):
                rows = self.group.all_gather(_row(content, max(lengths)))
        # After the collective's scope: no connection was lost.
        if problem := _problem(lengths):
            raise MessageError(problem)
        if rows is None:
            return [decode(b"", form)] * self.world_size
        return [
            decode(row[:length].tobytes(), form)
            for row, length in zip(rows.numpy(), lengths, strict=True)
        ]

    def distinct(self, value: T, form: TypeAdapter[T], what: str = "") -> list[T]:
        """Gather the values that differ on every rank: each from its lowest rank.

        For tables that most ranks share: what is sent does not grow with the world.
        """
        content, found = encode(value, form), list[_Message]()
        with collective_scope(self.comm, what):
            # A rank whose value another has sent has nothing more to say.
            while not (found and found[-1].problem):
                told = any(one.content == content for one in found)
                if (rank := self._lowest_rank(not told)) == self.world_size:
                    break
                found.append(self._broadcast(content, rank))
        return [one.decoded(form) for one in found]

    def lowest(self, value: T | None, form: TypeAdapter[T], what: str = "") -> tuple[int, T] | None:
        """Return the lowest rank whose value is not None, and that value; None if nobody has one.

        For what mostly nobody has: then one number is exchanged.
        """
        content = encode(value, form) if value is not None else b""
        with collective_scope(self.comm, what):
            rank = self._lowest_rank(value is not None)
            if rank == self.world_size:
                return None
            message = self._broadcast(content, rank)
        return rank, message.decoded(form)

    def first(self, problem: Problem, what: str = "") -> tuple[int, str] | None:
        """Return the lowest rank with a problem, and its problem; None when no rank has one.

        Raises UnavailableError on every rank when one of them could not look.
        """
        text, away = str(problem), isinstance(problem, UnavailableError)
        content = encode(text, TEXT)
        with collective_scope(self.comm, what):
            ranks = self._lowest_ranks(bool(text) and away, bool(text))
            rank = min(ranks) if ranks[0] == self.world_size else ranks[0]
            if rank == self.world_size:
                return None
            message = self._broadcast(content, rank)
        told = message.decoded(TEXT)
        if ranks[0] < self.world_size:
            raise UnavailableError(f"rank {rank}: {told}")
        return rank, told

    def to_first(self, row: torch.Tensor) -> torch.Tensor:
        """Gather every rank's host tensor [...] on rank 0 as [world, ...]; others get an empty one.

        Tensors, because objects of a large world take seconds to make.
        """
        return self.group.gather(row)

    def from_first(self, value: T, form: TypeAdapter[T], what: str = "") -> T:
        """Broadcast rank 0's value to every rank. The values of other ranks are not used."""
        content = encode(value, form) if self.rank == 0 else b""
        with collective_scope(self.comm, what):
            message = self._broadcast(content, 0)
        return message.decoded(form)

    def sum(self, value: torch.Tensor, what: str = "") -> torch.Tensor:
        """Sum a host tensor over all ranks, in place."""
        with collective_scope(self.comm, what):
            self.group.all_reduce(value)
        return value

    def largest(self, value: torch.Tensor, what: str = "") -> torch.Tensor:
        """Take the maximum of a host tensor over all ranks, in place."""
        with collective_scope(self.comm, what):
            self.group.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def _broadcast(self, content: bytes, source: int) -> "_Message":
        """Send the message of rank `source` to all, first its length; one too long is not sent."""
        length = torch.tensor([len(content) if self.rank == source else 0])
        self.group.broadcast(length, source)
        message = _Message(source, int(length), b"")
        if message.length == 0 or message.problem:
            return message
        row = _row(content if self.rank == source else b"", message.length)
        self.group.broadcast(row, source)
        return message._replace(content=row.numpy().tobytes())

    def _lowest_rank(self, has: bool) -> int:
        """Lowest rank for which it is so; `world_size` where it is for none."""
        return self._lowest_ranks(has)[0]

    def _lowest_ranks(self, *has: bool) -> list[int]:
        """Return that rank for each of several questions, in one exchange."""
        ranks = torch.tensor([self.rank if one else self.world_size for one in has])
        self.group.all_reduce(ranks, op=dist.ReduceOp.MIN)
        found: list[int] = ranks.tolist()
        return found

    def _lengths(self, content: bytes) -> list[int]:
        """Bytes of every rank's message."""
        lengths = self.group.all_gather(torch.tensor([len(content)]))
        found: list[int] = lengths.flatten().tolist()
        return found


class _Message(NamedTuple):
    """What one rank sent to all."""

    source: int
    length: int
    content: bytes
    """Nothing if it was too long."""

    @property
    def problem(self) -> str:
        """Why it was not sent; "" if it was. All ranks say the same."""
        if 0 <= self.length <= MAX_BYTES:
            return ""
        return _too_long(self.source, self.length)

    def decoded(self, form: TypeAdapter[T]) -> T:
        """The value. Raises MessageError."""
        if self.problem:
            raise MessageError(self.problem)
        return decode(self.content, form)


def _too_long(rank: int, length: int) -> str:
    return f"rank {rank} would send {length} bytes to other ranks at once, the limit is {MAX_BYTES}"


def _problem(lengths: list[int]) -> str:
    """Say which message is too long; "" if none is. All ranks say the same."""
    longest = max(lengths)
    if not 0 <= min(lengths) <= longest <= MAX_BYTES:
        return _too_long(lengths.index(longest), longest)
    if longest * len(lengths) > MAX_GATHERED_BYTES:
        return (
            f"{len(lengths)} messages of up to {longest} bytes are more than a rank takes at once "
            f"({MAX_GATHERED_BYTES} bytes)"
        )
    return ""


def _is_sent(lengths: list[int]) -> bool:
    """Return whether any byte follows the lengths."""
    return max(lengths) > 0 and not _problem(lengths)


def _row(content: bytes, length: int) -> torch.Tensor:
    """The message as bytes [length], with zeros after its end."""
    row = torch.zeros(length, dtype=torch.uint8)
    if content:
        row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return row
