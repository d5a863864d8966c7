"""Phases of a preparation: their tasks, which of them are done, and the run of one.

- The records decide what is done. A record is written last, and every file it lists must exist with
  its size.
- A mark (`completions/`, where datatrove keeps its own) is written after the record, so one listing
  of a folder shows the progress on any machine. Before a phase starts the marks are made anew from
  the records. A finished task is never repeated, a half-done one always is.
- Alternatives considered: trusting the marks alone; a mark outlives output that somebody deletes,
  and a crash may fall between output and mark.
"""

import errno
import os
import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.workspace import Workspace, read_json, write_json
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.errors import DataError, UserError
from k2train.retry import is_folder_retried, list_retried


class TaskStopped(RuntimeError):
    """Raised for a task that met a user's mistake; the message is the line to show.

    Anything else that ends a task is a bug.
    """


@dataclass(frozen=True)
class Phase:
    """A phase: `tasks` independent calls of `work(workspace, number)`, each leaving a record.

    `work` and `record` must be functions of a module, since other processes find them by name.
    """

    name: str
    tasks: int
    work: Callable[[Workspace, int], object]
    record: Callable[[Workspace, int], Path]

    def logs(self, workspace: Workspace) -> Path:
        """Folder of the phase: `completions/`, `logs/task_00000.log`, and what datatrove adds."""
        return workspace.folder / "logs" / self.name

    def log(self, workspace: Workspace, number: int) -> Path:
        """Path of the log of a task."""
        return self.logs(workspace) / "logs" / f"task_{number:05d}.log"

    def mark(self, workspace: Workspace, number: int) -> Path:
        """Path of the mark of a finished task; datatrove's name for it."""
        return self.logs(workspace) / "completions" / f"{number:05d}"


def _plan(workspace: Workspace, number: int) -> None:
    plan_task(workspace)


def _plan_record(workspace: Workspace, number: int) -> Path:
    return workspace.folder / "plan" / "plan.json"


def _chunk_record(workspace: Workspace, number: int) -> Path:
    return workspace.chunk_record(workspace.chunk_names[number])


def phases_of(workspace: Workspace) -> list[Phase]:
    """The phases of a preparation in order; each needs all tasks of the previous one."""
    return [
        Phase("encode", len(workspace.tasks), encode_task, Workspace.encode_record),
        Phase("plan", 1, _plan, _plan_record),
        Phase("chunks", len(workspace.chunk_names), chunk_task, _chunk_record),
    ]


def is_done(workspace: Workspace, phase: Phase, number: int) -> bool:
    """Whether the task's record exists, and every file it lists, with its size.

    A record holds `files`: [{`path`, `bytes`, `base`: `folder` (the work folder, the default) or
    `target`}].
    """
    try:
        record = read_json(phase.record(workspace, number))
        if record is None:
            return False
        bases = {"folder": workspace.folder, "target": workspace.target}
        default = record.get("base", "folder")
        for file in record.get("files", []):
            if os.stat(bases[file.get("base", default)] / file["path"]).st_size != file["bytes"]:
                return False
    except (OSError, ValueError):
        return False
    return True


def reconcile(workspace: Workspace, phase: Phase) -> list[int]:
    """Make the marks from the records and remove old failures, while no task runs.

    Returns the numbers of the remaining tasks.
    """
    for file in (phase.mark(workspace, 0), phase.log(workspace, 0)):
        file.parent.mkdir(parents=True, exist_ok=True)
    for number in completed(workspace, phase):
        phase.mark(workspace, number).unlink()
    remaining = []
    for number in range(phase.tasks):
        workspace.failure(phase.name, number).unlink(missing_ok=True)
        if is_done(workspace, phase, number):
            phase.mark(workspace, number).touch()
        else:
            remaining.append(number)
    return remaining


def completed(workspace: Workspace, phase: Phase) -> set[int]:
    """Numbers of the marked tasks, from one directory listing however many there are."""
    with suppress(FileNotFoundError):
        names = [path.name for path in list_retried(phase.logs(workspace) / "completions")]
        return {int(name) for name in names if name.isdigit() and int(name) < phase.tasks}
    return set()


def first_failure(workspace: Workspace, phase: Phase) -> Exception | None:
    """The exception to raise for the failed task of the lowest number."""
    failures = workspace.folder / "failures"
    for path in list_retried(failures) if is_folder_retried(failures) else []:
        name, _, number = path.name.rpartition("_")
        if name == phase.name and number.isdigit() and (failure := read_json(path)) is not None:
            if failure["mistake"]:
                return DataError(failure["line"])
            line = f"task {int(number)} of {phase.name} failed: {failure['line']}"
            return RuntimeError(
                f"{line}; its log is {phase.log(workspace, int(number))}\n{failure['traceback']}"
            )
    return None


def tail_of(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for a message."""
    try:
        return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({log} cannot be read: {error.strerror})"


def explain(error: BaseException, work: Path | None = None) -> tuple[str, bool]:
    """Describe what ended a task: (one line, whether the user can fix it).

    `work` is the work folder.
    """
    if isinstance(error, (UserError, TaskStopped)):
        return str(error), True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(error, work), True
    return "".join(traceback.format_exception_only(error)).strip().replace("\n", " "), False


def _no_space(error: OSError, work: Path | None) -> str:
    """Message for a full disk, with the key of the recipe that moves the folder."""
    folder = Path(error.filename).parent if error.filename else work
    remedy = "make room there and start again: finished tasks are kept"
    if folder is None:
        return f"no space left on the disk; {remedy}"
    key = "work" if work is not None and folder.is_relative_to(work) else "output"
    message = f"no space left in {folder}"
    with suppress(OSError):
        message += f", {shutil.disk_usage(folder).free:,} bytes are free"
    return f"{key}: {message}; {remedy}, or name a folder on another disk"


def run_task(folder: Path, phase: Phase, number: int) -> None:
    """Run one task, unless it is done, and mark it.

    Raises TaskStopped with the line of a user's mistake, which is also written to the work folder.
    """
    workspace = Workspace.open(folder)
    try:
        # A job killed between record and mark is started again.
        if not is_done(workspace, phase, number):
            phase.work(workspace, number)
            if not is_done(workspace, phase, number):
                raise RuntimeError(
                    f"{phase.record(workspace, number)} is missing, or lists files that do not "
                    "exist"
                )
        phase.mark(workspace, number).touch()
    except Exception as error:
        line, is_user_error = explain(error, folder)
        # On a full disk only the exception can carry the line.
        with suppress(OSError):
            write_json(
                workspace.failure(phase.name, number),
                {"line": line, "mistake": is_user_error, "traceback": traceback.format_exc()},
            )
        # Plain exceptions with one argument: others may fail to unpickle in the driver.
        raise (TaskStopped if is_user_error else RuntimeError)(line) from error


@dataclass(frozen=True)
class PhaseTask:
    """A phase as the only step of a datatrove pipeline; the rank is the task's number."""

    folder: Path
    phase: Phase

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        run_task(self.folder, self.phase, rank)
