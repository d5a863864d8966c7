"""scripts/pretrain.sbatch on a real SLURM of two nodes: would catch a job that dies of the signal that should save it, that is
not requeued, that trains on with fewer nodes, or that does not end at the bits of a run which nobody disturbed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import load_tool, soon
from corpus import ROOT, config_tree, make_corpus, write_yaml
from slurm import Cluster, content, why_not

pytestmark = pytest.mark.slow
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
            folder / "data" / "manifest.json", folder / "runs", name, checkpoint__every_chunks=4, **changes
        )
        self.config = write_yaml(folder / f"{name}.yaml", tree)

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a job of both nodes."""
        given = {"K2TRAIN_PYTHON": str(ROOT / ".venv/bin/python"), "OMP_NUM_THREADS": "1", "K2TRAIN_BACKOFF": "1"}
        given |= {"K2TRAIN_PROCESSES_PER_NODE": "1"} | variables
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.output}", *options, "scripts/pretrain.sbatch"]
        return self.cluster.run(*command, str(self.config), *overrides, at=ROOT, variables=given).strip()

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
        found = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if mark in content(path)]
        return [int(entry.name) for entry in found if b"k2train.launch" not in content(entry / "cmdline")]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("slurm_train")
    make_corpus(folder / "data", chunks=CHUNKS)
    run = Run(cluster, folder, "alone")
    job = run.ended(run.submit())
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.told()
    started = run.events()[0]
    assert (started["event"], started["world_size"]) == ("started", 2)
    assert run.steps() == STEPS
    return run


def same_end(run: Run, alone: Run) -> None:
    """Every step, loss and final weight as in the run that was left alone."""
    found = load_tool("compare_runs").differences(alone.directory, run.directory, strict=True)
    assert found == [], run.told()


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


def test_mistakes_are_told_at_once_and_not_tried_again(cluster: Cluster, alone: Run) -> None:
    """Catches a start that waits for ever for a node that has no address, and a wrong config that is tried again."""
    lines = []
    for name, variables, overrides in (
        ("homeless", {"K2TRAIN_HEAD": "no-such-host.invalid"}, ()),
        ("mistaken", {}, ("modle.num_heads=3",)),
    ):
        run = Run(cluster, alone.folder, name)
        began = time.monotonic()
        job = run.submit(overrides=overrides, **variables)
        facts = run.ended(job)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), run.told()
        assert name != "homeless" or time.monotonic() - began < 30
        lines.append(run.output.read_text())
        assert "crash 1;" not in lines[-1]
    assert "no-such-host.invalid, does not resolve" in lines[0]
    assert lines[1].count("unknown key") == 1
