"""A preparation's phases on a real SLURM: would catch jobs that the cluster refuses or that do not
find their Python, a driver that submits twice, a failed task that leaves its successors queued, and
a job that vanishes unnoticed.
"""

import hashlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2train.data.prepare.workspace import Workspace
from tests.support.command_line import hear_signals
from tests.support.preparation import (
    all_files_complete,
    finished,
    in_order,
    start_counts,
    toy_phases,
    toy_workspace,
)
from tests.support.scenarios import Scenario, judges
from tests.support.slurm import Cluster

ROOT = Path(__file__).resolve().parents[2]
FIRST, LAST = 4, 2
PHASES = toy_phases(FIRST, LAST)
ALL = {f"{phase.name}_{number}" for phase in PHASES for number in range(phase.tasks)}
CHOICES = ('kind="slurm"', "memory_gb=1", 'time="00:10:00"', "workers=4")
NEEDED: tuple[str, ...] = ()


class Driver:
    """A command that prepares data on the cluster, and what it writes to stderr."""

    def __init__(self, cluster: Cluster, folder: Path, command: Sequence[object]) -> None:
        self.path = folder / "driver.err"
        with self.path.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**cluster.environment, "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                stderr=errors,
                preexec_fn=hear_signals,
            )

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def said(self) -> str:
        return self.path.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def driver(
    cluster: Cluster,
    workspace: Workspace,
    *choices: str,
    partition: str = "main",
    first: int = FIRST,
) -> Driver:
    """The driver of a toy preparation."""
    script = ROOT / "tests/support/preparation.py"
    given = [f'partition="{partition}"', f"first={first}", f"last={LAST}"]
    return Driver(cluster, workspace.folder, [script, workspace.folder, *CHOICES, *given, *choices])


def is_of(workspace: Workspace, name: str) -> bool:
    """Whether a job of that name is one of this work folder's."""
    return name.endswith(hashlib.sha256(str(workspace.folder).encode()).hexdigest()[:8])


def queue(cluster: Cluster, workspace: Workspace) -> list[str]:
    """The jobs of a work folder that wait or run."""
    lines = cluster.run("squeue", "--noheader", "--format=%j").splitlines()
    return [name for name in lines if is_of(workspace, name)]


def job_names(cluster: Cluster, workspace: Workspace) -> list[str]:
    """Names of all jobs of a work folder since the cluster's start, one for each submission."""
    records = cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    facts = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in records]
    return sorted(
        {
            f"{fact['JobName']} {fact.get('ArrayJobId', fact['JobId'])}"
            for fact in facts
            if is_of(workspace, fact.get("JobName", ""))
        }
    )


def of_two_nodes(cluster: Cluster, folder: Path) -> Scenario:
    """One preparation to its end, on two nodes of two processors each, and then the same command
    again.
    """
    workspace = toy_workspace(folder, seconds=1.0)
    first = driver(cluster, workspace, partition="pair")
    yield lambda: first.over
    said, before = first.said, job_names(cluster, workspace)
    again = driver(cluster, workspace, partition="pair")
    yield lambda: again.over
    codes = [first.code, again.code]
    return workspace, codes, said, before, job_names(cluster, workspace), cluster.logs()


@judges("both nodes")
def test_both_nodes_do_the_tasks_once(outcome: Any) -> None:
    """Catches jobs that are refused, do not find their Python, or run before the phase they need is
    complete.
    """
    workspace, codes, said, before, after, logs = outcome
    assert codes == [0, 0], said + logs
    assert all_files_complete(workspace, PHASES) and start_counts(workspace) == dict.fromkeys(
        ALL, 1
    )
    assert in_order(workspace, PHASES)
    nodes = {path.read_text().split()[0] for path in (workspace.folder / "begun").iterdir()}
    assert nodes == {"p1", "p2"}
    assert re.search(r"^one: SLURM job \d+, its output in .*/logs/one/slurm$", said, re.MULTILINE)
    assert said.splitlines()[-1].startswith("three: 2 tasks in ")
    assert len(before) == 3 and after == before


def of_killed_driver(cluster: Cluster, folder: Path) -> Scenario:
    # Longer than a busy machine takes to start the second driver.
    workspace = toy_workspace(folder, seconds=30.0)
    first = driver(cluster, workspace)
    yield lambda: len(start_counts(workspace)) >= 2
    first.kill()
    submitted = job_names(cluster, workspace)
    for note in (workspace.folder / "logs").glob("*.jobs"):
        note.unlink()
    again = driver(cluster, workspace)
    yield lambda: again.over
    return workspace, submitted, again.code, again.said, job_names(cluster, workspace)


