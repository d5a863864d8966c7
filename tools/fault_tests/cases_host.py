"""Fault rows 23, 24, 26 to 29: two jobs, stale lease, changed configs, crash loops, secrets."""

import time
from pathlib import Path

from fault_tests.cases_kill import tail
from fault_tests.processes import Job
from fault_tests.result import Bench, Result, allowed_seconds, run_pytest
from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from k2train.record.events import Resumed, Started, of_kind
from k2train.record.ledger import read_ledger

REFUSED_SECONDS = 2.0
SECRET = "canary-5d1f0c9e77"


def row_23(bench: Bench) -> Result:
    """Row 23: two jobs on one run directory."""
    result = Result(
        23,
        "Two jobs in one run directory",
        "the second refuses in 2 s naming host and process; 100 races, never two owners",
        "pairs of jobs forked at the same moment on a fresh directory; and a second job while a "
        "first one trains",
    )

    races, both, none, late = 10 if bench.short else 100, 0, 0, 0.0
    world = bench.world(2, 2).on(1)

    for _ in range(races):
        arguments = world.arguments(
            bench.name("race"), "run.stop_after_steps=1", "kernels.attention=plain"
        )
        pair = [bench.server.begin(arguments, 1) for _ in range(2)]
        for job in pair:
            bench.server.wait(job, 120)
        codes = sorted(job.codes[0] for job in pair)
        refused = [job for job in pair if job.codes == [EXIT_USAGE]]
        # The second job may also start when the first has finished, and then resumes its run.
        both += not refused and overlap(pair[0], pair[1])
        none += all(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes)
        for job in refused:
            took = job.ends[0][1] - job.began
            late = max(late, took)
            if took > allowed_seconds(REFUSED_SECONDS, pair):
                result.problems.append(f"a refusal took {took:.1f} s")
            if f"{pair[0].pids[0]}" not in job.text() and f"{pair[1].pids[0]}" not in job.text():
                result.problems.append(f"the refusal names no process: {tail(job.text())}")

    result.problems += [f"{both} races with two owners at once"] * bool(both) + [
        f"{none} races without an owner"
    ] * bool(none)
    result.measured.append(
        f"{races} races: {both} with two owners, {none} with none; the slowest refusal took "
        f"{late:.2f} s"
    )
    _second_while_one_trains(bench, result)
    return result


def _second_while_one_trains(bench: Bench, result: Result) -> None:
    """A second job must be refused while the first trains, and leave no trace in its run."""
    restarts = bench.restarts(bench.world(6, 3), "row23")
    refused: list[str] = []

    def second(first: Job) -> None:
        until = time.monotonic() + 60
        while (
            not any(name == "step.done" for _, _, name in first.points())
            and time.monotonic() < until
        ):
            bench.server.wait(first, 0.01)

        job = bench.server.begin(restarts.world.arguments(restarts.name), restarts.world.ranks)
        bench.server.wait_as_launcher(job, 60, 0.0)
        took = job.ends[0][1] - job.began

        if (
            job.ends[0][0] != EXIT_USAGE
            or f"pid {first.pids[0]}" not in job.text()
            or first.over
            or took > allowed_seconds(REFUSED_SECONDS, [first])
        ):
            result.problems.append(
                f"second job: {job.codes} after {took:.1f} s, first over: {first.over}: "
                f"{tail(job.text())}"
            )

        refused.append(f"{took:.2f} s")

    restarts.attempt("step.done@step=2:sleep=1.5", second)
    restarts.finish()
    tokens = {
        read_manifest(path).fencing_token for path in list_checkpoints(restarts.run / "checkpoints")
    }
    if len(restarts.attempts) != 1 or tokens != {1}:
        result.problems.append(
            f"the first was disturbed: {len(restarts.attempts)} starts, tokens {tokens}"
        )

    result.problems += restarts.problems
    result.measured.append(
        f"a second job while one trains: refused in {refused[0]}, its process named; the first one "
        "undisturbed"
    )


def overlap(a: object, b: object) -> bool:
    """True when both jobs were between their lock and their end at one moment, by their traces."""
    spans = []
    for job in (a, b):
        locked = [at for at, _, name in job.points() if name == "start.locked"]  # type: ignore[attr-defined]
        if not locked:
            return False
        spans.append((locked[0], job.points()[-1][0]))  # type: ignore[attr-defined]
    return max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1])


def row_24(bench: Bench) -> Result:
    """Row 24: a lease left by a job that died."""
    result = Result(
        24,
        "A lease whose owner is dead",
        "taken over by itself when the owner is provably dead; else refused with the command to "
        "run; the token grows",
        "SIGKILL to all ranks at once, then the same command; and the tests of the lease with "
        "other hosts and boots",
    )

    restarts = bench.restarts(bench.world(6, 3), "row24")
    for nth in (2, 3):
        restarts.attempt(f"step.read@nth={nth}:kill")
    restarts.finish()
    result.problems += restarts.problems
    events = [entry.event for entry in read_ledger(restarts.run / "ledger.jsonl")]
    starts = [event for event in events if isinstance(event, Started | Resumed)]
    tokens = [start.fencing_token or 0 for start in starts]
    reasons = [start.taken_over_from.reason for start in starts if start.taken_over_from]
    saved = [
        read_manifest(path).fencing_token or 0
        for path in list_checkpoints(restarts.run / "checkpoints")
    ]
    if len(tokens) < 3 or 0 in tokens or tokens != sorted(set(tokens)):
        result.problems.append(f"the tokens of {len(starts)} starts do not grow: {tokens}")
    if saved != sorted(saved) or not set(saved) <= set(tokens):
        result.problems.append(
            f"the tokens in the manifests {saved} are not those of the starts, {tokens}"
        )

    if len(reasons) != 2:
        result.problems.append(f"taken over {len(reasons)} times after 2 deaths: {reasons}")
    waits = [a.first_point_seconds("start.locked") for a in restarts.attempts[1:]]
    result.measured.append(
        f"SIGKILL to all twice, the same command each time: tokens of the starts {tokens}, in the "
        f"manifests {saved}; reason given: {', '.join(sorted(set(reasons)))}; from a start to its "
        f"lease at most {max(w for w in waits if w is not None):.2f} s"
    )

    run_pytest(
        result,
        ["tests/run_lock/test_lock.py", "tests/run_lock/test_lease.py"],
        bench.scratch,
        "other hosts, boots, races without flock",
    )

    return result


