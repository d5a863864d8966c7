"""Launcher: exit codes, signal forwarding and restarts, on which a batch script relies."""

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed import TCPStore

from fault_tests.ports import held_port, port_of
from k2train import retry
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import EXIT_FAILED, EXIT_USAGE, RunError
from k2train.launch.__main__ import (
    exit_code_after_signal,
    exit_code_of,
    is_alone,
    main,
    parse,
    start_with_restarts,
    trains,
)
from k2train.launch.environment import (
    Launch,
    another_has_stopped,
    means_to_save,
    open_port,
    read_launch,
    store_file,
    was_asked_to_stop,
    write_status,
)
from k2train.launch.status import (
    End,
    ProcessStatus,
    StatusBoard,
    first_end,
    read_statuses,
    write_file,
    write_signals,
)
from k2train.launch.supervisor import Supervisor
from k2train.processes import start_ticks
from k2train.record.events import Stopped
from k2train.record.ledger import read_ledger
from tests.support import forkserver
from tests.support.command_line import HANG_SECONDS, soon
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import (
    ROOT,
    cold_start,
    config_tree,
    environment,
    kill_all,
    make_corpus,
    train,
    write_yaml,
)

Launcher = forkserver.Process | subprocess.Popen[str]
STARTED: list[Launcher] = []
"""What the tests have started: ended with them, also where they fail."""
OPTIONS = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    (
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15, 2: -15}, 75),
        ({0: 2, 1: -15}, 2),
        ({0: 2, 1: 75}, 2),
        ({0: 1, 1: 2}, 1),
        ({1: -9, 0: -15}, 1),
        ({0: -15, 1: -15}, 1),
        ({0: 75, 1: -9}, 1),
    ),
)
def test_verdict(codes: dict[int, int], expected: int) -> None:
    """A job that saved and stopped is started again, one with a mistake is not.

    A killed process is neither.
    """
    assert exit_code_of(codes) == expected


def test_one_bad_process_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    exit_code_of({0: -15, 3: -9})
    assert capfd.readouterr().err == "process 3 ended with signal 9\n"


@pytest.mark.parametrize(
    ("codes", "expected"),
    (({0: 75, 1: 75}, 75), ({0: 0, 1: 0}, 0), ({0: 75, 1: None}, 1), ({0: 75, 1: 1}, 1), ({}, 1)),
)
def test_verdict_after_a_signal(codes: dict[int, int | None], expected: int) -> None:
    """75 says that everything is saved: one process that was killed while saving makes it a lie."""
    assert (
        exit_code_after_signal({rank: ProcessStatus(code) for rank, code in codes.items()})
        == expected
    )


PATIENT = """
import signal, sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent as Agent
assert Agent._shutdown.__defaults__ == (signal.SIGTERM, 30)
Agent._shutdown.__defaults__ = (signal.SIGTERM, 3600)
from k2train.launch.__main__ import main
sys.exit(main())
"""
"""The launcher over a torchrun that waits an hour for processes, not 30 s: relying on it hangs."""


def launch(
    *arguments: object,
    options: Sequence[str] = OPTIONS,
    start: Sequence[str] = ("-m", "k2train.launch"),
    cold: bool = False,
    **variables: str,
) -> Launcher:
    """A launcher, warm if it is not changed on its way (`start`) and its start is not the test.

    Its processes are new ones in any case.
    """
    command = [*start, *options, *arguments]
    process: Launcher = (
        cold_start(command, **variables)
        if cold or start[0] == "-c"
        else forkserver.start(command, environment(**variables))
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            kill_all(process)
    STARTED.clear()


WORKER = """
import os, pathlib, signal, sys, time
from k2train.launch.environment import write_status
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    (folder / f"heard_{rank}").write_text(" ".join(heard))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, hear)
write_status(rank, None)
(folder / f"pid_{rank}").write_text(str(os.getpid()))
"""
"""Start of a process that records the signals it receives; a test adds the rest."""


def worker(folder: Path, rest: str) -> Path:
    path = folder / "worker.py"
    path.write_text(WORKER + rest)
    return path


def pids(folder: Path, process: Launcher, count: int = 2) -> list[int]:
    """Return the process ids of the workers, once all have started."""
    files = [folder / f"pid_{rank}" for rank in range(count)]
    assert soon(lambda: all(f.exists() and f.read_text() for f in files)), process.poll()
    return [int(f.read_text()) for f in files]


def gone(process_ids: Sequence[int]) -> bool:
    return soon(lambda: not any(start_ticks(pid) for pid in process_ids))


def test_every_signal_goes_to_every_process_as_often_as_it_comes(tmp_path: Path) -> None:
    """Catches torchrun's own handling: dead of USR1, deaf to a second SIGTERM."""
    sent = ["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT", "SIGTERM", "SIGTERM"]
    process = launch(
        # As training does: torchrun ends the slower process by a signal, whatever its exit code.
        worker(
            tmp_path,
            f"while len(heard) < {len(sent)}: time.sleep(0.01)\n"
            "write_status(rank, 75)\nsys.exit(75)",
        ),
        tmp_path,
    )
    pids(tmp_path, process)
    for count, name in enumerate(sent, 1):
        process.send_signal(getattr(signal, name))
        for rank in range(2):
            received = tmp_path / f"heard_{rank}"
            assert soon(
                lambda n=received, c=count: n.exists() and len(n.read_text().split()) == c
            ), (
                name,
                rank,
            )  # type: ignore[misc]
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert [(tmp_path / f"heard_{rank}").read_text().split() for rank in range(2)] == [sent, sent]


def test_a_dead_process_takes_the_others_with_it_even_a_stopped_one(tmp_path: Path) -> None:
    """Catches the 30 seconds of torchrun, and processes that stay behind because they hear no
    SIGTERM.
    """
    process = launch(worker(tmp_path, "time.sleep(3600)"), tmp_path, start=("-c", PATIENT))
    first, second = pids(tmp_path, process)
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, text
    assert "process 0 ended with signal 9" in text and "process 1" not in text
    assert gone([first, second])


def test_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """Catches processes that train on with nobody to wait for them, and
    keep the lock of the run.
    """
    process = launch(worker(tmp_path, "while not heard: time.sleep(0.01)"), tmp_path)
    both = pids(tmp_path, process)
    process.kill()
    # Not communicate: processes that stay behind hold the pipe open.
    process.wait()
    try:
        assert gone(both)
    finally:
        for pid in both:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    # Linux sends the signal once for every thread of the launcher that was the parent when it
    # ended: at least once.
    assert [set((tmp_path / f"heard_{rank}").read_text().split()) for rank in range(2)] == [
        {"SIGTERM"}
    ] * 2


def test_asked_to_stop_while_it_waits_for_a_node_that_never_comes(tmp_path: Path) -> None:
    """Catches a launcher that hears nothing because its main thread waits in C++ for a store."""
    (closed := socket.socket()).bind(("127.0.0.1", 0))
    options = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{closed.getsockname()[1]}",
    ]
    options += ["--rdzv-conf", "is_host=false,read_timeout=3600"]
    process = launch(worker(tmp_path, ""), tmp_path, options=options)
    assert soon(lambda: b"SIGTERM" in handled(process.pid))
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    closed.close()
    assert process.returncode == 1
    assert "SIGTERM: asked to stop before any process had started; nothing was begun\n" in text


