"""scripts/pretrain.sbatch on a real SLURM of two nodes: would catch a job that dies of the signal that should save it, that is
not requeued, that trains on with fewer nodes, or that does not end at the bits of a run which nobody disturbed; and, without a
SLURM, one that is started again for ever."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k2train.record.system_info import slurm_job_ended
from tests.support.command_line import load_tool, soon
from tests.support.slurm import Cluster, content, why_not
from tests.support.tiny_corpus import ROOT, config_tree, make_corpus, write_yaml

CHUNKS = 16
STEPS = 5 * CHUNKS
# A node that says nothing for 5 s is lost; a cancelled job has 20 s to save.
SETTINGS = "SlurmdTimeout=5\nKillWait=20\nSlurmctldTimeout=10"
PATIENCE = 150
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    lacking = why_not()
    if lacking:
        assert os.environ.get("K2TRAIN_REQUIRE_SLURM") != "1", lacking
        pytest.skip(lacking)
    with Cluster(["n1", "n2"], settings=SETTINGS, requeue_seconds=10) as made:
        yield made


class Run:
    """One run of the tiny corpus, by jobs on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, **changes: Any) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        self.directory = folder / "runs" / name
        tree = config_tree(
            folder / "data" / "manifest.json",
            folder / "runs",
            name,
            checkpoint__every_chunks=4,
            **changes,
        )
        self.config = write_yaml(folder / f"{name}.yaml", tree)

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a job of both nodes."""
        given = {
            "K2TRAIN_PYTHON": str(ROOT / ".venv/bin/python"),
            "OMP_NUM_THREADS": "1",
            "K2TRAIN_BACKOFF": "1",
        }
        given |= {"K2TRAIN_PROCESSES_PER_NODE": "1"} | variables
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            f"--output={self.output}",
            *options,
            "scripts/pretrain.sbatch",
        ]
        return self.cluster.run(
            *command, str(self.config), *overrides, at=ROOT, variables=given
        ).strip()

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.out"

    def job(self, job: str) -> dict[str, str]:
        """The facts of a job as SLURM tells them."""
        told = self.cluster.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def told(self) -> str:
        """All that went wrong, for a message."""
        output = self.output.read_text() if self.output.exists() else "no output"
        return f"{output}\n{self.cluster.run('scontrol', 'show', 'job', check=False)}\n{self.cluster.logs()}"

    def until(self, condition: Callable[[], object]) -> None:
        assert soon(condition, PATIENCE, 0.1), self.told()

    def steps(self) -> int:
        """The last step that is in the metrics."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0

    def ended(self, job: str) -> dict[str, str]:
        self.until(lambda: self.job(job)["JobState"] in ENDED)
        return self.job(job)

    def workers(self) -> list[int]:
        """The training processes of this run, in no order."""
        mark = f"k2train.train\0{self.config}".encode()
        found = [
            path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if mark in content(path)
        ]
        return [
            int(entry.name)
            for entry in found
            if b"k2train.launch" not in content(entry / "cmdline")
        ]

    def events(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.directory / "ledger.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("slurm_train")
    make_corpus(folder / "data", chunks=CHUNKS)
    run = Run(cluster, folder, "alone")
    job = run.ended(run.submit())
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.told()
    (started,) = [event for event in run.events() if event["event"] == "started"]
    assert started["world_size"] == 2
    assert run.steps() == STEPS
    return run


def same_end(run: Run, alone: Run) -> None:
    """Every step, loss and final weight as in the run that was left alone."""
    found = load_tool("compare_runs").differences(alone.directory, run.directory, strict=True)
    assert found == [], run.told()


@pytest.mark.slow
def test_a_time_limit_saves_requeues_and_goes_on(cluster: Cluster, alone: Run) -> None:
    run = Run(cluster, alone.folder, "limited")
    job = run.submit()
    run.until(lambda: run.steps() >= 10)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    facts = run.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), run.told()
    stopped = [event for event in run.events() if event["event"] == "stopped"]
    assert [event["reason"] for event in stopped] == ["SIGUSR1"], run.told()
    same_end(run, alone)


@pytest.mark.slow
def test_a_cancelled_job_has_saved_and_the_next_one_goes_on(cluster: Cluster, alone: Run) -> None:
    """Catches a SIGTERM of the whole job that the launcher dies of, and a cancelled job that comes back by itself."""
    run = Run(cluster, alone.folder, "cancelled")
    job = run.submit()
    run.until(lambda: run.steps() >= 10)
    cluster.run("scancel", job)
    assert run.ended(job)["JobState"] == "CANCELLED"
    run.until(lambda: run.events()[-1]["event"] == "stopped")
    saved = run.events()[-1]["step"]
    assert 10 <= saved == run.steps() < STEPS
    again = run.submit()
    assert run.ended(again)["JobState"] == "COMPLETED", run.told()
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [saved]
    assert run.job(job)["Restarts"] == "0"
    same_end(run, alone)


