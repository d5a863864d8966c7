"""The phases of a preparation, one after the other, by whichever executor the recipe names.

The driver only starts work, watches marks in the shared folder, and says how far it is. It can be killed at any moment
and started again: all that it knows lies in that folder. Letting it carry results between phases was refused, since
then a killed driver would be a lost preparation.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, Self

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.local import LocalExecutor
from k2train.data.prepare.run.tasks import Phase, completed, first_failure, phases_of
from k2train.data.prepare.workspace import Workspace
from k2train.errors import ConfigError, DataError

POLL_SECONDS = 0.2


class TaskExecutor(Protocol):
    """Those who do the tasks. Leaving the with statement ends what must not go on without the driver."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, phase: Phase) -> None:
        """Begin what is left of a phase; the phases before it are complete."""

    def poll(self, phase: Phase, seconds: float) -> Exception | None:
        """Wait about so long; an exception when the phase will not be completed."""

    def finish(self, phase: Phase) -> None:
        """All tasks of the phase are done."""

    def failed(self, phase: Phase) -> None:
        """A task of the phase has failed: the others need not go on."""


LOCK_NAME = "lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One driver at a time for a work folder. Raises DataError, at once, naming the process that is at it.

    The kernel frees the lock when its holder ends in whatever way; workers never inherit it.
    """
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "not named yet"
            )
            raise DataError(
                f"{folder}: this preparation is already running (pid {holder}); wait for it, or stop it first"
            ) from None
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
    """Do all tasks that are not done, holding the work folder; `phases` are those of a preparation when left out.

    Raises the line of the first task that met a user's mistake (DataError), RuntimeError for one that met a bug of ours,
    ConfigError when the executor cannot be had.
    """
    with exclusive(workspace.folder):
        drive(workspace, executor, progress, phases)


def drive(
    workspace: Workspace,
    recipe: ExecutorRecipe,
    progress: Progress,
    phases: Sequence[Phase] | None = None,
) -> None:
    """`run_phases` for a caller that holds the folder itself."""
    # Tasks on other machines, or in other working directories, find the folder by its whole name.
    workspace = replace(workspace, folder=workspace.folder.resolve())
    phases = phases_of(workspace) if phases is None else phases
    with _executor(workspace, phases, recipe, progress) as executor:
        for phase in phases:
            for _ in progress.track(
                phase.name, _watch(workspace, phase, executor), total=phase.tasks, unit="tasks"
            ):
                pass


def _executor(
    workspace: Workspace, phases: Sequence[Phase], recipe: ExecutorRecipe, progress: Progress
) -> TaskExecutor:
    if find_spec("datatrove") is None:
        raise ConfigError("preparing data needs datatrove: pip install 'k2train[data]'")
    if recipe.kind == "slurm":
        # Loads datatrove's SLURM executor into this process, which the local one does not need.
        from k2train.data.prepare.run.slurm import SlurmExecutor

        return SlurmExecutor(workspace, phases, recipe, progress)
    if recipe.kind == "ray" and find_spec("ray") is None:
        raise ConfigError("executor.kind ray needs ray: pip install ray")
    return LocalExecutor(workspace, phases, recipe)


def _watch(workspace: Workspace, phase: Phase, executor: TaskExecutor) -> Iterator[int]:
    """The numbers of done tasks, as they get done; ends when all are."""
    executor.start(phase)
    shown: set[int] = set()
    poll_failure: Exception | None = None
    while True:
        done = completed(workspace, phase)
        yield from sorted(done - shown)
        shown |= done
        if len(done) == phase.tasks:
            executor.finish(phase)
            return
        failure = first_failure(workspace, phase) or poll_failure
        if failure is not None:
            executor.failed(phase)
            raise failure
        poll_failure = executor.poll(phase, POLL_SECONDS)
