"""Mirror of the record in another program, which cannot slow down or stop the run.

- The JSONL files are the record. A mirror may lose its last rows on kill -9, or need a network.
- A separate thread behind a queue does all its work; the training thread never waits for it.
- The first failure is logged once and ends the mirror, not the run.

Alternatives considered:
- Calls from the training thread: each library waits for its disk or network at some time.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from k2train.record.curves import Curves
from k2train.record.event import Event
from k2train.record.events import CheckpointSaved, Finished, Resumed, Started, Stopped
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord

# A day of one-second steps. A mirror that far behind will not catch up.
MAX_QUEUED = 100_000
POLL_SECONDS = 1.0
"""How often a wait for room looks whether the mirror has failed."""
SHOWS_TIME = (CheckpointSaved, Finished, Stopped)
"""Events at which effective training time is shown: seldom, and the ledger has their times."""
Work = Callable[[Any], None]
"""What the mirror's thread does with what it has opened."""


class Mirror(ABC):
    """Mirrors rows and events.

    - No method raises or waits, except `close`, which waits at most `close_seconds`, and all of
      them where `waits` is set.
    - `log` gets at most a few messages when something fails, from the mirror's or the caller's
      thread.
    """

    name = "mirror"
    """What messages call it."""
    failure = "mirror is off"
    aftermath = "the run continues, metrics.jsonl is complete"
    """What a failure is, and what it means for the run."""
    waits = False
    """Whether work waits for room in the queue: there is no run that it would slow down."""

    def __init__(
        self,
        log: Callable[[str], None] | None = None,
        close_seconds: float = 20.0,
        curves: Curves | None = None,
    ) -> None:
        self._log = log or (lambda text: None)
        self._curves = curves or Curves()
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Work | None] = queue.Queue(MAX_QUEUED)
        self._failed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; without it the mirror does nothing."""
        self._thread = threading.Thread(target=self._work, name=f"{self.name}-mirror", daemon=True)
        self._thread.start()

    def begin(self, tokens: int, trained_seconds: float, joules: float = 0.0) -> None:
        """Continue behind steps that took so many tokens, seconds and joules."""
        self._curves.begin(tokens, trained_seconds, joules)

    @abstractmethod
    def step(self, record: StepRecord) -> None:
        """Mirror one step."""

    @abstractmethod
    def score(self, record: HeldOutRecord) -> None:
        """Mirror the held-out loss of a set, and of its subsets."""

    @abstractmethod
    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror scores on tasks of the checkpoint after `step`, by `evaluation/TASK/METRIC`."""

    @abstractmethod
    def event(self, event: Event) -> None:
        """Mirror an event of the ledger."""

    @abstractmethod
    def past_event(self, event: Event, time: str) -> None:
        """Mirror an event of an earlier start, where the mirror has no memory of its own."""

    @abstractmethod
    def replayed(self, event: Event, time: str, undone: bool) -> None:
        """Mirror an event of a run that is mirrored from its record alone; calls nobody.

        `undone`: a later start undid the steps that it is of.
        """

    def _times(self, event: Event, now: float) -> dict[str, float]:
        """Return effective training time, where an event is one that shows it."""
        if self._curves.began is None:
            self._curves.began = now
        if isinstance(event, Started | Resumed):
            self._curves.devices = event.world_size
        return self._curves.of_time(now) if isinstance(event, SHOWS_TIME) else {}

    @abstractmethod
    def _open(self) -> Any:
        """Return what the work is done with; None after `_fail`. On the mirror's thread."""

    @abstractmethod
    def _finish(self, opened: Any) -> None:
        """Write out what is left. On the mirror's thread."""

    def close(self) -> None:
        """Flush the queue and finish; drops the rest after `close_seconds`. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return

        # None ends the thread after the work before it.
        if not self._queued(None):
            self._fail("it is too far behind to be finished")

        thread.join(self._close_seconds)
        if thread.is_alive() and not self._failed.is_set():
            self._fail(f"it did not finish within {self._close_seconds:g} s")

    @property
    def is_off(self) -> bool:
        """Whether the mirror failed, or never started."""
        return self._thread is None or self._failed.is_set()

    def _put(self, work: Work) -> None:
        if not self.is_off and not self._queued(work):
            self._fail(f"{MAX_QUEUED} rows wait for it")

    def _queued(self, work: Work | None) -> bool:
        """Put work into the queue; returns whether there was room."""
        while True:
            waits = self.waits and not self._failed.is_set()
            try:
                self._queue.put(work, waits, POLL_SECONDS)
            except queue.Full:
                if not waits:
                    return False
            else:
                return True

    def _fail(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._log(f"{self.name} {self.failure}: {why}; {self.aftermath}")

    def _work(self) -> None:
        try:
            opened = self._open()
            if opened is None:
                return

            while (work := self._queue.get()) is not None:
                # After a failure the rest of the queue is dropped.
                if self._failed.is_set():
                    break
                work(opened)

            self._finish(opened)
        # SystemExit included: a library that calls sys.exit in a thread must be reported, too.
        except BaseException as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            self._fail(f"{type(error).__name__}: {first_line}"[:200])
