"""A preparation's phases on a real SLURM of two nodes: would catch jobs that the cluster refuses or that do not find
their Python, a driver that submits twice, a failed task that leaves its successors queued, and a job that vanishes
unnoticed."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train.data.prepare.workspace import Workspace
from tests.support.command_line import hear_signals, soon
from tests.support.preparation import (
    all_files_complete,
    finished,
    in_order,
    start_counts,
    toy_phases,
    toy_workspace,
)
from tests.support.slurm import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
FIRST, LAST = 4, 2
PHASES = toy_phases(FIRST, LAST)
ALL = {f"{phase.name}_{number}" for phase in PHASES for number in range(phase.tasks)}
CHOICES = (
    'kind="slurm"',
    'partition="main"',
    "memory_gb=1",
    'time="00:10:00"',
    "workers=4",
    f"first={FIRST}",
    f"last={LAST}",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    lacking = why_not()
    if lacking:
        assert os.environ.get("K2TRAIN_REQUIRE_SLURM") != "1", lacking
        pytest.skip(lacking)
    with Cluster(["n1", "n2"]) as made:
        yield made


def driver(cluster: Cluster, workspace: Workspace, *choices: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tests/support/preparation.py"),
            str(workspace.folder),
            *CHOICES,
            *choices,
        ],
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )


def run(cluster: Cluster, workspace: Workspace, *choices: str) -> tuple[int, str]:
    process = driver(cluster, workspace, *choices)
    _, said = process.communicate(timeout=180)
    return process.returncode, said


def queue(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%F %j %T").splitlines()


def job_names(cluster: Cluster) -> list[str]:
    """Names of all jobs since the cluster's start, one for each submission."""
    records = cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    facts = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in records]
    return sorted(
        {
            f"{fact['JobName']} {fact.get('ArrayJobId', fact['JobId'])}"
            for fact in facts
            if "JobId" in fact
        }
    )


def test_both_nodes_do_the_tasks_once(cluster: Cluster, tmp_path: Path) -> None:
    """Catches jobs that are refused, do not find their Python, or run before the phase they need is complete."""
    workspace = toy_workspace(tmp_path, seconds=1.0)
    code, said = run(cluster, workspace)
    assert code == 0, said + cluster.logs()
    assert all_files_complete(workspace, PHASES) and start_counts(workspace) == dict.fromkeys(
        ALL, 1
    )
    assert in_order(workspace, PHASES)
    nodes = {path.read_text().split()[0] for path in (workspace.folder / "begun").iterdir()}
    assert nodes == {"n1", "n2"}
    assert re.search(r"^one: SLURM job \d+, its output in .*/logs/one/slurm$", said, re.MULTILINE)
    assert said.splitlines()[-1].startswith("three: 2 tasks in ")
    before = job_names(cluster)
    assert run(cluster, workspace)[0] == 0
    assert job_names(cluster) == before


