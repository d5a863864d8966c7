"""Fault row 25: the time of day jumps while a run trains.

- In warm processes the clock of Python is patched.
- In a launched run a library is preloaded (`jumping_clock.c`): C and C++ code sees the jumps, too.
"""

import shutil
import subprocess
import time
from pathlib import Path

from fault_tests.cases_kill import tail
from fault_tests.launched import launch
from fault_tests.result import Bench, Result
from k2train.errors import EXIT_DONE, EXIT_FAILED

SOURCE = Path(__file__).with_name("jumping_clock.c")
JUMPS_PER_SECOND = 10
LIMIT_SECONDS = 240.0


def row_25(bench: Bench) -> Result:
    """Row 25: clocks that jump."""
    result = Result(
        25,
        "The clock jumps by an hour, forwards and backwards",
        "no order, timeout or decision depends on the time of day; same bits",
        "time.time and datetime.now of every rank jump by an hour, to and fro, every tenth of a "
        "second, with one kill and restart; and the same in a launched run, whose C library jumps",
    )

    restarts = bench.restarts(bench.world(8, 3), "row25")
    restarts.environments = [{"FAULT_RUN_PATCH": "code_patches:jumping_clock"}] * 2
    restarts.attempt("step.forward@rank=1@nth=7:kill")
    restarts.finish()
    result.problems += restarts.problems
    result.measured.append(
        f"{restarts.world.steps} steps, {len(restarts.attempts)} starts, a jump every 0.1 s: ended "
        "alike"
    )
    if not bench.short:
        _launched(bench, result)
    return result


def build_library(folder: Path) -> tuple[Path, str]:
    """Compile the library into `folder`: (its path, why that is not possible or "")."""
    library = folder / "jumping_clock.so"
    compiler = shutil.which("cc")
    if compiler is None:
        return library, "no C compiler (cc) is installed"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    return library, f"cc: {done.stderr.strip()[-200:]}" if done.returncode else ""


def _launched(bench: Bench, result: Result) -> None:
    """A launched run with the library: killed once, then the same command to the end."""
    library, problem = build_library(bench.scratch)
    if problem:
        result.missing.append(f"jumps that C code sees: {problem}")
        return

    world, name = bench.world(8, 3), bench.name("clock")
    bench.reference(world)
    began = time.monotonic()
    for faults, wanted in (("step.forward@rank=1@step=7:kill", EXIT_FAILED), ("", EXIT_DONE)):
        process = launch(world, name, faults, {"LD_PRELOAD": str(library)})
        try:
            _, output = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            _, output = process.communicate()
        if process.returncode != wanted:
            result.problems.append(
                f"launched: ended with {process.returncode}, not {wanted}: {tail(output)}"
            )
            return

    jumps = (time.monotonic() - began) * JUMPS_PER_SECOND
    restarts = bench.restarts(world, "clock")
    restarts.name = name
    restarts.finish()
    result.problems += restarts.problems
    result.measured.append(
        f"launched, with jumps that C code sees: killed once and started again, {jumps:.0f} jumps: "
        "ended alike"
    )