@pytest.mark.slow
def test_a_lost_node_requeues_the_job(cluster: Cluster, alone: Run) -> None:
    """Catches a job that hangs on one node when the other is gone, or ends there for good."""
    run = Run(cluster, alone.folder, "lost")
    job = run.submit()
    run.until(lambda: run.steps() >= 25)
    cluster.lose("n2")
    try:
        run.until(lambda: run.job(job)["JobState"] != "RUNNING")
    finally:
        cluster.bring_back("n2")
    facts = run.ended(job)
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, run.told()
    # Once or more: SLURM may be slower to miss the node than the script is to start again.
    assert "resumed" in [event["event"] for event in run.events()], run.told()
    same_end(run, alone)


@pytest.mark.slow
def test_a_crash_is_started_again_in_place(cluster: Cluster, alone: Run) -> None:
    """Catches a process that dies and takes the job with it, or leaves the other node's processes behind."""
    run = Run(cluster, alone.folder, "crashed")
    job = run.submit()
    run.until(lambda: run.steps() >= 25)
    os.kill(run.workers()[-1], signal.SIGKILL)
    facts = run.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), run.told()
    assert "crash 1; start again in 1 s" in run.output.read_text()
    same_end(run, alone)


@pytest.mark.slow
def test_mistakes_are_told_at_once_and_not_tried_again(cluster: Cluster, alone: Run) -> None:
    """Catches a start that waits for ever for a node that has no address, and a wrong config that is tried again."""
    lines = []
    for name, variables, overrides in (
        ("homeless", {"K2TRAIN_HEAD": "no-such-host.invalid"}, ()),
        ("mistaken", {}, ("modle.num_heads=3",)),
    ):
        run = Run(cluster, alone.folder, name)
        job = run.submit(overrides=overrides, **variables)
        facts = run.ended(job)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == (
            "FAILED",
            "2:0",
            "0",
        ), run.told()
        lines.append(run.output.read_text())
        assert "crash 1;" not in lines[-1]
    assert "no-such-host.invalid, does not resolve" in lines[0]
    assert lines[1].count("unknown key") == 1


@pytest.mark.slow
def test_slurm_tells_whether_a_job_has_ended(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states and the message that `slurm_job_ended` goes by are those of the real squeue."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    held = cluster.run(
        "sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"
    ).strip()
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 300").strip()
    assert soon(
        lambda: "JobState=RUNNING" in cluster.run("scontrol", "show", "job", job), PATIENCE, 0.1
    )
    assert [slurm_job_ended(one) for one in (held, job)] == [False, False]
    cluster.run("scontrol", "suspend", job)
    assert slurm_job_ended(job) is False
    cluster.run("scancel", held, job)
    assert soon(lambda: slurm_job_ended(held) and slurm_job_ended(job), PATIENCE, 0.1)
    assert slurm_job_ended("999999") is True


# A start lasts as long as the test says: the script's clock is moved when it looks whether the step still runs.
CLOCK = 'kill() { SECONDS=$((began + LASTS)); builtin kill "$@"; }'


@pytest.mark.parametrize(("lasts", "starts"), [(5, 6), (3600, 6), (7 * 3600, 51)])
def test_starts_that_crash_come_to_an_end(tmp_path: Path, lasts: int, starts: int) -> None:
    """Also where each hangs for an hour before; a run that gets far each time is started again more often."""
    (tmp_path / "clock").write_text(CLOCK)
    for name, body in {
        "srun": "exit 1",
        "scontrol": 'if [ "$2" = hostnames ]; then echo n1; else echo "NodeName=n1 NodeAddr=127.0.0.1 State=UP"; fi',
        "scancel": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BASH_ENV": str(tmp_path / "clock"),
        "LASTS": str(lasts),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "K2TRAIN_PYTHON": sys.executable,
        "K2TRAIN_PROCESSES_PER_NODE": "1",
        "K2TRAIN_HEAD": "127.0.0.1",
        "K2TRAIN_BACKOFF": "0",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/pretrain.sbatch"), "pyproject.toml"],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert len(re.findall(rf"ended with exit code 1 after {lasts} s", done.stderr)) == starts, (
        done.stderr[-2000:]
    )
    assert done.stderr.count("submit again") == 1
