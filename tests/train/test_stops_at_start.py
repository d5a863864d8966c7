"""A start that is asked to stop: obeyed at once, in one line, with 75 and nothing half-written.

Each start is a real command line in which one call is replaced by one that never comes back. A
signal that is only looked at after a step would wait for it for ever.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fault_tests.ports import held_port, port_of
from k2train.record.events import Failed, Stopped
from k2train.record.ledger import read_ledger
from tests.support.command_line import HANG_SECONDS, soon
from tests.support.tiny_corpus import (
    ROOT,
    cold_start,
    config_tree,
    environment,
    kill_all,
    make_corpus,
    start,
    train,
    tree_of,
    write_yaml,
)

STUCK = """
import importlib, os, pathlib, sys, time
sys.path.insert(0, {root!r})
module, _, name = {call!r}.rpartition(".")
def stuck(*_, **__):
    pathlib.Path({mark!r}).touch()
    while True:
        time.sleep(3600)
if os.environ.get("RANK", "0") == "0":
    holder, _, inner = module.partition(":")
    target = importlib.import_module(holder)
    setattr(getattr(target, inner) if inner else target, name, stuck)
from k2train.train.__main__ import main
sys.exit(main())
"""
STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            kill_all(process)
    STARTED.clear()


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """Hold a port for the processes of a test."""
    with held_port() as held:
        yield held


def config_of(base: Path, **changes: Any) -> Path:
    if not (base / "data").exists():
        make_corpus(base / "data", 1)
    tree = config_tree(base / "data" / "manifest.json", base / "runs", "a", **changes)
    return write_yaml(base / "c.yaml", tree)


def stuck_at(
    base: Path,
    call: str,
    launcher: Sequence[str] = (),
    stderr: int = subprocess.PIPE,
    **variables: str,
) -> "subprocess.Popen[str]":
    """Start a run in which rank 0 never comes back from `call`; returns when it is there."""
    mark = base / "there"
    mark.unlink(missing_ok=True)
    script = base / "stuck.py"
    script.write_text(STUCK.format(root=str(ROOT), call=call, mark=str(mark)))
    process = cold_start([*launcher, script, config_of(base)], stderr, **variables)
    STARTED.append(process)
    deadline = time.monotonic() + HANG_SECONDS
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def stopped(process: "subprocess.Popen[str]", asked: int | Path, code: int = 75) -> list[str]:
    """Ask by a signal or a STOP file; the lines of k2train."""
    if isinstance(asked, Path):
        asked.touch()
    else:
        process.send_signal(asked)
    _, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, error
    assert "Traceback" not in error, error
    return [line for line in error.splitlines() if line.startswith("k2train: ")]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_while_data_are_hashed(tmp_path: Path, number: int) -> None:
    """Catches a traceback, exit code 143, and a directory with the lock of a run that never was."""
    process = stuck_at(tmp_path, "k2train.train.preflight.verify_data")
    name = signal.Signals(number).name
    assert stopped(process, number) == [
        f"k2train: {name}: ending the start",
        f"k2train: stopped on request ({name}) before the first step; "
        "run the same command again to continue",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_file_is_as_good_as_a_signal(tmp_path: Path) -> None:
    """Catches a STOP that waits for a step, and one that is left for the next start."""
    process = stuck_at(tmp_path, "k2train.train.preflight.verify_data")
    lines = stopped(process, tmp_path / "runs" / "a" / "STOP")
    assert len(lines) == 2 and "stopped on request (STOP file)" in lines[1]
    assert not (tmp_path / "runs").exists()


def test_a_file_ends_all_ranks_of_a_start(tmp_path: Path) -> None:
    """Catches a rank that takes rank 0, which saw the file, for dead."""
    process = stuck_at(
        tmp_path,
        "k2train.train.run.open_run_logger",
        ["-m", "k2train.launch", "--nproc-per-node", "2"],
    )
    run = tmp_path / "runs" / "a"
    assert len(stopped(process, run / "STOP")) == 2
    assert not (run / "STOP").exists()


def test_while_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Catches a stop that counts as a failed start, and a run that stays held."""
    begun = subprocess.run(
        [sys.executable, "-m", "k2train.train", config_of(tmp_path), "run.stop_after_steps=1"],
        env=environment(),
        cwd=ROOT,
        check=False,
    )
    assert begun.returncode == 75
    run = tmp_path / "runs" / "a"
    before = {n: c for n, c in tree_of(run / "checkpoints").items()}
    process = stuck_at(tmp_path, "k2train.train.checkpointing.load_states")
    assert len(stopped(process, signal.SIGUSR1)) == 2
    assert tree_of(run / "checkpoints") == before
    last = read_ledger(run / "ledger.jsonl")[-1].event
    assert isinstance(last, Stopped) and last.reason == "SIGUSR1"
    assert not (run / "run.lock").exists()
    (lease,) = run.glob("lease_*.json")
    assert '"released": true' in lease.read_text()


