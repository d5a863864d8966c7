"""Starts the ranks of `tests/support/watched.py`, waits for them and says what each did: for the tests of the watch and its tool."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent / "watched.py"


@dataclass
class Ended:
    """`codes` and `errors` (stderr) by rank; `seconds` from the last step of any rank to the end of the last rank."""

    codes: list[int]
    errors: list[str]
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What the watches of all ranks said."""
        return [
            line for text in self.errors for line in text.splitlines() if line.startswith("rank ")
        ]


class Job:
    """The ranks of one job, as processes of this one; ended in any case when the block is left."""

    def __init__(
        self,
        directory: Path,
        world: int,
        limit: float,
        fault: Sequence[object] = (),
        prefixes: Sequence[Sequence[str]] | None = None,
        **environment: str,
    ):
        self.directory = directory
        self.processes = []
        variables: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        for rank in range(world):
            command = [
                sys.executable,
                str(SCRIPT),
                str(rank),
                str(world),
                str(directory),
                str(limit),
                *map(str, fault),
            ]
            with (
                (directory / f"out{rank}").open("w") as out,
                (directory / f"err{rank}").open("w") as err,
            ):
                prefix = list(prefixes[rank]) if prefixes else []
                self.processes.append(
                    subprocess.Popen(prefix + command, stdout=out, stderr=err, env=variables)
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def step(self, rank: int) -> int:
        """The last step a rank has finished."""
        lines = (self.directory / f"out{rank}").read_text().splitlines()
        return int(lines[-1].split()[1]) if lines else 0

    def until_step(self, step: int, timeout_seconds: float = 120.0) -> None:
        """Return when every rank has finished it."""
        until = time.monotonic() + timeout_seconds
        while min(self.step(rank) for rank in range(len(self.processes))) < step:
            assert time.monotonic() < until, (
                f"no step {step}: {[path.read_text() for path in self._errors()]}"
            )
            assert any(process.poll() is None for process in self.processes), [
                p.read_text() for p in self._errors()
            ]
            time.sleep(0.05)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to ranks."""
        for rank in ranks:
            self.processes[rank].send_signal(number)

    def ended(self, timeout_seconds: float = 120.0) -> Ended:
        """Wait for all ranks."""
        until, sizes, moved = time.monotonic() + timeout_seconds, [-1], time.monotonic()
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < until, (
                f"ranks are left: {[process.poll() for process in self.processes]}"
            )
            now = [
                (self.directory / f"out{rank}").stat().st_size
                for rank in range(len(self.processes))
            ]
            if now != sizes:
                sizes, moved = now, time.monotonic()
            time.sleep(0.05)
        codes = [process.wait() for process in self.processes]
        return Ended(codes, [path.read_text() for path in self._errors()], time.monotonic() - moved)

    def _errors(self) -> list[Path]:
        return [self.directory / f"err{rank}" for rank in range(len(self.processes))]
