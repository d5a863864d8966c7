"""Executors on toy tasks: restarts, kills, failures, locks and terminal output.

Catches a finished task done again, a half-done one taken for complete, two drivers of one
preparation, workers that outlive their driver, a pool that waits for a killed worker, and log lines
on the terminal.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from k2train.data.prepare import progress
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run import executor, local, tasks
from k2train.data.prepare.run.executor import exclusive, run_phases
from k2train.data.prepare.run.tasks import completed, is_done, reconcile
from k2train.data.prepare.workspace import Workspace
from k2train.errors import ConfigError, DataError
from tests.support import preparation
from tests.support.command_line import HANG_SECONDS, hear_signals, soon
from tests.support.preparation import (
    all_files_complete,
    in_order,
    start_counts,
    toy_phases,
    toy_workspace,
)

ROOT = Path(__file__).resolve().parents[3]
PHASES = toy_phases()
ALL = {f"{phase.name}_{number}" for phase in PHASES for number in range(phase.tasks)}


@pytest.fixture(autouse=True)
def workers_find_the_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(workspace: Workspace, workers: int = 2) -> None:
    run_phases(workspace, ExecutorRecipe(workers=workers), Progress(None), PHASES)


def driver(workspace: Workspace, *choices: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tests/support/preparation.py"),
            str(workspace.folder),
            *choices,
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )


def workers_of(workspace: Workspace) -> set[int]:
    """Processes whose stderr is this work folder's log."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "fd" / "2") == str(workspace.folder / "logs" / "local.log"):
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def begun_and_done(workspace: Workspace) -> dict[str, int]:
    """How often each task with a record was started.

    A kill may fall after the record and before anything else.
    """
    done = {
        f"{p.name}_{number}"
        for p in PHASES
        for number in range(p.tasks)
        if is_done(workspace, p, number)
    }
    return {name: times for name, times in start_counts(workspace).items() if name in done}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once_and_nothing_is_done_again(tmp_path: Path, workers: int) -> None:
    """Catches a task left out, done twice, or done again by a second start; and processes left
    behind.
    """
    workspace = toy_workspace(tmp_path)
    run(workspace, workers)
    assert start_counts(workspace) == dict.fromkeys(ALL, 1) and all_files_complete(
        workspace, PHASES
    )
    assert in_order(workspace, PHASES)
    run(workspace, workers)
    assert start_counts(workspace) == dict.fromkeys(ALL, 1)
    assert workers_of(workspace) == set()


