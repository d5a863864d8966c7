"""The end of a run that cannot go on: one rank says why, in one line and `watch/verdict.json`; what hangs is ended.

Ranks share nothing any more but the run directory, so the one that gives the file its name first is the one that speaks:
a link either makes the name or fails. Processes are ended by a handle that cannot pass to another process, after their
identity was checked, and are asked for their Python stacks first: the handler of that signal is C, so it answers also
where Python code cannot run.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2train.watchdog.hang_analysis import FaultyRank
from k2train.watchdog.heartbeat import Heartbeat, Process, RankStatus, process_state

REPORT_NAME = "verdict.json"
STACKS_SIGNAL = signal.SIGRTMIN + 5
"""On it a rank writes its stacks to its file; nothing else uses it."""
STACKS_SECONDS = 0.5

ReportId = tuple[int, int] | None


def report_id(directory: Path) -> ReportId:
    """Which verdict lies there: tells a new one from one of an earlier start."""
    try:
        facts = os.stat(directory / REPORT_NAME)
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def archive_report(directory: Path) -> None:
    """Put a verdict of an earlier start out of the way, for people to find; after `read_verdict`. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory / REPORT_NAME, directory / f"earlier_{REPORT_NAME}")


def read_report(directory: Path) -> dict[str, Any] | None:
    """What was said at the end of the run; None when nothing was."""
    try:
        report = json.loads((directory / REPORT_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def build_report(
    line: str, faulty: Iterable[FaultyRank], statuses: Mapping[int, RankStatus], reporter: Heartbeat
) -> dict[str, Any]:
    """The content of the file: the line, the ranks it is about, and where every rank was; told by the rank of `own`.

    `attempt`: the start that ended so, 0 where it had no number yet.
    """
    ranks = []
    for rank, one in sorted(statuses.items()):
        record = one.record
        position = (
            None
            if record is None
            else [record.phase, record.step, record.count, record.current or record.last]
        )
        ranks.append([rank, position, one.process, round(one.silent_seconds, 1)])
    return {
        "line": line,
        "suspects": [{"rank": one.rank, "kind": one.kind} for one in faulty],
        "told_by": reporter.rank,
        "attempt": reporter.attempt,
        "wall": reporter.wall,
        "ranks": ranks,
    }


def publish_report(directory: Path, report: Mapping[str, Any], earlier: ReportId) -> bool:
    """Write the verdict, unless another rank has; True for the rank that did, which is to say it aloud.

    `stale` is the verdict of an earlier start. Where the directory cannot be written to, every rank speaks.
    """
    temporary = directory / f"{REPORT_NAME}.{report['told_by']}.tmp"
    try:
        temporary.write_text(json.dumps(report) + "\n")
        if earlier is not None and report_id(directory) == earlier:
            (directory / REPORT_NAME).unlink(missing_ok=True)
        try:
            os.link(temporary, directory / REPORT_NAME)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        pass
    return True


def kill_processes(processes: Iterable[Process], reader: Process) -> None:
    """End those of `processes` that run on this machine: stacks, then SIGKILL. One that is not there is left out."""
    handles = [
        handle for process in processes if (handle := _open_process(process, reader)) is not None
    ]
    try:
        for handle in handles:
            _send(handle, STACKS_SIGNAL)
            _send(handle, signal.SIGCONT)
        if handles:
            time.sleep(STACKS_SECONDS)
        for handle in handles:
            _send(handle, signal.SIGKILL)
    finally:
        for handle in handles:
            os.close(handle)


def _open_process(process: Process, reader: Process) -> int | None:
    if process == reader:
        return None
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return None
    # Asked after the handle is held: from here on it cannot mean another process.
    if process_state(process, reader) in ("running", "stopped"):
        return handle
    os.close(handle)
    return None


def _send(handle: int, number: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(handle, number)
