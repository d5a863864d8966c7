"""Phases of a preparation, and one task of a phase as datatrove runs it.

- The records decide what is done. A record is written last, and every file it lists must exist with
  its size.
- datatrove keeps marks of its own (`completions/`), written after the record. Before a phase starts
  they are reconciled with the records. A finished task is never repeated, a half-done one always
  is.
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

from k2train.data.prepare.workspace import Workspace, read_json, write_json
from k2train.errors import DataError, UserError


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
        """datatrove's folder: `completions/`, `logs/task_00000.log`, `stats/`; and `running/`."""
        return workspace.folder / "logs" / self.name

    def log(self, workspace: Workspace, number: int) -> Path:
        """Path of the log of a task."""
        return self.logs(workspace) / "logs" / f"task_{number:05d}.log"


def _encode(workspace: Workspace, number: int) -> None:
    # Each phase imports its code where it runs; the driver of a cluster needs none of it.
    from k2train.data.prepare.encode.encode import encode_task

    encode_task(workspace, number)


def _plan(workspace: Workspace, number: int) -> None:
    from k2train.data.prepare.allocate.allocate import plan_task

    plan_task(workspace)


def _chunk(workspace: Workspace, number: int) -> None:
    from k2train.data.prepare.write.write_chunk import chunk_task

    chunk_task(workspace, number)


def _encode_record(workspace: Workspace, number: int) -> Path:
    return workspace.encode_record(number)


def _plan_record(workspace: Workspace, number: int) -> Path:
    return workspace.folder / "plan" / "plan.json"


def _chunk_record(workspace: Workspace, number: int) -> Path:
    return workspace.chunk_record(workspace.chunk_names[number])


def phases_of(workspace: Workspace) -> list[Phase]:
    """The phases of a preparation in order; each needs all tasks of the previous one."""
    return [
        Phase("encode", len(workspace.tasks), _encode, _encode_record),
        Phase("plan", 1, _plan, _plan_record),
        Phase("chunks", len(workspace.chunk_names), _chunk, _chunk_record),
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


def reconcile(workspace: Workspace, phase: Phase) -> int:
    """Make datatrove's marks agree with the records and remove old failures.

    Returns the number of remaining tasks.
    """
    completions, running = (phase.logs(workspace) / part for part in ("completions", "running"))
    completions.mkdir(parents=True, exist_ok=True)
    running.mkdir(parents=True, exist_ok=True)
    marked = completed(workspace, phase)
    # No task runs yet, so every marker is stale.
    for stale in running.iterdir():
        stale.unlink(missing_ok=True)
    remaining = 0

    for number in range(phase.tasks):
        workspace.failure(phase.name, number).unlink(missing_ok=True)
        # A finished task without a mark gets one; a mark without a record is removed.
        mark = completions / f"{number:05d}"
        if not is_done(workspace, phase, number):
            remaining += 1
            if number in marked:
                mark.unlink(missing_ok=True)
        elif number not in marked:
            mark.touch()

    return remaining


def completed(workspace: Workspace, phase: Phase) -> set[int]:
    """Numbers of the marked tasks, from one directory listing however many there are."""
    with suppress(FileNotFoundError):
        names = os.listdir(phase.logs(workspace) / "completions")
        return {int(name) for name in names if name.isdigit() and int(name) < phase.tasks}
    return set()


def first_failure(workspace: Workspace, phase: Phase) -> Exception | None:
    """The exception to raise for the failed task of the lowest number."""
    for path in sorted((workspace.folder / "failures").glob(f"{phase.name}_*")):
        number = path.name.rpartition("_")[2]
        if number.isdigit() and (failure := read_json(path)) is not None:
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
    """Run one task, unless it is done.

    Raises TaskStopped with the line of a user's mistake, which is also written to the work folder.
    """
    workspace = Workspace.open(folder)
    # A job killed between its record and datatrove's mark is started again.
    if is_done(workspace, phase, number):
        return
    marker = phase.logs(workspace) / "running" / f"{number:05d}"
    marker.parent.mkdir(parents=True, exist_ok=True)

    try:
        marker.write_text(str(os.getpid()), "ascii")
        phase.work(workspace, number)
        if not is_done(workspace, phase, number):
            raise RuntimeError(
                f"{phase.record(workspace, number)} is missing, or lists files that do not exist"
            )
    except Exception as error:
        line, is_user_error = explain(error, folder)
        # On a full disk only the exception can carry the line.
        with suppress(OSError):
            write_json(
                workspace.failure(phase.name, number),
                {"line": line, "mistake": is_user_error, "traceback": traceback.format_exc()},
            )

        # Plain exceptions with one argument: others may fail to unpickle in the parent and stall
        # it.
        raise (TaskStopped if is_user_error else RuntimeError)(line) from error
    finally:
        marker.unlink(missing_ok=True)


@dataclass(frozen=True)
class PhaseTask:
    """A phase as the only step of a datatrove pipeline; the rank is the task's number."""

    folder: Path
    phase: Phase

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        assert world_size == self.phase.tasks, (
            f"{world_size} tasks were started for {self.phase.tasks}"
        )
        run_task(self.folder, self.phase, rank)
