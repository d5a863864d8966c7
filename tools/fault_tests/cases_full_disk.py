"""Fault row 7: the disk is full, or fails, in the middle of a save."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from fault_tests.processes import Job
from fault_tests.result import Bench, Result
from fault_tests.tiny_run import TinyRun


def row_7(bench: Bench) -> Result:
    """Row 7: a full disk during a save."""
    result = Result(
        7,
        "The disk is full, or fails, in the middle of a save",
        "one line with bytes needed and free; what was written is removed; training goes on and "
        "the save is tried again; same bits; a save that never finds room ends the run with 1 and "
        "earlier checkpoints whole",
        "ENOSPC and EIO at save points; and a real file system of three megabytes that is filled "
        "up while the run trains",
    )

    world = bench.world(6, 3)
    restarts = bench.restarts(world, "row7")
    faults = [
        f"{point}@rank={rank}@nth=2:error={code}"
        for code in ("ENOSPC", "EIO")
        for point, rank in (("save.model", 1), ("save.optimizer", 0), ("save.manifest", 0))
    ]

    for fault in faults[:: 3 if bench.short else 1]:
        attempt = restarts.attempt(fault)
        if not {0, 1} >= set(attempt.codes):
            result.problems.append(f"{fault}: {attempt.codes}")
        result.measured.append(
            f"{fault}: ended with {attempt.codes}, at step {attempt.after}"
            + (" (tried again and went on)" if attempt.codes[0] == 0 else "")
        )
        if restarts.done:
            restarts.finish()
            result.problems += restarts.problems
            restarts = bench.restarts(world, "row7")

    if restarts.attempts:
        restarts.finish()
        result.problems += restarts.problems

    with small_disk(bench.scratch / "small", 3000) as problem:
        if problem:
            result.missing.append(f"a real full disk: {problem}")
        else:
            _full_disk(bench, world, result)

    return result


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[str]:
    """Mount a file system of that size at `folder`.

    Yields the reason why it is not possible, or "".
    """
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"]
    made = (
        subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if os.geteuid() == 0
        else None
    )
    problem = (
        "mounting needs root" if made is None else made.stderr.strip() if made.returncode else ""
    )
    try:
        yield problem
    finally:
        if not problem:
            subprocess.run(["umount", str(folder)], check=True)


def _full_disk(bench: Bench, world: TinyRun, result: Result) -> None:
    """Fill the disk during a save and free it while the save is retried.

    Then once without freeing it.
    """
    small = bench.scratch / "small"
    for mercy in (True, False):
        run = small / "runs" / f"full_{mercy}"
        arguments = world.arguments(
            run.name,
            f"run.directory={small / 'runs'}",
            "checkpoint.retry_seconds=" + ("60" if mercy else "1"),
        )
        ballast = small / "ballast"
        job = bench.server.begin(arguments, world.ranks)
        deadline = time.monotonic() + 60
        while (
            not (run / "checkpoints" / "ckpt_001" / "manifest.json").exists()
            and time.monotonic() < deadline
            and not job.over
        ):
            bench.server.wait(job, 0.005)
        free = shutil.disk_usage(small).free
        ballast.write_bytes(b"\x01" * max(0, free - 20_000))
        found = _wait_for_line(bench, job, "no space", 30)
        if mercy:
            ballast.unlink()
        bench.server.wait(job, 120)
        bench.server.end(job)
        wanted = 0 if mercy else 1
        line = next((line for line in job.text().splitlines() if "no space" in line.lower()), "")
        if not found or set(job.codes) != {wanted}:
            result.problems.append(
                f"full disk, {'room made later' if mercy else 'no room made'}: codes {job.codes}, "
                f"output {line or job.text()[-300:]}"
            )
        else:
            result.measured.append(
                f"real full disk, {'room made later' if mercy else 'no room made'}: ended with "
                f"{job.codes}; {line[-160:]}"
            )
        ballast.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)


def _wait_for_line(bench: Bench, job: Job, text: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if text in job.text().lower():
            return True
        if bench.server.wait(job, 0.05):
            return text in job.text().lower()
    return False