def row_26(bench: Bench) -> Result:
    """Row 26: a changed config at a restart."""
    result = Result(
        26,
        "Another config at a restart",
        "the difference is shown; what makes another run of it is refused unless named in "
        "run.allow, and then it stands in the ledger",
        "lr.peak changed after a kill: once as it is, once allowed; a harmless key changed",
    )

    restarts = bench.restarts(bench.world(6, 3), "row26")
    restarts.attempt("step.read@rank=0@step=9:kill")
    refused = restarts.attempt("", None, (2,), 240.0, "lr.peak=0.02")

    if not refused.refused or "lr.peak" not in refused.text:
        result.problems.append(f"lr.peak changed: {refused.codes}: {tail(refused.text)}")
    else:
        result.measured.append(
            f"lr.peak changed: refused with 2; {refused.text.splitlines()[0][-200:]}"
        )

    harmless = restarts.attempt(
        "", None, (75,), 240.0, "checkpoint.keep_optimizer_states=4", "run.stop_after_steps=1"
    )
    if set(harmless.codes) != {EXIT_STOPPED}:
        result.problems.append(f"a harmless key: {harmless.codes}: {tail(harmless.text)}")
    result.problems += restarts.problems
    allowed = bench.server.begin(
        restarts.world.arguments(restarts.name, "lr.peak=0.02", "run.allow=[lr.peak]"), 2
    )
    bench.server.wait(allowed, 120)
    bench.server.end(allowed)
    resumed = of_kind(read_ledger(restarts.run / "ledger.jsonl"), Resumed)

    if allowed.codes != [0, 0] or not any("lr.peak" in str(event.allowed) for event in resumed):
        result.problems.append(
            f"allowed by name: {allowed.codes}, in the ledger: no; {tail(allowed.text())}"
        )
    else:
        result.measured.append(
            "allowed by name: went on to the end, and the change stands in the ledger"
        )

    return result


def row_27(bench: Bench) -> Result:
    """Row 27: a run that dies at the same step again and again."""
    result = Result(
        27,
        "The run dies at the same place again and again",
        "after three starts that got nowhere it is refused with 2, and says what was tried; never "
        "an endless loop",
        "SIGKILL before the first save of every start, the same command until it refuses",
    )

    world = bench.world(6, 3).changed(("run.max_fruitless_starts", 3))
    restarts = bench.restarts(world, "row27")
    restarts.attempt("step.done@rank=0@step=5:kill")
    starts = 0
    for _ in range(6):
        attempt = restarts.attempt("step.forward@rank=1@nth=2:kill", None, (1, 2, -9))
        starts += 1
        if attempt.refused:
            break

    if not attempt.refused:
        result.problems.append(
            f"still started after {starts} starts that got nowhere: {attempt.codes}"
        )
    else:
        result.measured.append(
            f"refused at start {starts} in a row: {attempt.text.splitlines()[0][-250:]}"
        )

    result.problems += restarts.problems
    return result


def row_28(bench: Bench) -> Result:
    """Row 28: untrusted input files."""
    result = Result(
        28,
        "Hostile checkpoints, configs and data",
        "at least 20 kinds of hostile file: nothing executed, nothing written outside the run, one "
        "line",
        "the suite's corpus of hostile files",
    )
    run_pytest(result, ["tests/system/test_trust.py"], bench.scratch, "hostile files")
    return result


def row_29(bench: Bench) -> Result:
    """Row 29: secrets in the environment do not reach any file."""
    result = Result(
        29,
        "A secret in the environment",
        "found in no artefact, log, ledger, config, nor on any command line",
        "canary values of WANDB_API_KEY and others in the environment of a real run with the "
        "mirror offline; every byte it wrote is searched, and /proc/*/cmdline while it runs",
    )

    world = bench.world(6, 3)
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
    run = world.run(bench.name("row29"))
    environment = {name: f"{SECRET}-{name.lower()}" for name in names}
    environment |= {"WANDB_DIR": str(run), "WANDB_SILENT": "true"}
    job = bench.server.begin(
        world.arguments(run.name, "wandb.mode=offline"), 2, "", [environment] * 2
    )
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while not bench.server.wait(job, 0.02) and time.monotonic() < deadline:
        seen |= {path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if holds(path)}
    bench.server.end(job)
    files = [path for folder in (run, job.folder) for path in folder.rglob("*") if path.is_file()]
    leaks = [str(path.relative_to(bench.scratch)) for path in files if holds(path)]
    result.problems += [f"found in {place}" for place in leaks] + [
        f"found on the command line of process {pid}" for pid in sorted(seen)
    ]
    if job.codes != [0, 0]:
        result.problems.append(f"the run ended with {job.codes}: {tail(job.text())}")
    offline = any("wandb" in path.parts for path in files)
    if not offline:
        result.missing.append("the mirror: wandb is not installed here")
    result.measured.append(
        f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes: {len(leaks)} "
        "hold the canary"
    )
    return result


def holds(path: Path) -> bool:
    """True when a file contains the secret."""
    try:
        return SECRET.encode() in path.read_bytes()
    except OSError:
        return False
