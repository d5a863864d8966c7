"""Heartbeat files: each rank's current position in `watch/rank_00003.json`, read after a failure.

- A file has a fixed length and ends with a checksum. One write in place costs a shared file system
  no new name and needs no space on a full disk. A reader that sees half a write reads again.
- It is opened and closed each time, so that NFS publishes it.
- No reader uses its wall clock. A rank is alive when its `beat` increases while the reader's own
  monotonic clock runs, or, on the same machine, according to /proc.

Alternatives considered:
- A server that ranks report to: one more process to lose, and nothing is left to read afterwards.
- Messages over the process group: that is what hangs.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.errors import EXIT_USAGE
from k2train.processes import Process, ProcessState, process_state

LENGTH_BYTES = 1536
CHECK_BYTES = 23
TEXT_LIMIT = 160
OPEN_STATES = ("", "stalled")
"""States of a rank that is still at work. The others have announced their exit."""
PHASES = {
    "step": "forward/backward",
    "choose": "choosing a checkpoint",
    "connect": "making contact in each group",
    "load": "loading a checkpoint",
}
"""Display names of phases whose key is not clear enough."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reports about itself.

    - `count`, `current`, `last`: its collectives, see `parallel.comm_tracker`.
    - `state`: "" at work, "stalled" over its timeout, "leaving" after another rank was lost,
      "failed" by itself (`problem`), "closed".
    - `code`: the exit code with which it ends, where it has said so; 0 otherwise.
    - `seconds`: time since the current step, save or evaluation began or made progress, by its
      monotonic clock.
    - `wall`: wall-clock time, for people only.
    """

    rank: int
    world_size: int
    process: Process
    beat: int
    phase: str
    step: int
    seconds: float
    count: int
    current: str
    last: str
    state: str = ""
    problem: str = ""
    attempt: int = 0
    live: int = -1
    """Descriptor of its shared progress integers in that process."""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wall: str = ""
    progress: int = 0
    """Progress reports within the current phase. Each one restarted `seconds`."""
    code: int = 0

    @property
    def at_work(self) -> bool:
        """Whether the rank has not announced its exit."""
        return self.state in OPEN_STATES

    def rank_text(self) -> str:
        """`rank 2 (pid 123 on host n1)`."""
        return f"rank {self.rank} (pid {self.process.pid} on host {self.process.host})"

    def phase_text(self) -> str:
        """`step 41, forward/backward`."""
        return f"step {self.step}, {PHASES.get(self.phase, self.phase)}"

    def collective_text(self) -> str:
        """`in collective 1234 all-reduce tp`, or the last collective."""
        if self.current:
            return f"in collective {self.count} {self.current}"
        return (
            f"last collective {self.count} {self.last}".strip()
            if self.count
            else "no collective so far"
        )


def heartbeat_path(directory: Path, rank: int) -> Path:
    """Path of a rank's heartbeat file."""
    return directory / f"rank_{rank:05d}.json"


def stacks_path(directory: Path, rank: int) -> Path:
    """Path of a rank's Python stacks, written when it is stuck."""
    return directory / f"stacks_rank_{rank:05d}.txt"


def recording_path(directory: Path, rank: int) -> Path:
    """Path of a rank's last collectives (flight recorder), written when it is stuck."""
    return directory / f"flight_recorder_rank_{rank:05d}.json"


def encode(record: Heartbeat) -> bytes:
    """Encode LENGTH_BYTES of a file: one JSON object, padded with spaces before its checksum."""
    fields: dict[str, Any] = dataclasses.asdict(record)
    fields["seconds"] = round(record.seconds, 3)
    fields["facts"] = {
        str(key)[:40]: str(value)[:80] for key, value in list(record.facts.items())[:6]
    }
    for key in ("current", "last", "problem", "phase"):
        fields[key] = fields[key][:TEXT_LIMIT]

    text = json.dumps(fields).encode()
    if len(text) > LENGTH_BYTES - CHECK_BYTES:
        # Too long: texts for people give way to the fields that the diagnosis needs.
        text = json.dumps(
            fields | {"facts": {}, "problem": fields["problem"][:40], "wall": ""}
        ).encode()

    return text[:-1].ljust(LENGTH_BYTES - CHECK_BYTES) + _check(text)