def handled(pid: int) -> bytes:
    """Return the names of the signals that a process catches, by /proc."""
    line = next(
        row
        for row in Path(f"/proc/{pid}/status").read_text().splitlines()
        if row.startswith("SigCgt")
    )
    mask = int(line.split()[1], 16)
    return b" ".join(s.name.encode() for s in signal.Signals if mask >> (s - 1) & 1)


def test_a_crash_is_started_again(tmp_path: Path) -> None:
    """Through the real torchrun, twice in one launcher: catches a second start that finds the
    remains of the first.
    """
    rest = (
        "mine = folder / f'starts_{rank}'\n"
        "mine.write_text((mine.read_text() if mine.exists() else '') + '.')\n"
        # Not before the other has come as far: one that crashes takes the other with it.
        "import time\n"
        "other = folder / f'starts_{1 - rank}'\n"
        "while not other.exists() or len(other.read_text()) < len(mine.read_text()):\n"
        "    time.sleep(0.05)\n"
        "code = (1, 75)[len(mine.read_text()) - 1]\n"
        "write_status(rank, code)\n"
        "sys.exit(code)"
    )
    process = launch("--restarts", "4", *OPTIONS, worker(tmp_path, rest), tmp_path, options=[])
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert "start 2 of 5 follows in 1 s" in text and "follows in 2 s" not in text
    assert [(tmp_path / f"starts_{rank}").read_text() for rank in range(2)] == ["..", ".."]


class Waits(Supervisor):
    """A supervisor that waits in no time, and remembers for how long."""

    def __init__(self, signal_after: int = 99) -> None:
        super().__init__(lambda text: None)
        self.waited: list[float] = []
        self.signal_after = signal_after

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return len(self.waited) >= self.signal_after


@pytest.mark.parametrize(
    ("codes", "restarts", "expected", "waited"),
    (
        ([1, 1, 75], 3, 75, [1, 2]),
        ([1, 0], 3, 0, [1]),
        ([2], 3, 2, []),
        ([75], 3, 75, []),
        ([1], 0, 1, []),
        ([1, 1, 1], 2, 1, [1, 2]),
        ([1] * 9, 8, 1, [1, 2, 4, 8, 16, 32, 60, 60]),
    ),
)
def test_what_is_started_again(
    codes: list[int], restarts: int, expected: int, waited: list[float]
) -> None:
    """Catches a mistake that is tried again, a stop that is undone, and more starts than were
    allowed.
    """
    supervisor, left = Waits(), list(codes)
    assert start_with_restarts(lambda: left.pop(0), restarts, supervisor) == expected
    assert (left, supervisor.waited) == ([], waited)


def test_a_signal_ends_the_starting_again() -> None:
    """Catches a launcher that cannot be stopped between two starts, or starts again what a signal
    has ended.
    """
    between = Waits(signal_after=2)
    assert start_with_restarts(lambda: 1, 9, between) == 1 and between.waited == [1, 2]
    stopped = Waits()
    stopped.first_signal = "SIGTERM"
    assert start_with_restarts(lambda: 1, 9, stopped) == 1 and stopped.waited == []