def test_a_killed_driver_finds_its_jobs_again(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a second submission of jobs that wait or run, and a job that ends with the driver."""
    workspace = toy_workspace(tmp_path, seconds=3.0)
    before = set(job_names(cluster))
    process = driver(cluster, workspace)
    assert soon(lambda: len(start_counts(workspace)) >= 2)
    process.kill()
    process.communicate()
    submitted = set(job_names(cluster)) - before
    assert len(submitted) == 3
    for note in (workspace.folder / "logs").glob("*.jobs"):
        note.unlink()
    code, said = run(cluster, workspace)
    assert code == 0, said
    assert said.count("submitted earlier") == 3
    assert set(job_names(cluster)) - before == submitted
    assert all_files_complete(workspace, PHASES) and set(start_counts(workspace).values()) == set(
        finished(workspace).values()
    ) == {1}


def test_a_failing_task_is_its_line_and_the_rest_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Catches a failure that is told as an exit code, and phases that stay queued behind it."""
    workspace = toy_workspace(tmp_path, seconds=2.0, fail={"one/3": "web.jsonl: gone; put it back"})
    code, said = run(cluster, workspace)
    assert code == 2, said
    assert said.splitlines()[-1] == "web.jsonl: gone; put it back"
    assert queue(cluster) == [] and "two_0" not in start_counts(workspace)
    toy_workspace(tmp_path)
    code, said = run(cluster, workspace)
    assert code == 0, said
    assert all_files_complete(workspace, PHASES) and max(finished(workspace).values()) == 1


def test_a_failure_without_a_driver_ends_the_phases_behind_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Catches phases that wait for ever for one that failed, and a start that takes them for its own."""
    workspace = toy_workspace(tmp_path, seconds=1.0, fail={"one/0": "gone"})
    process = driver(cluster, workspace)
    assert soon(lambda: "two:" in (process.stderr.readline() if process.stderr else ""))
    process.kill()
    process.communicate()
    assert soon(lambda: queue(cluster) == []), queue(cluster)
    toy_workspace(tmp_path)
    code, said = run(cluster, workspace)
    assert code == 0, said
    assert all_files_complete(workspace, PHASES)


def test_a_vanished_job_is_told_with_its_state(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a driver that waits for ever for a job that somebody cancelled."""
    workspace = toy_workspace(tmp_path, seconds=60.0)
    process = driver(cluster, workspace)
    assert soon(lambda: start_counts(workspace))
    job = (workspace.folder / "logs" / "one.jobs").read_text().split()[0]
    cluster.run("scancel", job)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    line = said.splitlines()[-1]
    assert re.match(
        rf"one: SLURM job {job}\S* ended as CANCELLED .*with 4 of 4 tasks unfinished; see .*\.out; start",
        line,
    )


def test_ctrl_c_leaves_the_jobs_and_says_how_to_end_them(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a Ctrl-C that throws away hours of queueing, or leaves jobs that nobody knows of."""
    workspace = toy_workspace(tmp_path, seconds=30.0)
    process = driver(cluster, workspace)
    assert soon(lambda: start_counts(workspace))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    found = re.search(
        r"the same command to wait for them again, or end them with `(scancel [\d ]+)`", said
    )
    assert found, said
    assert len(queue(cluster)) >= 3
    cluster.run(*found[1].split())
    assert soon(lambda: queue(cluster) == [])


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ('partition="nowhere"', "Invalid partition name"),
        ('arguments={"nodelist": "n9"}', "Invalid node name"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    cluster: Cluster, tmp_path: Path, choice: str, complaint: str
) -> None:
    """Catches a traceback of the submission in place of what sbatch said."""
    code, said = run(cluster, toy_workspace(tmp_path), choice)
    assert code == 2, said
    assert (
        complaint in said and "SLURM refused the job of one" in said and len(said.splitlines()) == 1
    )


def test_an_array_larger_than_the_cluster_allows_is_cut(tmp_path: Path) -> None:
    """Catches a phase whose later arrays are not waited for, and a cluster's limit that is not asked for."""
    lacking = why_not()
    if lacking:
        pytest.skip(lacking)
    workspace = toy_workspace(tmp_path, seconds=1.0)
    with Cluster(["n1", "n2"], settings="MaxArraySize=3") as small:
        code, said = run(small, workspace, 'arguments={"qos": "normal"}')
        assert code == 0, said + small.logs()
        assert len((workspace.folder / "logs" / "one.jobs").read_text().split()) == 2
    assert all_files_complete(workspace, PHASES) and start_counts(workspace) == dict.fromkeys(
        ALL, 1
    )
    assert in_order(workspace, PHASES)


def test_the_demo_recipe_on_two_nodes_gives_the_bytes_of_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The real preparation, on SLURM by one key of the recipe, killed once on its way: the same sha256 of every file."""
    recipe = [
        "configs/demo/data_stage2.yaml",
        f"tokenizer.model={tmp_path / 't.model'}",
        "executor.task_bytes=1000000",
    ]
    command = [sys.executable, "tools/prepare_data.py", *recipe]
    alone = subprocess.run(
        [*command, f"output={tmp_path / 'alone'}", "executor.workers=1"], cwd=ROOT, check=False
    )
    assert alone.returncode == 0
    both = [
        *command,
        f"output={tmp_path / 'both'}",
        "executor.kind=slurm",
        "executor.partition=main",
    ]
    both += ["executor.memory_gb=1", "executor.workers=4"]
    process = subprocess.Popen(
        both, cwd=ROOT, env=cluster.environment, stderr=subprocess.PIPE, text=True
    )
    assert soon(lambda: list((tmp_path / "both.work").glob("*/runs/*/record.json"))), cluster.logs()
    process.kill()
    process.communicate()
    done = subprocess.run(
        both,
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + cluster.logs()
    assert "submitted earlier" in done.stderr
    hashes = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).iterdir()
        }
        for name in ("alone", "both")
    ]
    assert len(hashes[0]) > 10 and hashes[0] == hashes[1]