def _check(text: bytes) -> bytes:
    return f', "check": "{zlib.crc32(text):08x}"}}\n'.encode()


def decode(data: bytes) -> Heartbeat | None:
    """Decode the bytes of a file; None when they are incomplete or damaged."""
    text = data[:-CHECK_BYTES].rstrip(b" ") + b"}"
    # Half of a write in progress does not match its checksum.
    if len(data) != LENGTH_BYTES or data[-CHECK_BYTES:] != _check(text):
        return None
    try:
        fields = json.loads(text)
        return Heartbeat(**{**fields, "process": Process(**fields["process"])})
    except (ValueError, TypeError, KeyError):
        return None


def write_heartbeat(directory: Path, record: Heartbeat) -> None:
    """Write a rank's file in place. Raises OSError."""
    descriptor = os.open(
        heartbeat_path(directory, record.rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644
    )
    try:
        os.pwrite(descriptor, encode(record), 0)
    finally:
        os.close(descriptor)


def read_heartbeat(directory: Path, rank: int) -> Heartbeat | None:
    """Read a rank's last heartbeat; None when there is none, or it is being written."""
    try:
        return decode(heartbeat_path(directory, rank).read_bytes())
    except OSError:
        return None


def heartbeats_of(
    directory: Path, world_size: int, attempt: int, own_rank: int
) -> Iterator[Heartbeat]:
    """Read the heartbeats that the other ranks wrote in the start of this number."""
    for rank in range(world_size):
        one = None if rank == own_rank else read_heartbeat(directory, rank)
        # An earlier start may have left one, too.
        if one is not None and one.attempt == attempt:
            yield one


def refusal_of(others: Iterable[Heartbeat]) -> str:
    """Return the problem of a rank that ends with exit code 2 and says why; "" if none does."""
    return next(
        (one.problem for one in others if one.state == "failed" and one.code == EXIT_USAGE), ""
    )


def _position(record: Heartbeat) -> tuple[int, str, int, int]:
    return record.count, record.phase, record.step, record.progress


@dataclass(frozen=True)
class RankStatus:
    """One rank as seen by an observer."""

    record: Heartbeat | None
    silent_seconds: float
    """Time for which its beat has not changed while it was observed."""
    process: ProcessState
    moving: bool
    """Whether it began a collective or another phase, or made progress, while it was observed."""


class Observer:
    """Observes the heartbeat files of many ranks; call `sample` repeatedly, then `statuses`."""

    def __init__(self, directory: Path, ranks: int, reader: Process, clock: Callable[[], float]):
        self.directory, self.ranks, self.reader, self.clock = directory, ranks, reader, clock
        self._first: dict[int, Heartbeat] = {}
        self._last: dict[int, Heartbeat] = {}
        self._changed_at: dict[int, float] = {}
        self.began = clock()

    def sample(self) -> None:
        """Read all files once."""
        for rank in range(self.ranks):
            record = read_heartbeat(self.directory, rank)
            if record is None:
                continue

            self._first.setdefault(rank, record)
            before = self._last.get(rank)

            # A restarted process counts as a new heartbeat, whatever its number.
            if before is None or (before.process, before.beat) != (record.process, record.beat):
                self._changed_at[rank] = self.clock()

            self._last[rank] = record

    def statuses(self) -> dict[int, RankStatus]:
        """Current status of every rank."""
        now, result = self.clock(), {}
        for rank in range(self.ranks):
            last = self._last.get(rank)
            if last is None:
                result[rank] = RankStatus(None, now - self.began, "", False)
                continue

            first = self._first[rank]
            moving = _position(first) != _position(last)
            result[rank] = RankStatus(
                last, now - self._changed_at[rank], process_state(last.process, self.reader), moving
            )

        return result
