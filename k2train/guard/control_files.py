"""Asking a run from a shell: an empty file STOP or SAVE in its directory, whoever may write there.

`touch RUN/SAVE` saves at the end of the step and goes on; `touch RUN/STOP` saves and ends with 75. A file needs no process
id, works from any machine that mounts the directory, and is there still when the batch system has forgotten the job. A
port to listen on was refused: it would have to be secured, and 480 ranks have no use for it.
Only rank 0 polls, once a step. A request is removed when it has been met, not when it is seen: a kill in between leaves it
for the next start. A STOP that stands before the start is meant for that start.
"""

from contextlib import suppress
from pathlib import Path
from typing import Literal

from k2train.errors import RunError

Name = Literal["STOP", "SAVE"]


class ControlFiles:
    """The requests in one run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._stop, self._save = self.directory / "STOP", self.directory / "SAVE"

    def poll(self) -> Name | None:
        """What is asked for now, STOP before SAVE; None also when the directory cannot be read: a run goes on then."""
        with suppress(OSError):
            if self._stop.exists():
                return "STOP"
            if self._save.exists():
                return "SAVE"
        return None

    def done(self, name: str) -> None:
        """Remove a request that has been met; a STOP ends a run that saved, so a SAVE beside it is met as well.

        One that somebody else has removed, or that cannot be removed, is no error: the run has done what was asked.
        """
        for path in (self._stop, self._save) if name == "STOP" else (self._save,):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def refuse_start(self) -> None:
        """Raise RunError when a STOP stands in the directory before anything has begun."""
        if self._stop.exists():
            raise RunError(
                f"{self._stop} asks this run not to start; remove the file, then start again"
            )