def test_while_other_ranks_wait_in_a_collective(tmp_path: Path) -> None:
    """Catches a rank that hears nothing in native code, and one that takes the others for dead."""
    process = stuck_at(
        tmp_path,
        "k2train.train.run.open_run_logger",
        ["-m", "k2train.launch", "--nproc-per-node", "2"],
    )
    # Rank 1 has met rank 0 by now, or is about to.
    assert len(stopped(process, signal.SIGTERM)) == 2


def test_a_signal_to_one_rank_alone_ends_all(tmp_path: Path) -> None:
    """Catches a rank that fails because another one, without a launcher, left on request."""
    path = config_of(tmp_path, run__allow=["faults"], batch__micro_sequences=3)
    assert train(path, "run.stop_after_steps=1", processes=2).returncode == 75
    for rank in (0, 1):
        fault = f"start.loaded@rank={rank}@nth=1:usr1"
        process = start(path, processes=2, K2TRAIN_FAULTS=fault)
        output, _ = process.communicate()
        assert process.job.codes == [75, 75], output
    ends = [
        entry.event
        for entry in read_ledger(tmp_path / "runs" / "a" / "ledger.jsonl")
        if isinstance(entry.event, Stopped)
    ]
    assert [end.reason for end in ends[1:]] == ["SIGUSR1", "SIGUSR1 on rank 1"]
    # Heartbeats that say so are left behind: they are no reason to stop.
    assert train(path, processes=2).returncode == 0


def test_a_signal_to_one_rank_is_told_with_rank_and_name(tmp_path: Path) -> None:
    """Catches a stop that nobody confirms, and a ledger that does not say who was asked."""
    path = config_of(tmp_path, run__allow=["faults"], batch__micro_sequences=3)
    process = start(path, processes=2, K2TRAIN_FAULTS="step.forward@rank=1@step=2:usr1")
    output, _ = process.communicate()
    assert process.job.codes == [75, 75], output
    assert "k2train: SIGUSR1 on rank 1: finishing the step, then saving\n" in output
    assert "stopped on request (SIGUSR1 on rank 1) at step 2;" in output
    (end,) = ends_of(tmp_path, 1)
    assert isinstance(end, Stopped) and (end.reason, end.step) == ("SIGUSR1 on rank 1", 2)


def ends_of(base: Path, attempt: int) -> list[Failed | Stopped]:
    """Return what the ledger says of the end of a start."""
    events = [entry.event for entry in read_ledger(base / "runs" / "a" / "ledger.jsonl")]
    return [e for e in events if isinstance(e, Failed | Stopped) and e.attempt == attempt]


@pytest.mark.parametrize("failed", (0, 1))
def test_without_our_launcher_sigterm_is_a_failure(tmp_path: Path, failed: int) -> None:
    """Catches torchrun's SIGTERM after another rank's failure, told and counted as a request."""
    path = config_of(tmp_path, run__allow=["faults"], batch__micro_sequences=3)
    assert train(path, "run.stop_after_steps=1", processes=2).returncode == 75
    process = start(path, processes=2, K2TRAIN_FAULTS=f"start.loaded@rank={failed}@nth=1:term")
    output, _ = process.communicate()
    assert process.job.codes == [1, 1], output
    assert "stopped on request" not in output, output
    assert "SIGTERM during a start" in output, output
    # Where the other rank reported it, the next start records it.
    assert train(path, "run.stop_after_steps=1", processes=2).returncode == 75
    ends = ends_of(tmp_path, 2)
    assert len(ends) == 1 and isinstance(ends[0], Failed)
    assert "SIGTERM during a start" in ends[0].problem


KILLED = """
import importlib, os, signal, sys
sys.path.insert(0, {root!r})
module, _, name = {call!r}.rpartition(".")
def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    setattr(importlib.import_module(module), name, dies)
from k2train.train.__main__ import main
sys.exit(main())
"""
LAUNCHER = ("-m", "k2train.launch", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("call", "recorded"),
    (
        ("k2train.train.__main__.prepare_start", False),
        ("k2train.train.run.start_process_group", False),
        ("k2train.train.run.log_starting", True),
        ("k2train.train.checkpointing.load_states", True),
    ),
)
def test_a_rank_that_dies_is_no_request(tmp_path: Path, call: str, recorded: bool) -> None:
    """Catches the SIGTERM that torchrun sends to what a failure left, told and counted as STOP."""
    path = config_of(tmp_path, batch__micro_sequences=3)
    assert train(path, "run.stop_after_steps=1", processes=2).returncode == 75
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), call=call))
    process = cold_start([*LAUNCHER, script, path])
    STARTED.append(process)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, output
    assert "process 1 ended with signal 9" in output and "on request" not in output, output

    # What rank 0 could not record, the next start does.
    assert train(path, "run.stop_after_steps=1", processes=2).returncode == 75
    ends = ends_of(tmp_path, 2)
    if recorded:
        assert len(ends) == 1 and isinstance(ends[0], Failed), ends
        assert ends[0].problem.startswith("rank 1 (pid ") and ends[0].problem in output
    else:
        assert not any(isinstance(end, Stopped) and end.reason == "SIGTERM" for end in ends)


