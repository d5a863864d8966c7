"""Checkpoints rot too: a thread that reads an older one again every so often and says when it is no longer whole.

One a period, the one whose last check lies longest ago, on rank 0 only and by one reading thread, so that a disk shared
with training is hardly busier. Checking all at once was refused: a run of weeks has hundreds, of terabytes each.
Nothing ends the thread but its owner: what goes wrong in a round is told, and the next round comes.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from k2train.checkpoint.manifest import is_thinned, list_checkpoints, verify_checkpoint
from k2train.checkpoint.retention import VerifiedCheckpoints, least_recently_verified_first
from k2train.checkpoint.shards import drop_caches
from k2train.errors import CheckpointError


class Scrubber:
    """Every `seconds` one checkpoint of `directory`; `damaged(path, problem)` and `told(line)` are called from the audit's
    thread."""

    def __init__(
        self,
        directory: Path,
        seconds: float,
        verified: VerifiedCheckpoints,
        on_damaged: Callable[[Path, str], None],
        log: Callable[[str], None] = lambda text: None,
    ):
        self.directory, self.seconds, self.verified = directory, seconds, verified
        self.on_damaged, self.log = on_damaged, log
        self._last_logged = ""
        self._closed = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin, unless it runs or `seconds` is 0."""
        if self._thread is None and self.seconds > 0:
            self._thread = Thread(target=self._run, name="audit", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End it; a check under way is not waited for."""
        self._closed.set()

    def check_next(self) -> Path | None:
        """Check the one whose turn it is; which that was."""
        paths = [
            path
            for path in list_checkpoints(self.directory)
            if not self.verified.is_damaged(path.name)
        ]
        if not paths:
            return None
        path = least_recently_verified_first(paths, self.verified)[0]
        thinned = is_thinned(path)
        # What lies in the page cache would be found whole for ever.
        drop_caches(path)
        try:
            verify_checkpoint(path, threads=1)
        except (CheckpointError, OSError) as error:
            # It may have been thinned or dropped meanwhile, by the thread that saves.
            if path.exists() and is_thinned(path) == thinned:
                self.verified.mark_damaged(path.name)
                self._report_damage(path, str(error))
        else:
            self.verified.add(path.name)
        drop_caches(path)
        return path

    def _report_damage(self, path: Path, problem: str) -> None:
        try:
            self.on_damaged(path, problem)
        except Exception as error:
            # It is looked at no more, so this is the last chance to say it.
            self.log(f"damaged: {problem} (this could not be recorded: {error})")

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
                self.log(text)
