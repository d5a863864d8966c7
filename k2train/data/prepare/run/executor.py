"""Driver: run the phases of a preparation in order, by the executor that the recipe names.

- The driver only starts work, watches completion marks in the shared folder, and shows progress. It
  can be killed at any moment and started again, since all its state is in that folder.
- Alternatives considered: a driver that carries results between phases; a killed driver would then
  be a lost preparation.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.local import LocalExecutor
from k2train.data.prepare.run.tasks import Phase, completed, first_failure, phases_of
from k2train.data.prepare.workspace import Workspace
from k2train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from k2train.data.prepare.run.slurm import SlurmExecutor

POLL_SECONDS = 0.2


LOCK_NAME = "lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a work folder for one driver.

    Raises DataError at once, with the id of the process that holds the lock. The kernel releases
    the lock however its holder ends; workers never inherit it.
    """
    # The file stays; only the lock on it counts.
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "not named yet"
            )
            raise DataError(
                f"{folder}: this preparation is already running "
                f"(pid {holder}); wait for it, or stop it first"
            ) from None

        # The id is informative only; the kernel holds the lock.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def run_phases(
    workspace: Workspace,
    executor: ExecutorRecipe,
    progress: Progress,
    phases: Sequence[Phase] | None = None,
) -> None:
    """Run all tasks that are not done, while holding the work folder.

    `phases` defaults to those of a preparation. Raises DataError with the line of the first task
    that met a user's mistake, RuntimeError for a bug, ConfigError when the executor is not
    available.
    """
    # Tasks on other machines or in other working directories need the absolute path.
    workspace = replace(workspace, folder=workspace.folder.resolve())
    phases = phases_of(workspace) if phases is None else phases
    with (
        exclusive(workspace.folder),
        _executor(workspace, phases, executor, progress) as started,
    ):
        for phase in phases:
            done = _watch(workspace, phase, started)
            for _ in progress.track(phase.name, done, total=phase.tasks, unit="task"):
                pass


def _executor(
    workspace: Workspace, phases: Sequence[Phase], recipe: ExecutorRecipe, progress: Progress
) -> "LocalExecutor | SlurmExecutor":
    if recipe.kind == "local":
        return LocalExecutor(workspace, recipe)
    if find_spec("datatrove") is None:
        raise ConfigError(
            f"executor.kind {recipe.kind} needs datatrove: pip install 'k2train[data]'"
        )
    if recipe.kind == "ray":
        if find_spec("ray") is None:
            raise ConfigError("executor.kind ray needs ray: pip install ray")
        return LocalExecutor(workspace, recipe)

    # Imported here, since only SLURM needs datatrove in this process.
    from k2train.data.prepare.run.slurm import SlurmExecutor

    return SlurmExecutor(workspace, phases, recipe, progress)


def _watch(
    workspace: Workspace, phase: Phase, executor: "LocalExecutor | SlurmExecutor"
) -> Iterator[int]:
    """Yield the numbers of done tasks as they complete; ends when all are done."""
    executor.start(phase)
    shown: set[int] = set()
    poll_failure: Exception | None = None
    while True:
        done = completed(workspace, phase)
        yield from sorted(done - shown)
        shown |= done
        if len(done) == phase.tasks:
            return

        # Prefer the failure of a task to what the executor noticed, which is one poll old.
        failure = first_failure(workspace, phase) or poll_failure
        if failure is not None:
            raise failure
        poll_failure = executor.poll(phase, POLL_SECONDS)