@pytest.mark.slow
@judges("killed driver")
def test_a_killed_driver_finds_its_jobs_again(outcome: Any) -> None:
    """Catches a second submission of jobs that wait or run, and a job that ends with the driver."""
    workspace, submitted, code, said, after = outcome
    assert len(submitted) == 3
    assert code == 0, said
    # On a busy machine one may have ended before the second driver looks: it takes no time.
    assert said.count("submitted earlier") + said.count("tasks in 0.0 s") == 3
    assert "submitted earlier" in said
    assert after == submitted
    assert all_files_complete(workspace, PHASES)
    assert set(start_counts(workspace).values()) == set(finished(workspace).values()) == {1}


def of_failing_task(cluster: Cluster, folder: Path) -> Scenario:
    orders = {"one/3": "web.jsonl: gone; put it back"}
    workspace = toy_workspace(folder, seconds=2.0, fail=orders)
    first = driver(cluster, workspace)
    yield lambda: first.over
    said, left = first.said, queue(cluster, workspace)
    early = "two_0" in start_counts(workspace)
    toy_workspace(folder)
    again = driver(cluster, workspace)
    yield lambda: again.over
    return workspace, (first.code, said, left, early), (again.code, again.said)


@pytest.mark.slow
@judges("failing task")
def test_a_failing_task_is_its_line_and_the_rest_is_cancelled(outcome: Any) -> None:
    """Catches a failure that is told as an exit code, and phases that stay queued behind it."""
    workspace, (code, said, left, early), again = outcome
    assert code == 2, said
    assert said.splitlines()[-1] == "web.jsonl: gone; put it back"
    assert left == [] and not early
    assert again[0] == 0, again[1]
    assert all_files_complete(workspace, PHASES) and max(finished(workspace).values()) == 1


def of_failure_without_driver(cluster: Cluster, folder: Path) -> Scenario:
    workspace = toy_workspace(folder, seconds=1.0, fail={"one/0": "gone"})
    first = driver(cluster, workspace)
    yield lambda: "two:" in first.said
    first.kill()
    yield lambda: queue(cluster, workspace) == []
    toy_workspace(folder)
    again = driver(cluster, workspace)
    yield lambda: again.over
    return workspace, again.code, again.said


@pytest.mark.slow
@judges("failure without a driver")
def test_a_failure_without_a_driver_ends_the_phases_behind_it(outcome: Any) -> None:
    """Catches phases that wait for ever for one that failed, and a start that takes them for its
    own.
    """
    workspace, code, said = outcome
    assert code == 0, said
    assert all_files_complete(workspace, PHASES)


def of_vanished_job(cluster: Cluster, folder: Path) -> Scenario:
    workspace = toy_workspace(folder, seconds=600.0)
    waiting = driver(cluster, workspace)
    # All four: one that has not start_counts would be told of with another reason.
    yield lambda: len(start_counts(workspace)) == FIRST
    job = (workspace.folder / "logs" / "one.jobs").read_text().split()[0]
    cluster.run("scancel", job)
    yield lambda: waiting.over
    return job, waiting.code, waiting.said


@pytest.mark.slow
@judges("vanished job")
def test_a_vanished_job_is_told_with_its_state(outcome: Any) -> None:
    """Catches a driver that waits for ever for a job that somebody cancelled."""
    job, code, said = outcome
    assert code == 2
    line = said.splitlines()[-1]
    assert re.match(
        rf"one: SLURM job {job}\S* ended as CANCELLED "
        r".*with 4 of 4 tasks unfinished; see .*\.out; start",
        line,
    )


def of_ctrl_c(cluster: Cluster, folder: Path) -> Scenario:
    workspace = toy_workspace(folder, seconds=600.0)
    waiting = driver(cluster, workspace)
    yield lambda: start_counts(workspace)
    waiting.process.send_signal(signal.SIGINT)
    yield lambda: waiting.over
    said, left = waiting.said, queue(cluster, workspace)
    found = re.search(
        r"the same command to wait for them again, or end them with `(scancel [\d ]+)`", said
    )
    assert found, said
    cluster.run(*found[1].split())
    yield lambda: queue(cluster, workspace) == []
    return left


