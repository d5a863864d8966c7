"""Fault rows 21 and 22: data that is damaged before the start or during a run."""

import re
import shutil
import time

from fault_tests import file_damage
from fault_tests.cases_kill import tail
from fault_tests.processes import Job
from fault_tests.restarts import Restarts
from fault_tests.result import Bench, Result, run_pytest
from fault_tests.tiny_run import GLOBAL, TinyRun
from k2train.errors import EXIT_FAILED, EXIT_USAGE
from k2train.record.metrics import latest, read_metrics


def row_21(bench: Bench) -> Result:
    """Row 21: data that is bad from the start."""
    result = Result(
        21,
        "Ids beyond the vocabulary, wrong length, broken JSON and UTF-8 in the data",
        "all refused before the first step, file and place named",
        "the suite's tests of bad input, each with its own kind of bad file",
    )
    run_pytest(result, ["tests/laws/test_device_free_law.py"], bench.scratch, "bad input")
    return result


def row_22(bench: Bench) -> Result:
    """Row 22: data that is damaged under a run."""
    result = Result(
        22,
        "A chunk is missing, changed, cut, or another one's copy; restarts at any step",
        "found at the start or before the first row of the chunk is read, named; each sample read "
        "exactly once after any number of restarts",
        "harm to one chunk before the start, or to a later one while the run trains, then mended "
        "and the same command; and a run killed in each of its steps, whose rows are counted",
    )

    kinds = ("flip", "cut", "lost", "swapped")
    for kind, meanwhile in [(kind, later) for kind in kinds for later in (False, True)][
        :: 3 if bench.short else 1
    ]:
        _harmed_chunk(bench, result, kind, meanwhile)

    world = bench.world(12, 2)
    restarts = bench.restarts(world, "row22")
    points = ("step.read", "step.forward", "step.update", "step.done")
    steps = range(1, world.steps + 1)
    for step in steps[:: 8 if bench.short else 1]:
        fault = f"{points[step % len(points)]}@rank={step % world.ranks}@step={step}:kill"
        if not restarts.attempt(fault).struck:
            result.missing.append(f"the kill in step {step} struck nobody")
        if restarts.done:
            break

    restarts.finish()
    result.problems += restarts.problems
    rows = latest(restarts.run / "metrics.jsonl")
    read = sum(row.rows[1] - row.rows[0] for row in rows)
    taken = len(read_metrics(restarts.run / "metrics.jsonl"))

    result.measured.append(
        f"{len(restarts.attempts)} starts, {taken} steps taken to make {len(rows)}: the steps that "
        f"count read {read} rows, each of the "
        f"{restarts.world.chunks * restarts.world.steps_per_chunk * GLOBAL} rows of "
        "the data exactly once"
    )

    return result


def _harmed_chunk(bench: Bench, result: Result, kind: str, meanwhile: bool) -> None:
    """Damage chunk 3 of 5 before the start, or after its second step.

    The run must end and name the chunk. Then the chunk is repaired and the run continues.
    """
    base = bench.world(5, 3)
    reference = bench.reference(base)
    world = TinyRun(bench.scratch / bench.name(f"data_{kind}"), 5, 3)
    shutil.copytree(base.data, world.data)
    world.config.write_text(base.config.read_text().replace(str(base.folder), str(world.folder)))
    restarts = Restarts(bench.server, world, "harmed", reference)
    done: list[str] = []

    def harm(job: Job | None = None) -> None:
        until = time.monotonic() + 60
        while (
            job
            and not job.over
            and sum(n == "step.done" for _, _, n in job.points()) < 4
            and time.monotonic() < until
        ):
            bench.server.wait(job, 0.01)
        done.append(file_damage.KINDS[kind](world.data / "chunk_003.npy", bench.random(22)))

    if not meanwhile:
        harm()
    attempt = restarts.attempt("", harm if meanwhile else None, (EXIT_USAGE, EXIT_FAILED), 120)
    names = {"chunk_003", *re.findall(r"chunk_\d+", done[0])}

    line = next(
        (
            x
            for x in attempt.text.splitlines()
            if x.startswith("k2train:") and any(n in x for n in names)
        ),
        "",
    )

    when = "while it trains" if meanwhile else "before the start"
    if EXIT_USAGE not in attempt.codes or not line:
        result.problems.append(
            f"chunk {kind} {when}: ended with {attempt.codes}: {tail(attempt.text)}"
        )

    for path in base.data.iterdir():
        shutil.copy(path, world.data / path.name)
    restarts.finish()
    result.problems += restarts.problems
    result.measured.append(
        f"chunk 3 {kind} {when}: ended with {attempt.codes} after step {max(attempt.after, 0)}, "
        f"mended, ended alike; {line[:160]}"
    )
