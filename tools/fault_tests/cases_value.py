"""Fault rows 12 and 17: wrong values in gradients, losses, weights and moments."""

import re
from collections.abc import Mapping
from pathlib import Path

from fault_tests import disk_state
from fault_tests.cases_kill import tail
from fault_tests.restarts import Restarts
from fault_tests.result import Bench, Result, run_pytest
from fault_tests.tiny_run import TinyRun
from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.record.metrics import latest, read_roots

TENSORS = (
    "embedding.weight",
    "layers.0.attention.query.weight",
    "layers.1.mlp.down.weight",
    "norm.weight",
    "head.weight",
)
OVERLAPPED = (("parallel.overlap", "on"), ("parallel.bucket_bytes", 500))
"""Transfers run beside the computing, as is the default on GPUs, in many small buckets."""
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
        "NaN, Inf or a huge number in a gradient or a loss, on one rank",
        "exactly that step is skipped on all ranks; weights and both moments keep every bit; batch "
        "logged; three in a row stop; a gradient of 1e30 is decided alike on 1 process and on 2",
        "each rank, several tensors, micro-batches and kinds of value, one run each, transfers "
        "overlapped and not; the step's own root against the one before",
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
    for how, grid in (("one after the other", world), ("overlapped", world.changed(*OVERLAPPED))):
        held = 0
        for fault in cases[:: 6 if bench.short else 1]:
            name, codes, text = _run(bench, grid, fault)
            wrong = skipped_problem(grid, name, codes, text)
            held += not wrong
            if wrong:
                result.problems.append(f"transfers {how}, {fault}: {wrong}")
        result.measured.append(
            f"transfers {how}: {held} runs skipped step 5 and nothing else, and left all state as "
            "step 4 had it"
        )

    _huge(bench, result, world)
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


def _run(bench: Bench, world: TinyRun, fault: str, *more: str) -> tuple[str, list[int], str]:
    """Run a world once with a fault: the run's name, exit codes and output."""
    name = bench.name("row12")
    job = bench.server.begin(world.arguments(name, *more), world.ranks, fault)
    bench.server.wait(job, 120)
    bench.server.end(job)
    return name, job.codes, job.text()


def _huge(bench: Bench, result: Result, world: TinyRun) -> None:
    """A finite gradient whose square is beyond fp32: clipped or skipped, alike on every layout."""
    fault = f"gradient@rank=0@step=5:huge={TENSORS[1]}"
    grids = (world.on(1), world, world.changed(*OVERLAPPED), world.on(2, tensor=2))

    for clip, skipped in (("1.0", []), ("null", [5])):
        norms = []
        for grid in grids:
            name, codes, text = _run(bench, grid, fault, f"optimizer.clip_norm={clip}")
            rows = latest(grid.run(name) / "metrics.jsonl") if set(codes) == {EXIT_DONE} else []
            found = [row.step for row in rows if not row.applied]
            norms += [row.grad_norm for row in rows if row.step == 5]
            if not rows or found != skipped or "not finite" in text:
                result.problems.append(
                    f"{fault}, clip_norm {clip}, {grid.ranks} ranks {dict(grid.layout)}: codes "
                    f"{codes}, steps {found} not applied: {tail(text)}"
                )
        if not norms or max(norms) > 1.001e30 or min(norms) < 0.999e30:
            result.problems.append(f"{fault}, clip_norm {clip}: norms {norms}")
        else:
            what = "skipped" if skipped else "clipped and applied"
            result.measured.append(
                f"a gradient of 1e30, clip_norm {clip}: {what} on all {len(grids)} layouts"
            )


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
        "in every step; transfers overlapped and not; and one flip in a step in which nothing is "
        "compared",
    )

    world = bench.world(6, 3).changed(("audit.replicas_every_steps", 1))
    weights = [(rank, "weight", name) for rank in range(world.ranks) for name in TENSORS][
        :: 5 if bench.short else 1
    ]
    states = [(rank, "moment", f"{name}.{state}") for rank, name, state in STATES][
        :: 2 if bench.short else 1
    ]

    overlapped = world.changed(*OVERLAPPED)
    # A root waits for the weights of its step: without one they still arrive in the next step.
    arriving = overlapped.changed(("audit.root_every_steps", 0))
    for what, grid, cases in (
        ("copies of weights", world, weights),
        ("states of the optimizer", world, states),
        ("copies of weights, transfers overlapped", arriving, weights),
        ("states of the optimizer, transfers overlapped", overlapped, states),
    ):
        found = [line for case in cases if (line := _flipped(bench, result, grid, *case))]
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