def test_the_terminal_shows_our_lines_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches workers' log lines on the user's terminal, and a wrong count of tasks."""
    workspace = toy_workspace(tmp_path)
    # On a busy machine a phase takes longer than a log is left without a line.
    monkeypatch.setattr(progress, "QUIET_SECONDS", 600.0)
    run_phases(workspace, ExecutorRecipe(workers=2), Progress(sys.stderr), PHASES)
    output = capfd.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == [
        "one: 6 tasks",
        "two: 1 task",
        "three: 4 tasks",
    ]
    assert (
        "Processing done"
        in (workspace.folder / "logs" / "one" / "logs" / "task_00003.log").read_text()
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_in_a_task_is_its_line(tmp_path: Path, workers: int) -> None:
    """Catches a line inside a traceback, and a failed task that is marked as complete."""
    line = "web/a.jsonl: 31 of 100 documents are broken; raise max_rejected_share"
    workspace = toy_workspace(tmp_path, fail={"one/1": line})
    with pytest.raises(DataError) as refused:
        run(workspace, workers)
    assert str(refused.value) == line
    assert "two_0" not in start_counts(workspace) and workers_of(workspace) == set()
    toy_workspace(tmp_path)
    before = begun_and_done(workspace)
    run(workspace, workers)
    after = begun_and_done(workspace)
    assert (
        all_files_complete(workspace, PHASES)
        and set(after) == ALL
        and before.items() <= after.items()
    )


def test_of_many_mistakes_the_first_task_s_is_shown(tmp_path: Path) -> None:
    """Catches a message that depends on which worker was faster."""
    workspace = toy_workspace(tmp_path)
    for number in (4, 2, 3):
        name = workspace.failure("one", number)
        tasks.write_json(name, {"line": f"line {number}", "mistake": True, "traceback": ""})
    failure = tasks.first_failure(workspace, PHASES[0])
    assert isinstance(failure, DataError) and str(failure) == "line 2"


def test_a_bug_names_the_task_and_its_log(tmp_path: Path) -> None:
    """Catches a bug of ours shown as the user's mistake, or without a way to its traceback."""
    workspace = toy_workspace(tmp_path, crash="one/2")
    with pytest.raises(
        RuntimeError, match=r"task 2 of one failed: KeyError: 'a bug of ours'"
    ) as failed:
        run(workspace)
    assert str(workspace.folder / "logs" / "one" / "logs" / "task_00002.log") in str(failed.value)
    assert 'raise KeyError("a bug of ours")' in str(failed.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_reported_and_not_waited_for(tmp_path: Path, workers: int) -> None:
    """Catches a pool that waits for ever for a worker that the system killed to free memory."""
    workspace = toy_workspace(tmp_path, kill="one/2")
    with pytest.raises(
        DataError, match=r"task 2 of one was killed \(signal 9\).*executor\.workers"
    ):
        run(workspace, workers)
    assert workers_of(workspace) == set()


def test_workers_return_raise_and_die_by_call() -> None:
    """Catches a result or a death given to another call, and calls started after a failure."""
    with local.Workers(2) as pool:
        assert sorted(pool.results(partial(divmod, n, 10) for n in range(25))) == [
            divmod(n, 10) for n in range(25)
        ]
        with pytest.raises(ZeroDivisionError):
            list(pool.results([partial(divmod, 1, 0), partial(divmod, 1, 1)]))

    calls = [partial(os.getpid), partial(os._exit, 3), partial(os.getpid)]
    with pytest.raises(local.WorkerDied, match="code 3") as died, local.Workers(1) as pool:
        list(pool.results(calls))
    assert died.value.code == 3 and not pool.running


def marked_when_free(gate: Path, mark: Path) -> None:
    """Work that lasts until another call has failed."""
    assert soon(gate.exists)
    mark.touch()


def failing(gate: Path) -> None:
    gate.touch()
    raise ValueError("a broken line")


def test_what_runs_when_a_call_fails_is_done_and_kept(tmp_path: Path) -> None:
    """Catches a broken file that throws away the nearly finished work of its neighbours."""
    gate, mark, never = (tmp_path / name for name in ("gate", "mark", "never"))
    calls = [partial(failing, gate), partial(marked_when_free, gate, mark), partial(never.touch)]
    with pytest.raises(ValueError, match="a broken line"), local.Workers(2) as pool:
        list(pool.results(calls))
    assert mark.exists() and not never.exists()


def test_a_task_that_leaves_no_record_is_not_done(tmp_path: Path) -> None:
    """Catches a work function that returns without its output being taken for complete."""
    workspace = toy_workspace(tmp_path, deny="one/2")
    with pytest.raises(
        RuntimeError, match=r"task 2 of one failed: RuntimeError: .*one_2.json is missing"
    ):
        run(workspace)
    assert 2 not in completed(workspace, PHASES[0])


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Catches a full disk shown as a bug of ours."""
    full = OSError(28, "No space left on device")
    free = (
        r"\d[\d,]* bytes are free; make room there and start again: finished tasks are kept, "
        r"or name a folder on another"
    )
    line, mistake = tasks.explain(full, tmp_path)
    assert mistake and re.fullmatch(rf"work: no space left in {tmp_path}, {free} disk", line)
    runs, out = tmp_path / "runs", tmp_path.parent / "out"
    line, mistake = tasks.explain(
        OSError(28, "No space left on device", str(runs / "x.tmp")), tmp_path
    )
    assert mistake and line.startswith(
        f"work: no space left in {runs}; make room there"
    )  # It is gone.
    line, mistake = tasks.explain(
        OSError(122, "Disk quota exceeded", str(out / "chunk_000.npy")), tmp_path
    )
    assert mistake and line.startswith(f"output: no space left in {out}")
    assert tasks.explain(full)[1]
    assert tasks.explain(OSError(5, "Input/output error"))[1] is False


def test_a_full_disk_in_a_task_names_the_folder_and_the_key(tmp_path: Path) -> None:
    """Catches a full disk reported without folder, free space, or the key that moves it."""
    workspace = toy_workspace(tmp_path, full="one/2")
    with pytest.raises(
        DataError,
        match=rf"^work: no space left in {workspace.folder}, [\d,]+ bytes are free; make room",
    ):
        run(workspace)


def test_a_deleted_or_shortened_output_is_made_again(tmp_path: Path) -> None:
    """Catches trust in marks, which outlive the output, and repeating more than is
    gone.
    """
    workspace = toy_workspace(tmp_path)
    run(workspace)
    (workspace.target / "one_3.txt").unlink()
    (workspace.target / "three_0.txt").write_text("half")
    (workspace.folder / "chunks" / "three_1.json").write_text('{"files": [')
    run(workspace)
    again = {name for name, times in start_counts(workspace).items() if times == 2}
    assert again == {"one_3", "three_0", "three_1"} and all_files_complete(workspace, PHASES)


def test_reconciling_follows_the_records(tmp_path: Path) -> None:
    """Catches trust in a mark without output, and repeating of an output without a mark."""
    workspace = toy_workspace(tmp_path)
    preparation.work_one(workspace, 4)
    marks = PHASES[0].logs(workspace) / "completions"
    marks.mkdir(parents=True)
    (marks / "00001").touch()
    assert is_done(workspace, PHASES[0], 4) and not is_done(workspace, PHASES[0], 1)
    assert reconcile(workspace, PHASES[0]) == [0, 1, 2, 3, 5]
    assert completed(workspace, PHASES[0]) == {4}
    tasks.run_task(workspace.folder, PHASES[0], 4)
    assert start_counts(workspace)["one_4"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_any_moment_then_again(tmp_path: Path, workers: int) -> None:
    """Catches a finished task done again, a half-done one that is not, and workers that run on
    alone.
    """
    workspace = toy_workspace(tmp_path, seconds=0.15)
    moments, before = random.Random(workers), {}
    for _ in range(4):
        process = driver(workspace, f"workers={workers}")
        time.sleep(moments.uniform(0.6, 1.6))
        process.kill()
        process.communicate()
        assert soon(lambda: not workers_of(workspace)), "workers outlived their driver"
        after = begun_and_done(workspace)
        assert before.items() <= after.items()
        before = after

    process = driver(workspace, f"workers={workers}")
    _, output = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, output
    after = begun_and_done(workspace)
    assert (
        all_files_complete(workspace, PHASES)
        and set(after) == ALL
        and before.items() <= after.items()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_driver(tmp_path: Path, number: signal.Signals) -> None:
    """Catches workers that outlive their driver, however it ends."""
    workspace = toy_workspace(tmp_path, seconds=600)
    process = driver(workspace, "workers=2")
    assert soon(lambda: len(start_counts(workspace)) == 2)
    assert len(workers_of(workspace)) == 2
    process.send_signal(number)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0
    assert soon(lambda: not workers_of(workspace))


def test_a_second_driver_is_refused_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    """Catches two drivers of the same tasks, and a lock that must be removed by hand."""
    workspace = toy_workspace(tmp_path, seconds=600)
    process = driver(workspace, "workers=1")
    try:
        assert soon(lambda: start_counts(workspace))
        second = driver(workspace, "workers=1")
        try:
            _, output = second.communicate(timeout=HANG_SECONDS)
        finally:
            second.kill()

        assert second.returncode == 2
        assert f"already running (pid {process.pid})" in output and output.count("\n") == 1
    finally:
        process.kill()
        process.communicate()

    with exclusive(workspace.folder):
        pass
    assert soon(lambda: not workers_of(workspace))


def test_ray_is_asked_for_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an ImportError instead of a line that says what to install."""
    monkeypatch.setattr(executor, "find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(ConfigError, match=r"executor\.kind ray needs ray: pip install ray"):
        run_phases(toy_workspace(tmp_path), ExecutorRecipe(kind="ray"), Progress(None), PHASES)


def test_ray_gets_the_recipe_s_wishes(tmp_path: Path) -> None:
    """Catches a key of the recipe that does not reach Ray, which is seldom run."""
    workspace = toy_workspace(tmp_path)
    recipe = ExecutorRecipe(kind="ray", workers=3, memory_gb=8)
    logs = PHASES[0].logs(workspace)
    made = local._ray_pipeline(workspace.folder, PHASES[0], logs, recipe)
    assert (made.tasks, made.workers, made.mem_per_cpu_gb) == (6, 3, 8)
    assert Path(made.logging_dir.path) == logs
    assert local.workers_of(ExecutorRecipe(kind="ray")) == 64
    assert local.workers_of(ExecutorRecipe()) == len(os.sched_getaffinity(0))


def test_slurm_is_asked_for_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback on a machine that submits no jobs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs sbatch and squeue on the PATH"):
        run_phases(
            toy_workspace(tmp_path),
            ExecutorRecipe(kind="slurm", partition="main"),
            Progress(None),
            PHASES,
        )