def test_a_long_start_is_no_crash_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of weeks that waits a minute after each of its rare crashes."""
    now = [0.0]
    monkeypatch.setattr("k2train.launch.__main__.time.monotonic", lambda: now[0])
    lasts, supervisor = [1, 1, 700, 1, 1], Waits()

    def start() -> int:
        now[0] += lasts.pop(0)
        return EXIT_FAILED

    assert start_with_restarts(start, 4, supervisor) == EXIT_FAILED
    assert supervisor.waited == [1, 2, 1, 2]


MEETING = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from k2train.launch.environment import open_port, read_launch
from k2train.parallel.grid import start_process_group, stop_process_group
folder, launch = pathlib.Path(sys.argv[1]), read_launch()
start_process_group(launch, torch.device("cpu"))
group = dist.new_group(backend="gloo")
total = torch.tensor([launch.rank + 1])
dist.all_reduce(total, group=group)
(folder / f"pid_{launch.rank}.tmp").write_text(f"{os.getpid()} {total.item()} {open_port(2)}")
(folder / f"pid_{launch.rank}.tmp").rename(folder / f"pid_{launch.rank}")
while not (folder / "end").exists():
    time.sleep(0.05)
stop_process_group()
"""
"""A process of two that meet, add a number and wait."""


def listening(process_ids: Sequence[int]) -> set[tuple[str, int]]:
    """Address and port of every socket on which these processes wait for others."""
    waiting = {}
    for family, name in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        table = Path(f"/proc/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A":
                raw, port = fields[1].split(":")
                # The kernel prints words of four bytes, each in the order of the processor.
                words = [bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, len(raw), 8)]
                waiting[fields[9]] = (socket.inet_ntop(family, b"".join(words)), int(port, 16))
    found = set()
    for pid in process_ids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inode = os.readlink(link).removeprefix("socket:[").removesuffix("]")
                found |= {waiting[inode]} if inode in waiting else set()
    return found


def test_the_processes_of_one_machine_open_no_door(tmp_path: Path) -> None:
    """Catches a store on all interfaces, whose readers run what a stranger puts there."""
    (tmp_path / "meet.py").write_text(MEETING)
    process = launch(tmp_path / "meet.py", tmp_path)
    files = [tmp_path / f"pid_{rank}" for rank in range(2)]
    assert soon(lambda: all(file.exists() for file in files)), process.communicate()
    told = [file.read_text().split() for file in files]
    workers = [int(words[0]) for words in told]
    assert [words[1:] for words in told] == [["3"], ["3"]], "they met, and know of no port"
    inside = listening(workers)
    assert inside, "gloo listens somewhere"
    assert {address for address, _ in inside | listening([process.pid])} == {"127.0.0.1"}
    for _, port in inside:
        for address in (f"127.0.0.{2 + port % 200}", "::1"):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with pytest.raises(OSError), socket.socket(family) as stranger:
                stranger.connect((address, port))
    (tmp_path / "end").touch()
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, text


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_stranger_at_the_port_of_several_machines_runs_nothing(tmp_path: Path) -> None:
    """Catches a launcher that runs, as its user, what anybody put where the nodes meet."""
    held = held_port()
    port = port_of(held)
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "is_host=true"]
    process = launch(
        worker(tmp_path, ""), tmp_path, options=[*options, "--local-addr", "127.0.0.1"]
    )

    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=HANG_SECONDS))
    # It waits for the other node, and reads again and again whether that has come.
    store.wait(["torch.rendezvous.job"])
    payload = b64encode(pickle.dumps(Payload(tmp_path / "canary")))
    while process.poll() is None:
        # Its own state may overwrite ours once.
        with suppress(RuntimeError):
            store.set("torch.rendezvous.job", payload)
        time.sleep(0.1)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    held.close()
    assert not (tmp_path / "canary").exists()
    assert process.returncode == 1 and "RendezvousStateError" in text, text


