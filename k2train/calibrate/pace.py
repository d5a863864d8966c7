"""Pace of the machine: how fast it is now, for how fast it was when it was calibrated.

- Processes that stay time one round of the calibration's kernels whenever they are asked: one with
  all cores, and as many as share them. Between two questions they sleep.
- A run between two samples is measured at their mean. So a machine whose speed moves within minutes
  moves the prediction too, and an error is that of the plan.

Alternatives considered:
- A calibration beside each layout: minutes for each, and it would measure itself.
- The fastest of many runs: no training is made of the fastest steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2train.calibrate import processes
from k2train.errors import UnavailableError
from k2train.plan.measured import Measured, RankSpeed

SAMPLES = 4
"""Rounds of the kernels that count at each question; one before them wakes the processes."""


class Pace:
    """Asks its processes how fast the machine is."""

    def __init__(self, measured: Measured, followers: dict[int, Follower]):
        self.measured, self.followers = measured, followers

    def sample(self, ranks: int) -> float:
        """Seconds of the kernels now, for their seconds at the calibration; above 1: slower.

        1 where the calibration kept no reference. Raises UnavailableError.
        """
        speed = self.measured.speed(ranks)
        follower = self.followers.get(speed.ranks)
        if follower is None:
            return 1.0
        follower.ask()
        times = [follower.ask() for _ in range(SAMPLES)]
        return statistics.fmean(times) / speed.reference_seconds


@contextmanager
def pace_of(measured: Measured, folder: Path, device: str, tiny: bool = False) -> Iterator[Pace]:
    """Start the processes that follow the machine's pace, and end them."""
    followers: dict[int, Follower] = {}
    try:
        for speed in measured.speeds:
            if speed.reference_seconds > 0:
                followers[speed.ranks] = Follower(speed, folder, device, tiny)
        # A process that still starts would slow the first question to another one.
        for follower in followers.values():
            follower.ask()
        yield Pace(measured, followers)
    finally:
        for follower in followers.values():
            follower.end()


class Follower:
    """Processes of one number of ranks, which time a round together at every question."""

    def __init__(self, speed: RankSpeed, folder: Path, device: str, tiny: bool):
        place = folder / f"pace_{speed.ranks}"
        place.mkdir()
        task: dict[str, Any] = {
            "follow": True,
            "facts": False,
            "device": device,
            "ranks": speed.ranks,
            "threads": speed.threads,
            # Its first is the one whose reference was kept.
            "precisions": [next(iter(speed.kernels))],
            "clock": "elapsed",
            "tiny": tiny,
            "store": str(place / "store"),
        }
        path = place / "task.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        self.logs = [place / f"log_{rank}" for rank in range(speed.ranks)]
        self.started: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self.logs):
            arguments = ["-m", "k2train.calibrate.worker", str(path), str(rank)]
            variables = {"OMP_NUM_THREADS": str(speed.threads)}
            self.started.append(processes.start(arguments, variables, log, piped=True))

    def ask(self) -> float:
        """Seconds of a round now, the mean over ranks. Raises UnavailableError."""
        try:
            for process in self.started:
                assert process.stdin is not None, "it was started with pipes"
                process.stdin.write(b"\n")
                process.stdin.flush()
            answers = [self._answer(process) for process in self.started]
            return statistics.fmean(float(answer) for answer in answers)
        except (OSError, ValueError):
            said = next(filter(None, map(_said, self.logs)), "it said nothing")
            raise UnavailableError(
                f"check: a process that follows the machine's pace ended: {said}"
            ) from None

    @staticmethod
    def _answer(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None, "it was started with pipes"
        return process.stdout.readline()

    def end(self) -> None:
        """End its processes."""
        for process in self.started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _said(log: Path) -> str:
    return processes.last_line(log) if log.read_bytes().strip() else ""
