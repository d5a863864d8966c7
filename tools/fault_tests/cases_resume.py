"""Fault rows 18 to 20: going on with the same layout and with others, and the same run twice."""

import json
from collections.abc import Sequence
from typing import Any

from fault_tests import disk_state
from fault_tests.cases_kill import tail
from fault_tests.code_patches import FORGET
from fault_tests.restarts import GOING_ON
from fault_tests.result import Bench, Result, run_pytest
from fault_tests.tiny_run import TinyRun
from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from k2train.record.metrics import latest

DIVISIBLE = (
    ("batch.global_sequences", 12),
    ("model.hidden_size", 24),
    ("model.num_heads", 12),
    ("model.num_layers", 4),
)
"""A batch and a model that divide by 2, 3 and 4."""
LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2}),
    (1, {}),
    (3, {"pipeline": 3, "layers_per_stage": [1, 2, 1]}),
    (2, {"tensor": 2}),
    (4, {}),
    (3, {"tensor": 3, "sequence": "false"}),
    (4, {"pipeline": 4}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2}),
    (3, {}),
    (4, {"tensor": 4}),
    (4, {"pipeline": 2}),
)
"""Ranks and axes of every layout of at most four ranks; the rest of the ranks is data-parallel."""
ITEMS = ("master", "exp_avg", "exp_avg_sq", "adam_steps", "step")
"""What makes up the state: flat states of the optimizer and numbers of the run."""
LAPS = 3
STEPS_A_START = 2
MOST_STARTS = 60


def row_18(bench: Bench) -> Result:
    """Row 18: restarts on the same layout."""
    result = Result(
        18,
        "Going on with the same layout",
        "at least 50 steps bit-equal in loss, gradient norm, weights, both moments and batch; "
        "leaving out any item of the state must show",
        "a run of 60 steps killed after every 7 or so, each step's root against the undisturbed "
        "run; restarts that leave out one item of the state; and the tests that drop each item",
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

    _forget(bench, result)
    if not bench.short:
        nodes = [
            "tests/laws/test_record_law.py::test_every_item_of_state_matters",
            "tests/train/test_state.py::test_every_item_is_saved_and_restored",
        ]
        run_pytest(result, nodes, bench.scratch, "each item of the state left out, and seen")
    return result


def _forget(bench: Bench, result: Result) -> None:
    """Leave out one item at a restart: the comparison of this table must see it.

    The run's own resume drill would stop such a restart before there is much to compare.
    """
    world = bench.world(20, 3).changed(("audit.resume_drill", "off"))
    seen = []
    for item in ITEMS[:: 3 if bench.short else 1]:
        restarts = bench.restarts(world, f"forgets_{item}")
        patch = {"FAULT_RUN_PATCH": "code_patches:forgets_an_item", FORGET: item}
        restarts.environments = [patch] * world.ranks
        restarts.attempt("step.read@rank=0@step=9:kill")
        resumed = restarts.attempt("step.read@rank=0@step=15:kill", allowed=(*GOING_ON, EXIT_USAGE))
        if restarts.problems:
            seen.append(item)
        elif resumed.first_step_seconds is None:
            seen.append(f"{item} (by the start itself: {tail(resumed.text)[-120:]})")
        else:
            result.problems.append(f"{item} was left out at a restart and nothing differs")
    result.measured.append(f"left out at a restart, and seen: {', '.join(seen)}")


def row_19(bench: Bench) -> Result:
    """Row 19: restarts on other layouts."""
    result = Result(
        19,
        "Going on with another layout",
        "weights and moments bit-equal after the reshard; the same rows in every step; loss within "
        "rounding, and to the bit where the order of sums is the same",
        "one run stopped and started on every layout of 1 to 4 ranks (tensor, pipeline, data), in "
        "several orders; each start compares the digest of each tensor as loaded with the saved "
        "one; losses against the undisturbed run",
    )

    world = bench.world(26, 9).changed(*DIVISIBLE)
    reference = bench.reference(world)
    grids = [world.on(ranks, **axes) for ranks, axes in LAYOUTS[:: 4 if bench.short else 1]]
    order = list(grids)
    for _ in range(LAPS - 1):
        order += bench.random(19).sample(grids, len(grids))

    name, apart = bench.name("row19"), 0.0
    starts, problem = _in_turn(bench, order, name)
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
    """Run on one grid after another, some steps each, to the end: (starts, what went wrong)."""
    for index in range(MOST_STARTS):
        grid = grids[index % len(grids)]
        # The last ones go on to the end.
        settings = [f"run.stop_after_steps={STEPS_A_START}"] if index < len(grids) else []
        job = bench.server.begin(grid.arguments(name, *settings), grid.ranks)
        bench.server.wait(job, 120)
        bench.server.end(job)
        if not set(job.codes) <= {EXIT_DONE, EXIT_STOPPED}:
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