@pytest.mark.parametrize(
    ("given", "alone"),
    (
        (["--nproc-per-node", "2", "x.py"], True),
        (["--standalone", "x.py"], True),
        (["--nnodes", "1:1", "x.py"], True),
        (["--nnodes", "2", "--rdzv-endpoint", "h:1", "x.py"], False),
        (["--nnodes", "1:2", "x.py"], False),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "h:1", "x.py"], False),
    ),
)
def test_who_is_alone(
    given: list[str], alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a meeting place of the user's that is passed over."""
    (tmp_path / "x.py").touch()
    monkeypatch.chdir(tmp_path)
    assert is_alone(parse(given)) == alone


def test_another_launcher_keeps_its_meeting_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches processes that wait in different places: a file of one machine, a port of several."""
    monkeypatch.delenv("K2TRAIN_VERDICTS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert store_file(2) is None and open_port(2) == "n1:29500" and open_port(1) == ""
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    assert store_file(2) is None, "a folder that no launcher of ours watches"
    (tmp_path / "launcher").write_text("1")
    assert store_file(2) == tmp_path / "store_0" and open_port(2) == ""
    assert store_file(4) is None, "two of four are elsewhere"


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        (["--nproc-per-node", "2", "-m", "x", "--restarts", "3"], 0),
        (["--restarts", "3", "-m", "x"], 3),
        (["--nproc-per-node=2", "--restarts=0", "x.py"], 0),
        (["--nnodes=1", "--restarts=12", "x.py", "--nnodes=4"], 12),
    ),
)
def test_restarts_are_ours_and_the_rest_is_torchruns(
    given: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an option of the program that is taken for the launcher's."""
    (tmp_path / "x.py").touch()
    monkeypatch.chdir(tmp_path)
    options = parse(given)
    assert options.restarts == expected and options.training_script in ("x", "x.py")
    script = next(i for i, text in enumerate(given) if text in ("x", "x.py"))
    assert options.training_script_args == given[script + 1 :]


@pytest.mark.parametrize(
    ("given", "module", "rest"),
    (
        (["train", "MY.yaml", "lr.peak=1"], "k2train.train", ["MY.yaml", "lr.peak=1"]),
        (["-m", "k2train", "train", "MY.yaml"], "k2train.train", ["MY.yaml"]),
        (["generate", "RUN", "--json"], "k2train", ["generate", "RUN", "--json"]),
        (["-m", "k2train", "generate", "RUN"], "k2train", ["generate", "RUN"]),
        (["-m", "train", "MY.yaml"], "train", ["MY.yaml"]),
    ),
)
def test_a_command_by_its_name(given: list[str], module: str, rest: list[str]) -> None:
    """Catches `k2train launch train MY.yaml` that looks for a file, and a training that is not
    known as one: it would skip the checks of a start.
    """
    options = parse(["--nproc-per-node", "2", *given])
    assert options.module and options.training_script == module
    assert options.training_script_args == rest
    assert trains(options) == (module == "k2train.train")


def test_a_file_of_that_name_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train").write_text("", encoding="utf-8")
    options = parse(["train", "MY.yaml"])
    assert not options.module and options.training_script == "train"


@pytest.mark.parametrize(
    ("given", "complaint"),
    (
        ([], "nothing to start; give -m k2train.train CONFIG.yaml"),
        (["--nproc-per-node", "2"], "required: training_script"),
        (["--nproc-per-nodes", "2", "-m", "x"], "--nproc-per-nodes"),
        (["MY.yaml"], "MY.yaml is a config, not a program; put -m k2train.train before it"),
        (["--standalone", "-m", "MY.yml", "lr.peak=1"], "MY.yml is a config"),
        (["k2train.train", "MY.yaml"], "there is no file k2train.train; a module needs -m"),
        (["--restarts", "many", "-m", "x"], "'many'"),
        (["--nnodes", "2", "--restarts=1", "-m", "x"], "--nnodes is 2"),
    ),
)
def test_a_mistaken_start_is_one_line(
    given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches screens of usage, and a config that Python runs as a program in every process."""
    with pytest.raises(SystemExit) as end:
        parse(given)
    said = capsys.readouterr().err
    assert end.value.code == EXIT_USAGE and complaint in said
    assert said.startswith("python -m k2train.launch: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "refused"), (("", False), ("4", False), ("8", True), ("2", True))
)
def test_a_world_that_was_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, refused: bool
) -> None:
    """Catches a run that continues on fewer nodes than were requested."""
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
        "K2TRAIN_WORLD_SIZE": asked,
    }.items():
        monkeypatch.setenv(name, value)
    if not refused:
        assert read_launch().world_size == 4
        return
    with pytest.raises(
        RunError, match=f"4 processes met where K2TRAIN_WORLD_SIZE asks for {asked}"
    ):
        read_launch()


@pytest.mark.parametrize(
    "variables",
    (
        {},
        # A shell of salloc, and a batch script: their job has tasks, they are none of a step.
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # Runs of their own, one a task.
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "K2TRAIN_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ),
)
def test_a_plain_start_inside_a_job_is_a_world_of_one(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Catches a refusal where a person starts one process by hand."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(0, 1, 0, launched=False)


def test_launchers_that_meet_nobody_are_one_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `srun -n 4 python -m k2train.launch`: four runs in one directory."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert main(["--nproc-per-node", "2", "-m", "k2train.train", "none.yaml"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "task 0 of 4 that srun started" in said


def test_a_note_tells_a_process_from_a_later_one_of_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a signal to a stranger that got the id of a process which is gone."""
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    write_status(3, None)
    write_status(5, None, saving=True)
    statuses = read_statuses(tmp_path)
    assert (
        statuses[3].is_alive
        and statuses[3].pid == os.getpid()
        and not statuses[3].saving
        and statuses[5].saving
    )
    assert not ProcessStatus(None, os.getpid(), 1).is_alive and not ProcessStatus(None, 0).is_alive
    assert not another_has_stopped()
    write_status(3, 75)
    assert read_statuses(tmp_path)[3].code == 75 and another_has_stopped()
    monkeypatch.delenv("K2TRAIN_VERDICTS")
    assert not another_has_stopped()


def opened_by(pid: int) -> list[str]:
    """Return the files that a process holds open, by name."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(link))
    return found


SAVES = """
while not heard: time.sleep(0.01)
write_status(rank, None, saving=True)
time.sleep(8)
write_status(rank, 75)
sys.exit(75)
"""
"""Rest of a process that saves for longer than the launcher waits for one that does not."""


def test_a_temporary_folder_that_is_cleaned_costs_no_save(tmp_path: Path) -> None:
    """Catches a launcher that forgets its processes with the files in which they write."""
    (temporary := tmp_path / "tmp").mkdir()
    process = launch(worker(tmp_path, SAVES), tmp_path, cold=True, TMPDIR=str(temporary))
    both = pids(tmp_path, process)
    (notes,) = temporary.glob("k2train-launch-*")
    assert soon(lambda: sum("rank_" in name for name in opened_by(process.pid)) == 2)
    for folder in temporary.iterdir():
        shutil.rmtree(folder)
    # Long enough for the launcher to look at what is no longer there.
    assert not soon(lambda: process.poll() is not None, 3) and not notes.exists()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert "before any process had started" not in text and gone(both)


@pytest.mark.parametrize("code", (0, 1))
def test_a_start_leaves_nothing_in_the_temporary_folder(tmp_path: Path, code: int) -> None:
    """Catches folders of torchrun's that pile up with every start; logs that a user asked for
    without saying where stay.
    """
    (temporary := tmp_path / "tmp").mkdir()
    program = worker(tmp_path, f"sys.exit({code})")
    process = launch(program, tmp_path, cold=True, TMPDIR=str(temporary))
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, text
    assert list(temporary.iterdir()) == []

    if not code:
        asked = launch("--redirects", "3", program, tmp_path, cold=True, TMPDIR=str(temporary))
        text, _ = asked.communicate(timeout=HANG_SECONDS)
        assert asked.returncode == 0, text
        assert len(list(temporary.rglob("stdout.log"))) == 2


def test_a_record_that_is_half_written_is_not_believed(tmp_path: Path) -> None:
    """Catches an exit code made of two records: the launcher reads while a process writes."""
    with StatusBoard(tmp_path) as board:
        write_file(tmp_path, 4, None, saving=True)
        before = board.read()
        running, ended = (tmp_path / "rank_4").read_bytes(), ProcessStatus(75).record()
        assert len(running) == len(ended) and ProcessStatus.of(ended) == ProcessStatus(75)
        for cut in range(1, len(ended)):
            mixed = ended[:cut] + running[cut:]
            if mixed not in (running, ended):
                (tmp_path / "rank_4").write_bytes(mixed)
                assert board.read() == before, cut
        (tmp_path / "rank_4").write_bytes(b"")
        assert board.read() == before


def test_a_board_follows_a_rank_to_its_next_process(tmp_path: Path) -> None:
    """Catches the end of an earlier process that is taken for that of a later one."""
    with StatusBoard(tmp_path) as board:
        assert board.read() == {}
        write_file(tmp_path, 0, None)
        assert board.read()[0].is_alive
        (tmp_path / "later").write_bytes(ProcessStatus(2).record())
        (tmp_path / "later").rename(tmp_path / "rank_0")
        assert board.read() == {0: ProcessStatus(2)}
        shutil.rmtree(tmp_path)
        assert board.read() == {0: ProcessStatus(2)}


def test_a_status_is_written_where_no_name_is_left(tmp_path: Path) -> None:
    """Catches a process that cannot tell its launcher that it has saved."""
    (folder := tmp_path / "notes").mkdir()
    with StatusBoard(folder) as board:
        write_file(folder, 1, None)
        assert board.read()[1].is_alive
        shutil.rmtree(folder)
        write_file(folder, 1, 75)
        assert board.read()[1].code == 75
    write_file(tmp_path / "never there", 1, 75)


def test_real_processes(tmp_path: Path) -> None:
    """Through the real torchrun: the processes' own code comes out, without a traceback."""
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(75)\n")
    process = launch(tmp_path / "leaves.py", cold=True)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75
    assert "Traceback" not in text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "data")
    tree = config_tree(
        tmp_path / "data" / "manifest.json", tmp_path / "runs", "run", parallel__tensor=2
    )
    return write_yaml(tmp_path / "run.yaml", tree)


def test_a_mistake_is_told_once_and_ends_with_2(config: Path) -> None:
    """A line a process, or a code that a batch script takes for a crash and tries again."""
    process = launch("-m", "k2train.train", config, "modle.num_heads=3")
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and "unknown key" in lines[0], text


@pytest.mark.slow
def test_asked_to_stop_all_processes_save_and_go_on(config: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher alone: every process finishes the step, one checkpoint is written,
    the code is 75.
    """
    run = tmp_path / "runs" / "run"
    process = launch("-m", "k2train.train", config)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + HANG_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    stopped = read_ledger(run / "ledger.jsonl")[-1].event
    assert isinstance(stopped, Stopped) and stopped.reason == "SIGTERM"
    done = stopped.step
    assert len(step_rows(metrics)) == done < 20
    assert any(
        json.loads((path / "manifest.json").read_text())["step"] == done
        for path in (run / "checkpoints").iterdir()
    )
    # What was saved is for any processes, also those of no launcher.
    again = train(config, processes=2)
    assert again.returncode == 0, again.stderr
    steps = [row["step"] for row in step_rows(metrics)]
    assert steps == list(range(1, 21)), "a step was lost or done twice"


@pytest.fixture
def loud() -> Iterator[None]:
    """Undoes what a launcher in this process does: it turns off the lines of torchrun, and sets
    variables for the processes of a run.
    """
    with mock.patch.dict(os.environ):
        yield
    logging.disable(logging.NOTSET)


def test_a_config_that_is_waited_for_is_told(
    config: Path,
    loud: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a launcher that waits two minutes for a file system without a word."""
    monkeypatch.setattr("k2train.launch.__main__._start", lambda *given: 0)
    monkeypatch.setenv("K2TRAIN_FAULTS", "gradient@step=3:nan")
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    failing, opened = [True], os.open

    def stale(path: Any, *given: Any, **named: Any) -> int:
        if str(path) == str(config) and failing and failing.pop():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *given, **named)

    monkeypatch.setattr(os, "open", stale)
    assert main(["-m", "k2train.train", str(config), "run.allow=[faults]"]) == 0
    assert not failing and "trying again for" in caplog.text


@pytest.mark.parametrize("permitted", (False, True))
def test_faults_are_refused_before_a_process_starts(
    config: Path,
    permitted: bool,
    loud: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a variable that was left behind and is found by N processes instead of none."""
    begun: list[object] = []
    monkeypatch.setattr(
        "k2train.launch.__main__._start", lambda *given: len(begun.append(given) or [])
    )
    monkeypatch.setenv("K2TRAIN_FAULTS", "gradient@step=3:nan")
    overrides = ["run.allow=[faults]"] if permitted else []
    code = main(["--nproc-per-node", "2", "-m", "k2train.train", str(config), *overrides])
    assert (code, len(begun)) == ((0, 1) if permitted else (2, 0))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (0 if permitted else 1)
    assert all("K2TRAIN_FAULTS" in line and "run.allow=[faults]" in line for line in told)

    # Other programs have no config; those that train look by themselves.
    assert main(["-m", "timeit"]) == 0


@pytest.mark.slow
def test_a_save_that_takes_longer_than_torchruns_patience_is_whole(
    config: Path, tmp_path: Path
) -> None:
    """Catches torchrun's 30 seconds, which cut a save short: this one needs 35, and a second
    SIGTERM comes meanwhile.
    """
    run = tmp_path / "runs" / "run"
    process = launch(
        "-m",
        "k2train.train",
        config,
        "run.allow=[faults]",
        K2TRAIN_FAULTS="step.done@step=2:term;save.room@nth=2:sleep=35",
    )
    saving = run / "checkpoints"
    assert soon(lambda: list(saving.glob("ckpt_000_step_*.tmp")) or process.poll() is not None)
    began_at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert time.monotonic() - began_at > 31, "the save was not slow"
    (last,) = saving.glob("ckpt_000_step_*")
    assert verify_checkpoint(last).step in (2, 3)


def write_ends(folder: Path, codes: dict[int, int | str], noted: list[str]) -> None:
    """What a launcher's folder says: this process runs, others have ended or died, and signals."""
    write_status(0, None)
    for rank, code in codes.items():
        status = ProcessStatus(None, os.getpid(), 1) if code == "dead" else ProcessStatus(int(code))
        (folder / f"rank_{rank}").write_bytes(status.record())
    if noted:
        write_signals(folder, noted)


@pytest.mark.parametrize(
    ("name", "noted", "codes", "world", "local", "expected"),
    (
        # Somebody asked the launcher.
        ("SIGTERM", ["SIGTERM"], {}, 2, 2, True),
        # Nobody did: torchrun ends what a failure left.
        ("SIGTERM", [], {}, 2, 2, False),
        ("SIGTERM", [], {1: 1}, 2, 2, False),
        ("SIGTERM", [], {1: 2}, 2, 2, False),
        ("SIGTERM", [], {1: "dead"}, 2, 2, False),
        # A failure first, then a request, or one of a rank that a failure has ended.
        ("SIGTERM", ["SIGTERM"], {1: 1}, 2, 2, False),
        ("SIGTERM", ["SIGTERM"], {1: 2}, 2, 2, False),
        ("SIGTERM", [], {1: 1, 2: 75}, 3, 3, False),
        # Another rank has stopped on request.
        ("SIGTERM", [], {1: 75}, 2, 2, True),
        # On several machines the SIGTERM of scancel looks like that of srun after a failure.
        ("SIGTERM", ["SIGTERM"], {}, 4, 2, False),
        ("SIGTERM", ["SIGUSR1", "SIGTERM"], {}, 4, 2, True),
        # No launcher sends those after a failure.
        ("SIGUSR1", [], {1: 1}, 2, 2, True),
        ("STOP file", [], {}, 2, 2, True),
        ("SIGTERM", [], {}, 1, 1, True),
    ),
)
def test_a_signal_in_a_start_is_a_request_or_a_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    noted: list[str],
    codes: dict[int, int | str],
    world: int,
    local: int,
    expected: bool,
) -> None:
    """Catches a failure that passes for a stop, and a stop that is tried again as a failure."""
    monkeypatch.setattr("k2train.launch.environment.SIGNAL_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    write_ends(tmp_path, codes, noted)
    assert was_asked_to_stop(name) == expected
    # Without our launcher nobody notes anything.
    monkeypatch.delenv("K2TRAIN_VERDICTS")
    assert was_asked_to_stop(name) == (name != "SIGTERM" or world == 1)


def test_a_note_that_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stop of a whole process group that is told as a failure."""
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "2")
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    monkeypatch.setattr("k2train.launch.environment.SIGNAL_SECONDS", HANG_SECONDS)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            write_signals(tmp_path, ["SIGTERM"])

    monkeypatch.setattr("k2train.launch.environment.time.sleep", sleep)
    assert was_asked_to_stop("SIGTERM") and len(looks) == 3


def test_signals_are_noted_before_they_are_handed_on(tmp_path: Path) -> None:
    """Catches a process that asks what its signal means before the launcher has said so."""
    read = (
        "from k2train.launch.status import read_signals\n"
        "while not heard: time.sleep(0.001)\n"
        "noted = read_signals(pathlib.Path(os.environ['K2TRAIN_VERDICTS']))\n"
        "(folder / f'noted_{rank}').write_text(' '.join(sorted(noted)))\n"
        "write_status(rank, 75)\nsys.exit(75)\n"
    )
    process = launch(worker(tmp_path, read), tmp_path)
    pids(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert [(tmp_path / f"noted_{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


ENDS = """
codes = [int(word) for word in sys.argv[2].split(",")]
if rank == 0:
    # Not before the other one runs: it is to be ended by the launcher.
    while not (folder / "pid_1").exists(): time.sleep(0.01)
else:
    while not heard: time.sleep(0.01)
if codes[rank] == -9:
    os.kill(os.getpid(), signal.SIGKILL)
write_status(rank, codes[rank])
sys.exit(codes[rank])
"""
"""Rest of a process of two: rank 0 ends with a code, rank 1 with another, after it was told to."""


@pytest.mark.parametrize(
    ("codes", "expected"),
    (("2,1", 2), ("2,-9", 2), ("130,1", 130), ("1,2", 1), ("-9,2", 1), ("75,2", 2)),
)
def test_the_process_that_ended_first_decides(tmp_path: Path, codes: str, expected: int) -> None:
    """Catches a mistake that ends with 1, and is tried again, because a process that was ended for
    it says 1; and a crash that passes for a mistake for the same reason.
    """
    program = worker(tmp_path, ENDS)
    again = ["--restarts", "3"] if expected != 1 else []
    process = launch(*again, *OPTIONS, program, tmp_path, codes, options=[])
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == expected, text
    assert ("process 0 ended with" in text) == (expected == 1)
    assert "process 1" not in text and "follows in" not in text


DROWSY = """
import sys
from k2train.launch import supervisor
supervisor.Supervisor._watch = lambda self: self._ended.wait()
from k2train.launch.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
"""The launcher on a machine so busy that its supervisor never comes to look by itself."""


@pytest.mark.parametrize(("codes", "expected"), (("-9,2", 1), ("2,-9", 2)))
def test_a_busy_machine_hides_no_order(tmp_path: Path, codes: str, expected: int) -> None:
    """Catches a crash that passes for the mistake which it caused, because nobody had looked."""
    process = launch(worker(tmp_path, ENDS), tmp_path, codes, start=["-c", DROWSY])
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == expected, text


@pytest.mark.parametrize(
    ("ends", "expected"),
    (
        ([], None),
        ([(75, 1.0), (0, 2.0)], None),
        ([(1, 2.0), (2, 1.0), (75, 0.5)], 2),
        ([(2, 2.0), (None, 1.0)], None),
        ([(130, 3.0), (1, 4.0)], 130),
    ),
)
def test_the_first_end(ends: list[tuple[int | None, float]], expected: int | None) -> None:
    """Catches an order of ranks that is taken for an order of time."""
    first = first_end(End(code, at) for code, at in ends)
    assert (None if first is None else first.code) == expected


def test_a_status_says_when_and_why_a_process_ended(tmp_path: Path) -> None:
    """Catches ends whose order nobody can tell, and a signal that loses its name on the way."""
    before = time.monotonic()
    write_file(tmp_path, 0, 2)
    write_file(tmp_path, 1, 75, reason="STOP file")
    statuses = read_statuses(tmp_path)
    assert before - 1e-3 <= statuses[0].ended_at <= statuses[1].ended_at <= time.monotonic() + 1e-3
    assert (statuses[0].reason, statuses[1].reason) == ("", "STOP file")
    assert len(ProcessStatus(75, ended_at=1e15, reason="x" * 99).record()) == 96
    assert ProcessStatus.of(ProcessStatus(75, ended_at=1.5, reason="USR1").record()) == (
        ProcessStatus(75, ended_at=1.5, reason="USR1")
    )


REFUSED = """
import os, pathlib, sys, time
from k2train.train import __main__ as program, run
folder = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1":
    meet = run.start_process_group
    def there(*given):
        (folder / "meets").touch()
        return meet(*given)
    run.start_process_group = there
else:
    while not (folder / "meets").exists():
        time.sleep(0.05)
sys.exit(program.main(sys.argv[2:]))
"""
"""A training of two, in which rank 0 begins when rank 1 waits for it."""


def test_a_refusal_of_one_rank_is_that_of_all(config: Path, tmp_path: Path) -> None:
    """Catches a STOP file, a second job, changed data or a cut ledger that end with 1."""
    (run := tmp_path / "runs" / "run").mkdir(parents=True)
    (run / "STOP").touch()
    (tmp_path / "refused.py").write_text(REFUSED)
    process = launch(
        "--restarts", "2", *OPTIONS, tmp_path / "refused.py", tmp_path, config, options=[]
    )
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2, text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and "STOP" in lines[0], text


SLOW = """
import os, pathlib, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        folder = pathlib.Path(os.environ["SLOW_FOLDER"])
        if name == os.environ["SLOW_MODULE"] and not (folder / "importing").exists():
            (folder / "importing").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)
sys.meta_path.insert(0, Slow())
"""
"""Start-up code of Python that makes the import of one module wait."""


@pytest.mark.parametrize("program", ([ROOT / "tools" / "plan.py"], ["-m", "k2train", "plan"]))
def test_ctrl_c_while_a_tool_imports(tmp_path: Path, program: list[str | Path]) -> None:
    """Catches a traceback out of pydantic for a command that has begun nothing."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    process = cold_start(
        [*program, "--help"],
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        SLOW_FOLDER=str(tmp_path),
        SLOW_MODULE="pydantic",
    )
    STARTED.append(process)
    assert soon((tmp_path / "importing").exists), process.poll()
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, text) == (130, "interrupted\n")


@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM"))
@pytest.mark.parametrize(
    "program", ("k2train.launch", "k2train.train", "k2train launch", "k2train train")
)
def test_a_signal_during_the_imports(tmp_path: Path, program: str, name: str) -> None:
    """Catches a traceback out of somebody's module, and an end without a word."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    launches = program.endswith("launch")
    module = "torch" if launches else "pydantic"
    before = ["--nproc-per-node", "2", "-m", "k2train.train"] if launches else []
    process = cold_start(
        ["-m", *program.split(), *before, "none.yaml"],
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        SLOW_FOLDER=str(tmp_path),
        SLOW_MODULE=module,
    )
    STARTED.append(process)
    assert soon((tmp_path / "importing").exists), process.poll()
    process.send_signal(getattr(signal, name))
    # The kernel delivers it before the process looks at the file.
    (tmp_path / "go").touch()
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, text
    assert text.count("\n") == 1 and name in text and "Traceback" not in text, text


GONE = """
import os, sys
from k2train.errors import DataError
from k2train.train.__main__ import main
from k2train.train.batches import BatchSource
read = BatchSource.step
def step(self, number, *given):
    if number == 3 and os.environ["RANK"] == sys.argv[1]:
        raise DataError("chunk_000.npy is gone")
    return read(self, number, *given)
BatchSource.step = step
sys.exit(main(sys.argv[2:]))
"""
"""A training of two, in which one rank finds in step 3 that a chunk was deleted."""


@pytest.mark.parametrize("rank", (0, 1))
def test_a_mistake_that_one_rank_finds_in_a_step(config: Path, tmp_path: Path, rank: int) -> None:
    """Catches data that are deleted while a run trains, told twice and ended like a crash."""
    (tmp_path / "gone.py").write_text(GONE)
    process = launch("--restarts", "2", *OPTIONS, tmp_path / "gone.py", rank, config, options=[])
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2, text
    told = [line for line in text.splitlines() if "is gone" in line]
    assert told == ["k2train: " + "rank 1: " * rank + "chunk_000.npy is gone"], text
    assert "finishing the step" not in text and "ended with" not in text
    end = read_ledger(tmp_path / "runs" / "run" / "ledger.jsonl")[-1].event
    assert isinstance(end, Stopped)
    assert (end.reason, end.step, end.problem) == ("refused", 3, "chunk_000.npy is gone")


@pytest.mark.parametrize(
    ("name", "noted", "codes", "world", "expected"),
    (
        ("SIGTERM", ["SIGTERM"], {}, 2, True),
        ("SIGTERM", [], {}, 2, None),
        ("SIGTERM", [], {1: "dead"}, 2, False),
        ("SIGTERM", ["SIGTERM"], {1: 1}, 2, False),
        ("SIGTERM", [], {1: 2}, 2, False),
        ("SIGUSR1", [], {1: "dead"}, 2, True),
        ("SIGTERM", [], {}, 1, True),
    ),
)
def test_whether_a_signal_leads_to_a_save(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    noted: list[str],
    codes: dict[int, int | str],
    world: int,
    expected: bool | None,
) -> None:
    """Catches a promise to save after a rank was killed, which the launcher's SIGTERM follows."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    write_ends(tmp_path, codes, noted)
    assert means_to_save(name) is expected
    # Without our launcher nobody notes anything.
    monkeypatch.delenv("K2TRAIN_VERDICTS")
    assert means_to_save(name) is (True if name != "SIGTERM" or world == 1 else None)


STEP_LASTS = """
import os, pathlib, sys, time
from k2train.guard.stop_signals import StopRequest
from k2train.train.__main__ import main
from k2train.train.engine import Engine
folder, steps = pathlib.Path(sys.argv[1]), []
train, handle = Engine.train_step, StopRequest._handle
def heard(self, *given):
    handle(self, *given)
    (folder / f"heard_{os.environ['RANK']}").touch()
StopRequest._handle = heard
def train_step(self, *given):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        (folder / "lasts").touch()
        while True:
            time.sleep(0.05)
    return train(self, *given)
Engine.train_step = train_step
sys.exit(main(sys.argv[2:]))
"""
"""A training of two, in which rank 1 never ends its second step: rank 0 waits in a collective and
hears nothing.
"""


def test_a_second_ctrl_c_ends_all_processes(config: Path, tmp_path: Path) -> None:
    """Catches a person's decision that ends with 1, in several lines, and counts as a failure."""
    (tmp_path / "lasts.py").write_text(STEP_LASTS)
    process = launch(
        "--restarts", "2", *OPTIONS, tmp_path / "lasts.py", tmp_path, config, options=[]
    )
    assert soon((tmp_path / "lasts").exists), process.poll()
    process.send_signal(signal.SIGINT)
    # Two that are heard within two seconds are one press, and a busy machine hears late.
    assert soon((tmp_path / "heard_1").exists), process.poll()
    time.sleep(2.1)
    # Twice, as from a terminal: the copy must not interrupt the end.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, text
    told = [line for line in text.splitlines() if "interrupted" in line or "ended" in line]
    assert len(told) == 1 and told[0].startswith("k2train: interrupted at step 2: ended at"), text
    assert "Traceback" not in text and "died" not in text
    end = read_ledger(tmp_path / "runs" / "run" / "ledger.jsonl")[-1].event
    assert isinstance(end, Stopped) and (end.reason, end.step) == ("interrupted", 2)