MISSING = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from k2train.train import run
real = run.start_process_group
def meet(*given, **named):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path({mark!r}).touch()
    return real(*given, **named)
run.start_process_group = meet
from k2train.train.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 1), (signal.SIGUSR1, 75)))
def test_a_node_that_fails_ends_no_other_on_request(
    tmp_path: Path, held: socket.socket, number: int, code: int
) -> None:
    """Catches srun's SIGTERM to the nodes that are left after a failure: 75 is above 1 and 2, so
    the batch script would not start again. What the script hands on, USR1, is a request.
    """
    script, mark = tmp_path / "missing.py", tmp_path / "waits"
    script.write_text(MISSING.format(root=str(ROOT), mark=str(mark)))
    where = f"127.0.0.1:{port_of(held)}"
    path = config_of(tmp_path, batch__micro_sequences=3)
    nodes = []
    for host in ("true", "false"):
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
        options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", where, "--rdzv-id", "a"]
        options += ["--rdzv-conf", f"is_host={host}", str(script), str(path)]
        node = cold_start(["-m", "k2train.launch", *options])
        nodes.append(node)
        STARTED.append(node)

    assert soon(lambda: mark.exists() and any(node.poll() is not None for node in nodes))
    failed, left = sorted(nodes, key=lambda node: node.poll() is None)
    assert failed.returncode == 1 and left.poll() is None
    left.send_signal(number)
    output, _ = left.communicate(timeout=HANG_SECONDS)
    assert left.returncode == code, output
    assert ("on request" in output) == (code == 75), output


@pytest.mark.parametrize(("number", "code"), ((signal.SIGUSR1, 75), (signal.SIGTERM, 1)))
def test_while_another_rank_is_missing(
    tmp_path: Path, held: socket.socket, number: int, code: int
) -> None:
    """Catches ten minutes in which a rank waits for one that never comes, deaf to signals.

    Where no launcher of ours says whether SIGTERM is a request, it counts as a failure.
    """
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(held))}
    script = (
        "import pathlib, torch.distributed as dist\n"
        "real = dist.init_process_group\n"
        "def init(*a, **k):\n"
        f"    pathlib.Path({str(tmp_path / 'there')!r}).touch()\n"
        "    return real(*a, **k)\n"
        "dist.init_process_group = init\n"
        "import sys\n"
        "from k2train.train.__main__ import main\n"
        "sys.exit(main())\n"
    )
    process = cold_start(
        ["-c", script, config_of(tmp_path), "batch.micro_sequences=3"],
        subprocess.PIPE,
        **launched,
        **meeting,
    )
    STARTED.append(process)
    deadline = time.monotonic() + HANG_SECONDS
    while not (tmp_path / "there").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(stopped(process, number, code)) == 2
    assert not (tmp_path / "runs").exists()


def test_a_second_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Catches forty lines of torch behind a Ctrl-C that means now."""
    path = tmp_path / "stderr"
    with path.open("w") as said:
        process = stuck_at(tmp_path, "k2train.train.engine:Engine.train_step", stderr=said.fileno())
    process.send_signal(signal.SIGINT)
    # Two that are heard within two seconds are one press, and a busy machine hears late.
    assert soon(lambda: "SIGINT" in path.read_text()), process.poll()
    time.sleep(2.1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_SECONDS)
    error = path.read_text()
    assert process.returncode == 130 and "Traceback" not in error, error
    lines = [line for line in error.splitlines() if line.startswith("k2train: ")]
    # The save of the first state may or may not be whole by then.
    kept = r"(no checkpoint is saved|the newest checkpoint is ckpt_000, of step 0)"
    assert lines[0] == "k2train: SIGINT: finishing the step, then saving"
    assert re.fullmatch(
        rf"k2train: interrupted at step 1: ended at once; {kept}; "
        "run the same command again to continue",
        lines[1],
    )
    assert len(lines) == 2
    (end,) = ends_of(tmp_path, 1)
    assert isinstance(end, Stopped) and end.reason == "interrupted"
