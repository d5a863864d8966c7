"""Failure report: why the run ended, written by one rank to `watch/verdict.json`.

- Hung processes are killed.
- The ranks then share only the run directory. The rank that creates the file is the one that
  reports, and only one can.
- Processes are killed through a pidfd, which cannot pass to another process, after their identity
  was checked.
- They are asked for their Python stacks first. The handler of that signal is written in C, so it
  works where Python code cannot run.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2train.errors import UnavailableError
from k2train.files import create_once
from k2train.processes import Process, process_state
from k2train.retry import retried
from k2train.watchdog.hang_analysis import FaultyRank
from k2train.watchdog.heartbeat import Heartbeat, RankStatus

REPORT_NAME = "verdict.json"
STACKS_SIGNAL = signal.SIGRTMIN + 5
"""Signal on which a rank writes its stacks to its file. It has no other use."""
STACKS_SECONDS = 0.5
RECORDINGS = "flight_recorder_rank_*.json"

ReportId = tuple[int, int] | None


def report_id(directory: Path) -> ReportId:
    """Identify the current report file, to tell a new report from one of an earlier start."""
    try:
        facts = os.stat(directory / REPORT_NAME)
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def archive_report(directory: Path) -> None:
    """Rename the report of an earlier start, keeping it for people. Call after `read_report`.

    Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory / REPORT_NAME, directory / f"earlier_{REPORT_NAME}")


def read_report(directory: Path) -> dict[str, Any] | None:
    """Read the failure report of a run; None when there is none, or nobody can read it."""
    path = directory / REPORT_NAME
    try:
        report = json.loads(retried(path.read_bytes, path))
    except (OSError, ValueError, UnavailableError):
        return None
    return report if isinstance(report, dict) else None


def build_report(
    line: str, faulty: Iterable[FaultyRank], statuses: Mapping[int, RankStatus], reporter: Heartbeat
) -> dict[str, Any]:
    """Content of the report file: the message, the faulty ranks, and the position of every rank.

    `attempt` is the start that failed, 0 when it had no number yet. `recordings` is the pattern of
    the files in which ranks that were stuck wrote their last collectives, beside the report.
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
        "recordings": RECORDINGS,
    }


def publish_report(directory: Path, report: Mapping[str, Any], earlier: ReportId) -> bool:
    """Write the report unless another rank has; True for the rank that must also print it.

    `earlier` identifies the report of an earlier start. In a read-only directory every rank prints.
    """
    try:
        if earlier is not None and report_id(directory) == earlier:
            # Only the report of an earlier start may be removed, never that of another rank of this
            # start.
            (directory / REPORT_NAME).unlink(missing_ok=True)

        # Exactly one rank can create the name.
        content = json.dumps(report).encode() + b"\n"
        temporary = directory / f"{REPORT_NAME}.{report['told_by']}.tmp"
        descriptor = create_once(directory / REPORT_NAME, content, temporary, synced=False)
        if descriptor is None:
            return False
        os.close(descriptor)
    except OSError:
        pass

    return True


def kill_processes(processes: Iterable[Process], reader: Process) -> None:
    """Kill those `processes` that run on this machine: first dump their stacks, then SIGKILL.

    Missing processes are skipped.
    """
    handles = [
        handle for process in processes if (handle := _open_process(process, reader)) is not None
    ]
    try:
        for handle in handles:
            _send(handle, STACKS_SIGNAL)
            # A stopped process handles the signal only after it continues.
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

    # Checked while holding the handle, which can no longer mean another process.
    if process_state(process, reader) in ("running", "stopped", "traced"):
        return handle

    os.close(handle)
    return None


def _send(handle: int, number: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(handle, number)
