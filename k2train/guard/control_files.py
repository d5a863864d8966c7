"""Control files: an empty file STOP or SAVE in the run directory asks the run to stop or save.

- `touch RUN/SAVE` saves at the end of the step and continues. `touch RUN/STOP` saves and exits with
  75.
- A file needs no process id, works from any machine that mounts the directory, and survives when
  the batch system has forgotten the job.
- Only rank 0 polls, once per step; during a start, which has no steps, a thread does.
- A request is removed after it was met, not when it is seen. A kill in between leaves it for the
  next start.
- A STOP that exists before the start applies to that start.

Alternatives considered:
- A port to listen on: it would have to be secured, and 480 ranks have no use for it.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from k2train.errors import RunError
from k2train.retry import exists, exists_retried

Name = Literal["STOP", "SAVE"]
STOP_FILE = "STOP file"
"""Stop reason if a file requested it. Any other reason is a signal, and a kill may follow."""
POLL_SECONDS = 0.5


class ControlFiles:
    """The control files of one run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._stop, self._save = self.directory / "STOP", self.directory / "SAVE"

    def poll(self) -> Name | None:
        """Return the current request, STOP before SAVE, or None.

        Also None when the directory cannot be read, because the run continues then.
        """
        with suppress(OSError):
            if exists(self._stop):
                return "STOP"
            if exists(self._save):
                return "SAVE"
        return None

    def done(self, name: Name, and_save: bool = True) -> None:
        """Remove a request that has been met.

        STOP also removes SAVE if `and_save`: the run saves when it stops, and keeps what a file
        asked for. A file that is already removed, or cannot be removed, is no error.
        """
        met = [self._stop] if name == "STOP" else []
        met += [self._save] if name == "SAVE" or and_save else []
        for path in met:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def refuse_start(self) -> None:
        """Raise RunError when a STOP file exists before the start.

        For the one rank that then watches, before it does: a later STOP ends the start.
        """
        if exists_retried(self._stop):
            raise RunError(
                f"{self._stop} asks this run not to start; remove the file, then start again"
            )

    def watch_start(self, starting: Callable[[], bool], ask: Callable[[str], None]) -> None:
        """Call `ask(STOP_FILE)` from a thread once there is a STOP, while `starting()`."""

        def work() -> None:
            while starting():
                if self.poll() == "STOP":
                    ask(STOP_FILE)
                    return
                time.sleep(POLL_SECONDS)

        threading.Thread(target=work, name="control files", daemon=True).start()


class SaveRequest:
    """A person's file SAVE, from the step that sees it to the commit of the save that meets it.

    A commit is told from the saving thread, maybe while the next save already waits for it. Only
    the checkpoint that was begun for the request meets it.
    """

    def __init__(self) -> None:
        self._seen, self._checkpoint = False, ""

    def see(self) -> bool:
        """Note that the file is there; returns whether a save is to be made for it."""
        first, self._seen = not self._seen, True
        return first

    def begin(self, checkpoint: str) -> bool:
        """Return whether the save of `checkpoint`, which begins now, is to meet the request."""
        if not self._seen or self._checkpoint:
            return False
        self._checkpoint = checkpoint
        return True

    def is_met_by(self, checkpoint: str) -> bool:
        """Return whether `checkpoint` was begun for the request."""
        return bool(self._checkpoint) and checkpoint == self._checkpoint

    def end(self) -> None:
        """Note that the request is met, and its file is gone."""
        self._seen, self._checkpoint = False, ""
