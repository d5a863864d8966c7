"""Background scrubbing: periodically re-read an old checkpoint and report corruption.

- Each period checks one checkpoint, the one whose last check is oldest. Only rank 0 does so, with
  one reading thread, so a disk shared with training sees little extra load.
- An error in one round is logged, and the thread continues. Only its owner ends it.

Alternatives considered:
- Checking all checkpoints at once: a run of weeks has hundreds, of terabytes each.
"""

import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from k2train.checkpoint.manifest import is_thinned, list_checkpoints
from k2train.checkpoint.retention import VerifiedCheckpoints
from k2train.checkpoint.save_events import SaveEvents
from k2train.checkpoint.shards import drop_caches
from k2train.checkpoint.verify import has_bad_block, verify_checkpoint
from k2train.errors import CheckpointError, UnavailableError
from k2train.retry import exists_retried


class Scrubber:
    """Scrubbing thread that checks one checkpoint of `directory` every `seconds`.

    Tells `events` from its own thread.
    """

    def __init__(
        self, directory: Path, seconds: float, verified: VerifiedCheckpoints, events: SaveEvents
    ):
        self.directory, self.seconds = directory, seconds
        self.verified, self.events = verified, events
        self._last_logged = ""
        self._unavailable_at: dict[str, float] = {}
        self._closed = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it is running or `seconds` is 0."""
        if self._thread is None and self.seconds > 0:
            self._thread = Thread(target=self._run, name="scrub", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread without waiting for a check in progress."""
        self._closed.set()

    def check_next(self) -> Path | None:
        """Check the checkpoint whose turn it is and return its path; None when there is none."""
        paths = [
            path
            for path in list_checkpoints(self.directory)
            if not self.verified.is_damaged(path.name)
        ]
        if not paths:
            return None

        # The oldest of those that were never looked at, or the one whose look is longest ago.
        path = min(paths, key=self._looked_at)
        # The saving thread may thin it during the check.
        thinned = is_thinned(path)

        # Reads from the page cache would always succeed.
        drop_caches(path)

        try:
            verify_checkpoint(path, threads=1)
        except UnavailableError as error:
            if not has_bad_block(error, path):
                # Nobody could look: no damage, and its turn comes again after the others'.
                self._unavailable_at[path.name] = time.monotonic()
                raise
            self.verified.mark_damaged(path.name)
            self._report_damage(path, str(error))
        except (CheckpointError, OSError) as error:
            # The saving thread may have thinned or dropped it in the meantime.
            if exists_retried(path) and is_thinned(path) == thinned:
                self.verified.mark_damaged(path.name)
                self._report_damage(path, str(error))
        else:
            self.verified.add(path.name)

        drop_caches(path)
        return path

    def _looked_at(self, path: Path) -> float:
        # One that nobody could read waits for the others, as if it had been verified then.
        tried = self._unavailable_at.get(path.name, float("-inf"))
        return max(tried, self.verified.verified_at(path.name))

    def _report_damage(self, path: Path, problem: str) -> None:
        try:
            self.events.damaged(path, problem)
        except Exception as error:
            # It will not be checked again, so this is the last chance to report it.
            self.events.message(f"damaged: {problem} (this could not be recorded: {error})")

    def _run(self) -> None:
        while not self._closed.wait(self.seconds):
            try:
                self.check_next()
            except Exception as error:
                self._log_once(
                    f"no older checkpoint could be checked (retried every {self.seconds:g} s): "
                    f"{error!r}"
                )

    def _log_once(self, text: str) -> None:
        if text != self._last_logged:
            self._last_logged = text
            with suppress(Exception):
                self.events.message(text)
