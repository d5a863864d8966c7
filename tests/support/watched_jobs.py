"""Jobs of `watched.py`, started warm, for the tests of the watchdog and its tool."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import forkserver
from tests.support.scenarios import until

SCRIPT = Path(__file__).parent / "watched.py"
IDLE_UNIT_SECONDS = 0.5
"""From the fork of a job's ranks to their first step, three times what a quiet machine takes."""


@dataclass
class Ended:
    """`codes` and `errors` (stderr) by rank; `seconds` from the last step of any rank to the end of
    the last rank.

    `unit`: seconds from the start of this job to its first step, a measure of how busy the machine
    is.
    """

    codes: list[int]
    errors: list[str]
    seconds: float
    unit: float

    @property
    def lines(self) -> list[str]:
        """What the watchdogs of all ranks said."""
        return [
            line for text in self.errors for line in text.splitlines() if line.startswith("rank ")
        ]

    def within(self, seconds: float) -> bool:
        """Whether the job ended in so many seconds of a machine that does nothing else.

        The limit grows as its first step came later than on such a machine.
        """
        return self.seconds < seconds * max(1.0, self.unit / IDLE_UNIT_SECONDS)


class Job:
    """The ranks of one job, ended in any case when the block is left. `rank_environments`: what
    each rank gets besides.
    """

    def __init__(
        self,
        directory: Path,
        world: int,
        limit: float,
        fault: Sequence[object] = (),
        rank_environments: Sequence[Mapping[str, str]] = (),
        **environment: str,
    ):
        directory.mkdir(exist_ok=True)
        self.directory, self.world = directory, world
        commands = [[SCRIPT, rank, world, directory, limit, *fault] for rank in range(world)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        # Its own start takes seconds, which are no part of the unit.
        server = forkserver.server()
        self.began, self.first_step = time.monotonic(), 0.0
        self.job = server.start(commands, variables, own=rank_environments)
        self.sizes, self.moved = [0] * world, self.began

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        forkserver.server().end(self.job)

    @property
    def pids(self) -> list[int]:
        return self.job.pids

    @property
    def over(self) -> bool:
        """Whether all ranks have ended; notes when they made their first and their last step."""
        sizes = [len(self._output(rank)) for rank in range(self.world)]
        if sizes != self.sizes:
            self.sizes, self.moved = sizes, time.monotonic()
            self.first_step = self.first_step or self.moved
        forkserver.server().poll()
        return self.job.over

    def step(self, rank: int) -> int:
        """The last step a rank has finished."""
        lines = self._output(rank).splitlines()
        return int(lines[-1].split()[1]) if lines else 0

    def at_step(self, step: int) -> bool:
        """Whether every rank has finished it."""
        reached = min(self.step(rank) for rank in range(self.world)) >= step
        assert reached or not self.over, [self.error(rank) for rank in range(self.world)]
        return reached

    def until_step(self, step: int) -> None:
        """Return when every rank has finished it."""
        until(lambda: self.at_step(step))

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to ranks."""
        for rank in ranks:
            self.job.send(rank, number)

    def ended(self) -> Ended:
        """What became of it, when `over`."""
        errors = [self.error(rank) for rank in range(self.world)]
        last = max(at for _, at in self.job.ends.values())
        return Ended(self.job.codes, errors, last - self.moved, self.first_step - self.began)

    def error(self, rank: int) -> str:
        """What a rank has written to stderr."""
        return (self.job.folder / f"rank_{rank}.err").read_text()

    def _output(self, rank: int) -> str:
        path = self.job.folder / f"rank_{rank}.out"
        whole, newline, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return whole + newline
