"""Own compute time of a rank's step: device or host seconds between its exchanges with others.

- A mark is set when an exchange begins to block and when it ends; what lies between two exchanges
  is the rank's own work. What it waits for others is left out.
- On CUDA a mark is an event in the computing stream: the stream waits for a collective there, so
  the time of a slow device is its own, and the time that others wait for it is not theirs.
- Events are read one step later, by when the host has waited for the device anyway. Nothing is
  synchronized for them: events that are not there yet give no seconds.
- On a CPU a mark is the host's clock. The code is the same.

Alternatives considered:
- Two events around the whole step: the streams of all ranks wait for the slowest, so all are slow.
- NCCL's own timing (TORCH_NCCL_ENABLE_TIMING): times collectives and not the work between them.
- Host clocks on CUDA: the host only queues kernels, and waits in one place on every rank alike.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Source of points in time on a host or a device."""

    def mark(self) -> Any:
        """Set a mark behind all work that is queued."""

    def passed(self, mark: Any) -> bool:
        """Whether the work before a mark is done. Never waits."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds from one mark that has passed to a later one."""

    def release(self, marks: Sequence[Any]) -> None:
        """Take marks back that nobody reads any more."""


class HostMarks:
    """The clock of the host, for work that is done when its call returns."""

    def mark(self) -> float:
        """Return now, in seconds."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """Always: the work was done before the mark was set."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """Seconds between two marks."""
        return end - begin

    def release(self, marks: Sequence[float]) -> None:
        """Nothing is kept."""


class DeviceMarks:
    """CUDA events in the current stream, used again from step to step."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        """Queue an event behind the kernels of this thread's current stream."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has come to the event."""
        return bool(mark.query())

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Device seconds between two events."""
        return float(begin.elapsed_time(end)) / 1e3

    def release(self, marks: Sequence[torch.cuda.Event]) -> None:
        """Keep the events for the next steps."""
        self._free.extend(marks)


def marks_of(device: torch.device) -> Marks:
    """Return the source of marks for a device."""
    return DeviceMarks() if device.type == "cuda" else HostMarks()


class OwnTime:
    """Own seconds of each step: `begin`, then `block` and `resume` at exchanges, `end`, `read`.

    Outside of a step `block` and `resume` do nothing, so saves and evaluations do not count.
    """

    def __init__(self, marks: Marks):
        self._marks = marks
        self._now: list[Any] | None = None
        """Marks of the step under way, in pairs: own work begins, own work ends."""
        self._ended: list[Any] = []
        self._seconds = 0.0

    def begin(self) -> None:
        """A step begins with own work."""
        self._marks.release(self._now or ())
        self._now = [self._marks.mark()]

    def block(self) -> None:
        """An exchange begins; from here on this rank may wait for others."""
        if self._now is not None:
            self._now.append(self._marks.mark())

    def resume(self) -> None:
        """The exchange is over."""
        if self._now is not None:
            self._now.append(self._marks.mark())

    def end(self) -> None:
        """The step is over; its seconds can be read once the device has got that far."""
        if self._now is None:
            return
        self._marks.release(self._ended)
        self._now.append(self._marks.mark())
        self._ended, self._now = self._now, None

    def read(self) -> float:
        """Return the own seconds of the last step that the device has finished, 0.0 before.

        Never waits for the device.
        """
        if self._ended and self._marks.passed(self._ended[-1]):
            pairs = zip(self._ended[::2], self._ended[1::2], strict=True)
            self._seconds = sum(self._marks.seconds(begin, end) for begin, end in pairs)
            self._marks.release(self._ended)
            self._ended = []
        return self._seconds
