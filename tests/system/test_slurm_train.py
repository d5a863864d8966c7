"""scripts/pretrain.sbatch on a real SLURM of two nodes: would catch a job that dies of the signal
that should save it, that is not requeued, that trains on with fewer nodes, or that does not end at
the bits of a run which nobody disturbed; and, without a SLURM, one that is started again for ever.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2train.record.event import Event
from k2train.record.events import E, Resumed, Started, Stopped, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.system_info import slurm_job_ended
from tests.support.command_line import HANG_SECONDS, load_tool
from tests.support.scenarios import Scenario, judged, judges
from tests.support.slurm import Cluster, content
from tests.support.tiny_corpus import ROOT, config_tree, make_corpus, write_yaml

CHUNKS = 16
STEPS = 5 * CHUNKS
UNHURRIED = ";".join(f"step.done@step={step}:sleep=0.2" for step in range(10, STEPS))
"""Steps that are slow enough to be disturbed where the tests would have it, however busy the
machine is.
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Run:
    """One run of the tiny corpus, by jobs on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, **changes: Any) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        self.directory = folder / "runs" / name
        make_corpus(folder / "data", chunks=CHUNKS)
        tree = config_tree(
            folder / "data" / "manifest.json",
            folder / "runs",
            name,
            checkpoint__every_chunks=4,
            run__allow=["faults"],
            **changes,
        )
        self.config = write_yaml(folder / f"{name}.yaml", tree)

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a job of both nodes."""
        given = {
            "K2TRAIN_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "K2TRAIN_BACKOFF": "1",
        }
        given |= {"K2TRAIN_PROCESSES_PER_NODE": "1"} | variables
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--partition=train",
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
        return self.cluster.jobs()[job]

    def told(self) -> str:
        """All that went wrong, for a message."""
        output = self.output.read_text() if self.output.exists() else "no output"
        jobs = self.cluster.run("scontrol", "show", "job", check=False)
        return f"{output}\n{jobs}\n{self.cluster.logs()}"

    def steps(self) -> int:
        """The last step that is in the metrics."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0

    def over(self, job: str) -> Callable[[], bool]:
        """A condition: the job has ended."""
        return lambda: self.job(job)["JobState"] in ENDED

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

    def events(self, kind: type[E]) -> list[E]:
        return of_kind(read_ledger(self.directory / "ledger.jsonl"), kind)


def of_alone(cluster: Cluster, folder: Path) -> Scenario:
    """A run that nobody disturbs."""
    run = Run(cluster, folder, "alone")
    job = run.submit()
    yield run.over(job)
    return run, run.job(job)


def checked(outcomes: dict[str, Any]) -> Run:
    """The run that nobody disturbed, when it is what it should be."""
    run, job = judged(outcomes["alone"])
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.told()
    (started,) = run.events(Started)
    assert started.world_size == 2
    assert run.steps() == STEPS
    return run


def same_end(run: Run, outcomes: dict[str, Any]) -> None:
    """Every step, loss and final weight as in the run that was left alone."""
    alone = checked(outcomes)
    found = load_tool("compare_runs").differences(alone.directory, run.directory, strict=True)
    assert found == [], run.told()


def of_time_limit(cluster: Cluster, folder: Path) -> Scenario:
    run = Run(cluster, folder, "limited")
    job = run.submit(K2TRAIN_FAULTS=UNHURRIED)
    yield lambda: run.steps() >= 10
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    yield run.over(job)
    return run, run.job(job)


@pytest.mark.slow
@judges("time limit")
def test_a_time_limit_saves_requeues_and_goes_on(outcome: Any, outcomes: dict[str, Any]) -> None:
    run, facts = outcome
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), run.told()
    assert [event.reason for event in run.events(Stopped)] == ["SIGUSR1"], run.told()
    same_end(run, outcomes)


def of_cancelled(cluster: Cluster, folder: Path) -> Scenario:
    run = Run(cluster, folder, "cancelled")
    job = run.submit(K2TRAIN_FAULTS=UNHURRIED)
    yield lambda: run.steps() >= 10
    cluster.run("scancel", job)
    yield run.over(job)
    state = run.job(job)["JobState"]
    yield lambda: isinstance(run.events(Event)[-1], Stopped)
    saved = run.events(Stopped)[-1].step, run.steps()
    again = run.submit()
    yield run.over(again)
    return run, state, saved, run.job(again)["JobState"], run.job(job)["Restarts"]


@pytest.mark.slow
@judges("cancelled")
def test_a_cancelled_job_has_saved_and_the_next_one_goes_on(
    outcome: Any, outcomes: dict[str, Any]
) -> None:
    """Catches a SIGTERM of the whole job that the launcher dies of, and a cancelled job that comes
    back by itself.
    """
    run, state, (saved, last), again, restarts = outcome
    assert state == "CANCELLED", run.told()
    assert 10 <= saved == last < STEPS
    assert again == "COMPLETED", run.told()
    assert [event.step for event in run.events(Resumed)] == [saved]
    assert restarts == "0"
    same_end(run, outcomes)


def of_lost_node(cluster: Cluster, folder: Path) -> Scenario:
    run = Run(cluster, folder, "lost")
    job = run.submit(K2TRAIN_FAULTS=UNHURRIED)
    yield lambda: run.steps() >= 25
    *_, last = cluster.run("scontrol", "show", "hostnames", run.job(job)["NodeList"]).split()
    cluster.lose(last)
    yield lambda: run.job(job)["JobState"] != "RUNNING"
    cluster.bring_back(last)
    yield run.over(job)
    return run, run.job(job)


@pytest.mark.slow
@judges("lost node")
def test_a_lost_node_requeues_the_job(outcome: Any, outcomes: dict[str, Any]) -> None:
    """Catches a job that hangs on one node when the other is gone, or ends there for good."""
    run, facts = outcome
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, run.told()
    # Once or more: SLURM may be slower to miss the node than the script is to start again.
    assert run.events(Resumed), run.told()
    same_end(run, outcomes)


def of_crash(cluster: Cluster, folder: Path) -> Scenario:
    run = Run(cluster, folder, "crashed")
    job = run.submit(K2TRAIN_FAULTS=UNHURRIED)
    yield lambda: run.steps() >= 25
    os.kill(run.workers()[-1], signal.SIGKILL)
    yield run.over(job)
    return run, run.job(job)


@judges("crash")
def test_a_crash_is_started_again_in_place(outcome: Any, outcomes: dict[str, Any]) -> None:
    """Catches a process that dies and takes the job with it, or leaves the other node's processes
    behind.
    """
    run, facts = outcome
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), run.told()
    assert "crash 1; start again in 1 s" in run.output.read_text()
    same_end(run, outcomes)


MISTAKES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "no such head": ({"K2TRAIN_HEAD": "no-such-host.invalid"}, ()),
    "no such key": ({}, ("modle.num_heads=3",)),
}


def of_mistake(name: str, cluster: Cluster, folder: Path) -> Scenario:
    variables, overrides = MISTAKES[name]
    run = Run(cluster, folder, "mistaken")
    job = run.submit(overrides=overrides, **variables)
    yield run.over(job)
    return run, run.job(job)


@pytest.mark.slow
@judges(*MISTAKES)
def test_mistakes_are_told_at_once_and_not_tried_again(
    outcome: Any, request: pytest.FixtureRequest
) -> None:
    """Catches a start that waits for ever for a node that has no address, and a wrong config that
    is tried again.
    """
    run, facts = outcome
    end = (facts["JobState"], facts["ExitCode"], facts["Restarts"])
    assert end == ("FAILED", "2:0", "0"), run.told()
    text = run.output.read_text()
    if request.node.callspec.params["outcome"] == "no such head":
        # Refused by the job itself, before any step is started.
        assert "no-such-host.invalid, does not resolve" in text
        assert "crash 1;" not in text
        assert "ended with exit code" not in text
    else:
        # Rank 0 reports it once. A node too slow to be ended by then adds its own, with its rank.
        assert text.count("k2train: override") == 1, text
        # What came before it is SLURM's own: a busy machine may fail to launch a step.
        assert "start again" not in text.partition("k2train: override")[2], text
        assert text.count("unknown key") == 1 + text.count("k2train: rank 1: override") <= 2


def of_asked(cluster: Cluster, folder: Path) -> Scenario:
    """What `slurm_job_ended` answers of a held, a running, a suspended, a cancelled and an unknown
    job.
    """

    def asked(job: str) -> bool | None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            # On a busy machine squeue takes its time; no answer in time would be None.
            patch.setattr("k2train.record.system_info.SQUEUE_SECONDS", HANG_SECONDS)
            return slurm_job_ended(job)

    options = ("sbatch", "--parsable", "--partition=main", "--output=/dev/null")
    held = cluster.run(*options, "--hold", "--wrap", "true").strip()
    job = cluster.run(*options, "--wrap", "sleep 3600").strip()
    yield lambda: "JobState=RUNNING" in cluster.run("scontrol", "show", "job", job)
    answers = [asked(held), asked(job)]
    cluster.run("scontrol", "suspend", job)
    answers.append(asked(job))
    cluster.run("scancel", held, job)
    yield lambda: asked(held) and asked(job)
    return [*answers, asked("999999")]


@pytest.mark.slow
@judges("asked")
def test_slurm_tells_whether_a_job_has_ended(outcome: Any) -> None:
    """The states and the message that `slurm_job_ended` goes by are those of the real squeue."""
    assert outcome == [False, False, False, True]


@pytest.mark.slow
def test_a_start_that_srun_repeats_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """By the variables of the real SLURM: in tasks of a step, in a shell of salloc, in a batch."""
    config = str(ROOT / "configs" / "demo" / "stage1.yaml")
    command = f"{sys.executable} -m k2train.train {config} --explain >/dev/null 2>&1; echo $?"
    variables = {"PYTHONPATH": str(ROOT)}
    given = ("--partition=main", "--ntasks=2")
    for start, expected in (("srun", "2 2"), ("salloc", "0")):
        said = cluster.run(start, *given, "bash", "-c", command, at=ROOT, variables=variables)
        assert " ".join(said.split()) == expected, (start, said)
    output = tmp_path / "batch.out"
    batch = ("sbatch", "--wait", *given, f"--output={output}", "--wrap", command)
    cluster.run(*batch, at=ROOT, variables=variables)
    assert output.read_text().split() == ["0"]


SCENARIOS: dict[str, Callable[[Cluster, Path], Scenario]] = {
    "alone": of_alone,
    "time limit": of_time_limit,
    "cancelled": of_cancelled,
    "lost node": of_lost_node,
    "crash": of_crash,
    **{name: partial(of_mistake, name) for name in MISTAKES},
    "asked": of_asked,
}
NEEDED = ("alone",)


# A start lasts as long as the test says: the script's clock is moved when it looks whether the step
# still runs.
CLOCK = 'kill() { SECONDS=$((began + LASTS)); builtin kill "$@"; }'


def job_script(folder: Path, srun: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The job's script on one node, with commands of SLURM that are shell scripts."""
    (folder / "clock").write_text(CLOCK)
    for name, body in {
        "srun": srun,
        "scontrol": (
            'if [ "$2" = hostnames ]; then echo n1; '
            'else echo "NodeName=n1 NodeAddr=127.0.0.1 State=UP"; fi'
        ),
        "scancel": "exit 0",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    given = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "BASH_ENV": str(folder / "clock"),
        "LASTS": "5",
        "MEETINGS": str(folder / "meetings"),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "K2TRAIN_PYTHON": sys.executable,
        "K2TRAIN_PROCESSES_PER_NODE": "1",
        "K2TRAIN_HEAD": "127.0.0.1",
        "K2TRAIN_BACKOFF": "0",
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts/pretrain.sbatch"), "pyproject.toml"],
        env={**os.environ, **given, **variables},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(("lasts", "starts"), [(5, 6), (1790, 6), (3600, 51)])
def test_starts_that_crash_come_to_an_end(tmp_path: Path, lasts: int, starts: int) -> None:
    """Also where each takes half an hour to crash; a run that gets far each time is started again
    more often. Each meets at a port that nobody can guess.
    """
    done = job_script(tmp_path, 'echo "$K2TRAIN_MEET" >> "$MEETINGS"; exit 1', LASTS=str(lasts))
    assert done.returncode == 1, done.stderr
    assert len(re.findall(rf"ended with exit code 1 after {lasts} s", done.stderr)) == starts, (
        done.stderr[-2000:]
    )
    assert done.stderr.count("submit again") == 1

    met = (tmp_path / "meetings").read_text().split()
    ports = [int(place.removeprefix("127.0.0.1:")) for place in met]
    # Two starts in a row have the same port once in 15,000 times; all of them never.
    assert len(ports) == starts and len(set(ports)) > starts // 2
    assert all(15000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("said", "code", "end"),
    [
        (["task 0: Exited with exit code 2", "tasks 1-3: Terminated"], 143, 2),
        (["task 1: Exited with exit code 2", "task 0: Exited with exit code 75"], 75, 2),
        (["task 0: Killed", "task 1: Exited with exit code 2"], 137, 1),
        (["task 0: Exited with exit code 1", "task 1: Exited with exit code 2"], 137, 1),
        (["Exited with exit code 2"], 1, 1),
    ],
)
def test_the_node_that_ended_first_decides(
    tmp_path: Path, said: list[str], code: int, end: int
) -> None:
    """Catches a mistake that is tried again since another node was ended by a signal, and a crash
    that is not.
    """
    lines = "\n".join(f"echo 'srun: error: t13: {line}' >&2" for line in said)
    done = job_script(tmp_path, f"{lines}\nexit {code}", K2TRAIN_RESTARTS="0")
    assert done.returncode == end, done.stderr
    assert all(f"srun: error: t13: {line}\n" in done.stderr for line in said)
    assert ("crashes in a row" in done.stderr) == (end == 1)


@pytest.mark.parametrize(
    ("python", "words"),
    (("exit 1", "/python3 has no k2train; K2TRAIN_PYTHON="), ("exit 0", "no GPUs on ")),
)
def test_without_a_clone_the_active_python_is_taken(
    tmp_path: Path, python: str, words: str
) -> None:
    """Catches a script that works in a clone only, and a traceback where k2train is missing."""
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    for name, body in {"python3": python, "nvidia-smi": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/pretrain.sbatch"), "c.yaml"],
        env=given,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
