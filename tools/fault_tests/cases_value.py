"""Fault rows 12 and 17 to 20: wrong values, other layouts, repeated runs."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fault_tests import disk_state
from fault_tests.cases_kill import tail
from fault_tests.restarts import Restarts
from fault_tests.result import Bench, Result, run_pytest
from fault_tests.tiny_run import TinyRun
from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.record.metrics import latest, read_roots

TENSORS = (
    "embedding.weight",
    "layers.0.attention.query.weight",
    "layers.1.mlp.down.weight",
    "norm.weight",
    "head.weight",
)
STATES = (
    (0, "embedding.weight", "exp_avg"),
    (1, "layers.1.mlp.down.weight", "exp_avg_sq"),
    (1, "head.weight", "master"),
    (0, "layers.0.attention.query.weight", "exp_avg_sq"),
)


def row_12(bench: Bench) -> Result:
    """Row 12: non-finite gradients and losses."""
    result = Result(
        12,
        "NaN or Inf in a gradient or a loss, on one rank",
        "exactly that step is skipped on all ranks; weights and both moments keep every bit; batch "
        "logged; three in a row stop",
        "each rank, several tensors, micro-batches and kinds of value, one run each; the step's "
        "own root against the one before",
    )

    world = bench.world(4, 3)
    bench.reference(world)

    cases = [
        (f"gradient@rank={rank}@step=5:{value}={name}")
        for rank in range(world.ranks)
        for name in TENSORS
        for value in ("nan", "inf")
    ]

    cases += [
        f"loss@rank={rank}@step=5@nth={nth}:nan" for rank in range(world.ranks) for nth in (1, 2)
    ]
    held = 0

    for fault in cases[:: 6 if bench.short else 1]:
        name = bench.name("row12")
        job = bench.server.begin(world.arguments(name), world.ranks, fault)
        bench.server.wait(job, 120)
        bench.server.end(job)
        wrong = skipped_problem(world, name, job.codes, job.text())
        held += not wrong
        if wrong:
            result.problems.append(f"{fault}: {wrong}")

    result.measured.append(
        f"{held} runs skipped step 5 and nothing else, and left all state as step 4 had it"
    )
    job = bench.server.begin(
        world.arguments(bench.name("row12")),
        world.ranks,
        ";".join(f"gradient@rank=1@step={s}:nan" for s in (5, 6, 7)),
    )
    bench.server.wait(job, 120)
    bench.server.end(job)

    if job.codes != [EXIT_FAILED] * world.ranks:
        result.problems.append(f"three in a row: ended with {job.codes}")
    else:
        result.measured.append(
            f"three in a row: stopped with 1 on every rank; {tail(job.text())[-140:]}"
        )

    return result


def skipped_problem(world: TinyRun, name: str, codes: list[int], text: str) -> str:
    """Describe what is wrong with a run that skipped steps; empty when nothing is."""
    run = world.run(name)
    if codes != [EXIT_DONE] * world.ranks:
        return f"ended with {codes}: {tail(text)}"
    skipped = [row.step for row in latest(run / "metrics.jsonl") if not row.applied]
    if skipped != [5]:
        return f"steps {skipped} were not applied"
    roots = tensor_roots(run / "state_roots.jsonl")
    if 4 in roots and 5 in roots:
        changed = [tensor for tensor, digest in roots[5].items() if roots[4].get(tensor) != digest]
        return f"changed in the skipped step: {changed[:3]}" if changed else ""
    return "no roots of the state were written for steps 4 and 5"


def tensor_roots(path: Path) -> dict[int, Mapping[str, str]]:
    """Digest of weights and moments by step and tensor."""
    if not path.exists():
        return {}
    return {record.step: record.tensors for record in read_roots(path)}


def row_17(bench: Bench) -> Result:
    """Row 17: a flipped bit in weights or moments."""
    result = Result(
        17,
        "A bit flips in memory: in one copy of the weights, or in a moment",
        "found before the next update, rank and tensor named; the run ends, goes back to a "
        "checkpoint of before, and ends with the same bits",
        "one bit of a weight on each of two data-parallel ranks, several tensors, and one bit of "
        "each state of the optimizer (of which there is no copy); copies compared and roots taken "
        "in every step; and one flip in a step in which nothing is compared",
    )

    world = bench.world(6, 3).changed(("audit.replicas_every_steps", 1))
    weights = [(rank, "weight", name) for rank in range(world.ranks) for name in TENSORS][
        :: 5 if bench.short else 1
    ]
    states = [(rank, "moment", f"{name}.{state}") for rank, name, state in STATES][
        :: 2 if bench.short else 1
    ]

    for what, cases in (("copies of weights", weights), ("states of the optimizer", states)):
        found = [line for case in cases if (line := _flipped(bench, result, world, *case))]
        result.measured.append(
            f"{what}: {len(found)} of {len(cases)} flips found and named"
            + (f", e.g. {found[0][:200]}" if found else "")
        )

    _between(bench, result)

    run_pytest(
        result,
        ["tests/parallel/test_replica_check.py"],
        bench.scratch,
        "other layouts, drift by one unit, not finite",
    )

    return result


def _flipped(bench: Bench, result: Result, world: TinyRun, rank: int, kind: str, name: str) -> str:
    """One flipped bit and its consequence: the line that names it, or "" and a problem."""
    restarts = bench.restarts(world, "row17")
    attempt = restarts.attempt(f"{kind}@rank={rank}@step=7:flip={name}", None, (EXIT_FAILED,))
    lines = [x for x in attempt.text.splitlines() if name in x and re.search(rf"rank {rank}\b", x)]
    if set(attempt.codes) != {EXIT_FAILED} or not lines:
        result.problems.append(
            f"{name} on rank {rank}: codes {attempt.codes}, not named: {tail(attempt.text)}"
        )
        return ""
    restarts.finish()
    result.problems += restarts.problems + latest_problems(restarts)
    return lines[0]


def _between(bench: Bench, result: Result) -> None:
    """What is not detected: a published weight is overwritten by the next update."""
    world = bench.world(6, 3).changed(
        ("audit.replicas_every_steps", 2), ("audit.root_every_steps", 0)
    )
    seen = []

    for kind, name in (("weight", "norm.weight"), ("moment", "head.weight.exp_avg")):
        fault = f"{kind}@rank=1@step=7:flip={name}"
        job = bench.server.begin(world.arguments(bench.name("between")), world.ranks, fault)
        bench.server.wait(job, 120)
        bench.server.end(job)
        seen.append("found" if set(job.codes) == {EXIT_FAILED} else "not found")

    result.measured += [
        f"a flip of a weight in a step without a comparison (every 2 steps here): {seen[0]}; the "
        "next update writes the copy anew, so comparing every N steps finds one such flip in N, "
        "and every difference that lasts: with the default of 100 one in a hundred",
        f"a flip of a moment where no root is taken (audit.root_every_steps=0): {seen[1]}; with "
        "roots every N steps, one is found that strikes between a root and the update after it: "
        "with the default, one in as many as that key says",
    ]


def latest_problems(restarts: Restarts) -> list[str]:
    """Check that the effective steps are those of the undisturbed run.

    Rows of earlier attempts do not matter.
    """
    rows = {row.step: disk_state.values_of(row) for row in latest(restarts.run / "metrics.jsonl")}
    wrong = [
        step for step in restarts.reference.rows if rows.get(step) != restarts.reference.rows[step]
    ]
    return (
        [f"{restarts.name}: step {wrong[0]} differs at the end, {len(wrong)} in all"]
        if wrong
        else []
    )


def row_18(bench: Bench) -> Result:
    """Row 18: restarts on the same layout."""
    result = Result(
        18,
        "Going on with the same layout",
        "at least 50 steps bit-equal in loss, gradient norm, weights, both moments and batch; "
        "leaving out any item of the state must show",
        "a run of 60 steps killed after every 7 or so, each step's root against the undisturbed "
        "run; and the test that drops each item",
    )

    world = bench.world(20, 3)
    for grid in (
        (world,) if bench.short else (world, world.on(4, tensor=2, pipeline=2), world.on(1))
    ):
        restarts = bench.restarts(grid, "row18")
        while not restarts.done and len(restarts.attempts) < 25:
            restarts.attempt("step.update@rank=0@nth=8:kill")
        restarts.finish()
        result.problems += restarts.problems
        roots = sum(row[-1] != "null" for row in restarts.reference.rows.values())
        result.measured.append(
            f"{grid.ranks} ranks {dict(grid.layout) or 'data-parallel'}: {grid.steps} steps over "
            f"{len(restarts.attempts)} starts, equal in loss, norm, rows, "
            f"rate{' and root of the state' if roots else ''} ({roots} roots)"
        )

    if not bench.short:
        node = "tests/laws/test_record_law.py::test_every_item_of_state_matters"
        run_pytest(
            result, [node], bench.scratch, "each item of the state left out or changed, and seen"
        )

    return result


def row_19(bench: Bench) -> Result:
    """Row 19: restarts on other layouts."""
    result = Result(
        19,
        "Going on with another layout",
        "weights and moments bit-equal after the reshard; the same rows in every step; loss within "
        "rounding, and to the bit where the order of sums is the same",
        "one run stopped and started on 1, 2 and 4 ranks in turn; roots of what was loaded; losses "
        "against the undisturbed run",
    )

    world = bench.world(8, 3)
    reference = bench.reference(world)

    grids = [
        world,
        world.on(4, tensor=2, pipeline=2),
        world.on(1),
        world.on(2, tensor=2),
        world.on(2, pipeline=2),
    ]

    name, apart = bench.name("row19"), 0.0
    starts, problem = _in_turn(bench, grids, name)
    if problem:
        result.problems.append(problem)
        return result

    rows = {row.step: row for row in latest(world.run(name) / "metrics.jsonl")}
    for step, wanted in reference.rows.items():
        values = disk_state.values_of(rows[step])
        if values[:2] != wanted[:2]:
            result.problems.append(f"step {step} read {values[:2]}, undisturbed {wanted[:2]}")
        apart = max(apart, abs(rows[step].loss - float(json.loads(wanted[2]))))

    if apart > 1e-3:
        result.problems.append(f"losses are up to {apart:.2g} apart")
    result.problems += disk_state.sample_problems(world.run(name), world)
    result.measured.append(
        f"{starts} starts on {len(grids)} layouts in turn; same rows in every step; losses at "
        f"most {apart:.2g} apart"
    )

    if not bench.short:
        run_pytest(
            result,
            ["tests/laws/test_layout_law.py", "tests/parallel/test_device_digest.py"],
            bench.scratch,
            "parity of layouts, and roots after a load on another",
        )

    return result


def _in_turn(bench: Bench, grids: Sequence[TinyRun], name: str) -> tuple[int, str]:
    """Run on one grid after another, 5 steps each, to the end: (starts, what went wrong)."""
    for index in range(20):
        grid = grids[index % len(grids)]
        job = bench.server.begin(grid.arguments(name, "run.stop_after_steps=5"), grid.ranks)
        bench.server.wait(job, 120)
        bench.server.end(job)
        if not set(job.codes) <= {0, 75}:
            ended = f"ended with {job.codes}: {tail(job.text())}"
            return index + 1, f"{dict(grid.layout)} on {grid.ranks}: {ended}"
        if set(job.codes) == {EXIT_DONE}:
            break
    return index + 1, ""


def row_20(bench: Bench) -> Result:
    """Row 20: the same run twice."""
    result = Result(
        20,
        "The same run twice",
        "200 steps in other processes: the same root at every step",
        "200 steps run twice in processes of their own; every loss, norm and root compared",
    )

    world = bench.world(40, 5)
    reference = bench.reference(world)
    restarts = bench.restarts(world, "again")
    restarts.finish(1)
    result.problems += restarts.problems
    newest = read_manifest(list_checkpoints(restarts.run / "checkpoints")[-1])
    result.measured.append(
        f"{len(reference.rows)} steps equal in every value; root at the end "
        f"{disk_state.root_of(newest)[:16]} in both"
    )
    return result