@pytest.mark.slow
@judges("Ctrl-C")
def test_ctrl_c_leaves_the_jobs_and_says_how_to_end_them(outcome: Any) -> None:
    """Catches a Ctrl-C that throws away hours of queueing, or leaves jobs that nobody knows of."""
    assert len(outcome) >= 3


REFUSED = {
    "no such partition": ('partition="nowhere"', "Invalid partition name"),
    "no such node": ('arguments={"nodelist": "n9"}', "Invalid node name"),
}


def of_refused(name: str, cluster: Cluster, folder: Path) -> Scenario:
    refused = driver(cluster, toy_workspace(folder), REFUSED[name][0])
    yield lambda: refused.over
    return refused.code, refused.said


@pytest.mark.slow
@judges(*REFUSED)
def test_what_slurm_refuses_is_one_line(outcome: Any, request: pytest.FixtureRequest) -> None:
    """Catches a traceback of the submission in place of what sbatch said."""
    code, said = outcome
    complaint = REFUSED[request.node.callspec.params["outcome"]][1]
    assert code == 2, said
    assert complaint in said and "SLURM refused the job of one" in said
    assert len(said.splitlines()) == 1


def of_large_array(cluster: Cluster, folder: Path) -> Scenario:
    """Eight tasks where the cluster allows arrays of five."""
    workspace = toy_workspace(folder, seconds=1.0)
    cut = driver(cluster, workspace, 'arguments={"qos": "normal"}', first=2 * FIRST)
    yield lambda: cut.over
    return workspace, cut.code, cut.said


@pytest.mark.slow
@judges("large array")
def test_an_array_larger_than_the_cluster_allows_is_cut(outcome: Any) -> None:
    """Catches a phase whose later arrays are not waited for, and a cluster's limit that is not
    asked for.
    """
    workspace, code, said = outcome
    phases = toy_phases(2 * FIRST, LAST)
    assert code == 0, said
    assert len((workspace.folder / "logs" / "one.jobs").read_text().split()) == 2
    tasks = [f"{phase.name}_{number}" for phase in phases for number in range(phase.tasks)]
    assert all_files_complete(workspace, phases) and start_counts(workspace) == dict.fromkeys(
        tasks, 1
    )
    assert in_order(workspace, phases)


def of_demo(cluster: Cluster, folder: Path) -> Scenario:
    """The demo's recipe in one process, and on SLURM with the driver killed on its way."""
    recipe = [
        "tools/prepare_data.py",
        "configs/demo/data_stage2.yaml",
        f"tokenizer.model={folder / 't.model'}",
        "executor.task_bytes=1000000",
    ]
    alone = Driver(cluster, folder, [*recipe, f"output={folder / 'alone'}", "executor.workers=1"])
    yield lambda: alone.over
    assert alone.code == 0, alone.said
    both = [*recipe, f"output={folder / 'both'}", "executor.kind=slurm", "executor.partition=main"]
    both += ["executor.memory_gb=1", "executor.workers=4"]
    first = Driver(cluster, folder, both)
    yield lambda: list((folder / "both.work").glob("*/runs/*/record.json"))
    first.kill()
    again = Driver(cluster, folder, both)
    yield lambda: again.over
    return folder, again.code, again.said


@pytest.mark.slow
@judges("demo")
def test_the_demo_recipe_on_two_nodes_gives_the_bytes_of_one_process(outcome: Any) -> None:
    """The real preparation, on SLURM by one key of the recipe, killed once on its way: the same
    sha256 of every file.
    """
    folder, code, said = outcome
    assert code == 0, said
    assert "submitted earlier" in said
    hashes = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / name).iterdir()
        }
        for name in ("alone", "both")
    ]
    assert len(hashes[0]) > 10 and hashes[0] == hashes[1]


SCENARIOS: dict[str, Callable[[Cluster, Path], Scenario]] = {
    "both nodes": of_two_nodes,
    "killed driver": of_killed_driver,
    "failing task": of_failing_task,
    "failure without a driver": of_failure_without_driver,
    "vanished job": of_vanished_job,
    "Ctrl-C": of_ctrl_c,
    "large array": of_large_array,
    "demo": of_demo,
    **{name: partial(of_refused, name) for name in REFUSED},
}
