"""Control files: an empty file STOP or SAVE in the run directory asks the run to stop or save.

- `touch RUN/SAVE` saves at the end of the step and continues. `touch RUN/STOP` saves and exits with
  75.
- A file needs no process id, works from any machine that mounts the directory, and survives when
  the batch system has forgotten the job.
- Only rank 0 polls, once per step.
- A request is removed after it was met, not when it is seen. A kill in between leaves it for the
  next start.
- A STOP that exists before the start applies to that start.

Alternatives considered:
- A port to listen on: it would have to be secured, and 480 ranks have no use for it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Literal

from k2train.errors import RunError
from k2train.retry import exists, exists_retried

Name = Literal["STOP", "SAVE"]


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

    def done(self, name: str) -> None:
        """Remove a request that has been met.

        STOP also removes SAVE, because the run saves when it stops. A file that is already removed,
        or cannot be removed, is no error.
        """
        # A stopping run saves, so STOP also meets a pending SAVE.
        for path in (self._stop, self._save) if name == "STOP" else (self._save,):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def refuse_start(self) -> None:
        """Raise RunError when a STOP file exists before the start."""
        if exists_retried(self._stop):
            raise RunError(
                f"{self._stop} asks this run not to start; remove the file, then start again"
            )
