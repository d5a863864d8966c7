"""The fault runner itself: its short set holds, and it fails when the code is broken on purpose."""

import ctypes
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fault_tests import (
    cases_network,
    cases_power,
    disk_state,
    file_damage,
    memory_group,
    ports,
    processes,
    result,
)
from fault_tests.cases import ROWS, run_row
from fault_tests.cases_clock import build_library
from fault_tests.cases_disk import harmed_start
from fault_tests.cases_kill import kills, not_struck, report
from fault_tests.cases_network import ADDRESSES, Cable, Cut
from fault_tests.disk_state import Reference
from fault_tests.endurance import Endurance
from fault_tests.endurance_faults import ENDING, HARMLESS, LATE, LIVED_WITH, Drawn
from fault_tests.forkserver import CLONE_NEWNET
from fault_tests.memory_group import MemoryGroup
from fault_tests.mounted_disk import EXT4_IOC_SHUTDOWN, SYNCED, MountedDisk, cut_power
from fault_tests.processes import ForkServer, Job
from fault_tests.report import page, remember, section
from fault_tests.restarts import GOING_ON, LIMIT_SECONDS, Attempt, Restarts, undisturbed
from fault_tests.result import Bench, Result
from fault_tests.tiny_run import TinyRun, make_tiny_run
from k2train.fault_injection import POINTS, parse
from k2train.record.metrics import StepRecord
from tests.support import forkserver
from tests.support.command_line import HANG_SECONDS, soon

ROOT = Path(__file__).resolve().parents[2]
fault_run: ModuleType = importlib.import_module("fault_run")


def test_every_row_is_there() -> None:
    """Catches a row that falls out of the table. Rows 13 to 16, about spikes, are not here."""
    assert list(ROWS) == [*range(1, 13), *range(17, 31)]
    assert fault_run.rows_named(["1", "3-5", "30"]) == [1, 3, 4, 5, 30]
    with pytest.raises(ValueError, match="no row 14"):
        fault_run.rows_named(["14"])


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"measured": ["x"]}, "held"),
        ({"measured": ["x"], "missing": ["no root"]}, "held in part"),
        ({"missing": ["no root"]}, "not run"),
        ({"measured": ["x"], "problems": ["lost"]}, "NOT HELD"),
        ({"problems": ["lost"], "missing": ["no root"]}, "NOT HELD"),
    ],
)
def test_verdicts(given: dict[str, Any], verdict: str) -> None:
    """Catches a row that did not run, or did not hold, and looks as if it had."""
    assert Result(1, "fault", "target", "how", **given).verdict == verdict


def test_the_page_says_what_did_not_hold(tmp_path: Path) -> None:
    """Catches a page without what failed or was not run, and a cell that breaks the table."""
    bad = Result(7, "disk | full", "target", "how", ["1 of 2"], ["lost\na | b"], ["no root"], 3.0)
    bench = Bench(server=None, scratch=tmp_path)  # type: ignore[arg-type]
    text = page([bad, Result(8, "asked to stop", "75", "signals", ["all"])], bench, 5.0)
    rows = [line for line in text.splitlines() if line.startswith(("| 7 ", "| 8 "))]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [6, 6]
    assert "**NOT HELD**" in rows[0] and "**held**" in rows[1]
    lines = section(bad)
    assert (
        "- **Not held:** lost a | b" in lines
        and "- Not run: no root" in lines
        and "- 1 of 2" in lines
    )


def test_a_record_outlives_a_run_of_the_tool_that_was_killed(tmp_path: Path) -> None:
    """Catches half a line of a killed run that makes the rows before or after it unreadable."""
    record, bench = tmp_path / "record", Bench(server=None, scratch=tmp_path)  # type: ignore[arg-type]
    for number in (2, 1, 2):
        told = remember(record, Result(number, "fault", "target", "how", ["x"]), bench)
    assert [result.row for result in told] == [1, 2] and told[0].seen
    record.write_text(record.read_text() + '{"row": 30, "fau')
    told = remember(record, Result(3, "fault", "target", "how", [], ["lost"]), bench)
    assert [result.row for result in told] == [1, 2, 3] and told[2].verdict == "NOT HELD"

    # Another seed does not cover what did not hold.
    other = Bench(server=None, scratch=tmp_path, seed=2)  # type: ignore[arg-type]
    told = remember(record, Result(3, "fault", "target", "how", ["x"]), other)
    assert [(result.row, result.seed) for result in told[2:]] == [(3, 1), (3, 2)]
    assert [result.verdict for result in told[2:]] == ["NOT HELD", "held"]


def test_rows_end_early_and_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a row that was cut short and looks as if all of it had run."""
    bench = Bench(server=None, scratch=tmp_path)  # type: ignore[arg-type]
    assert not bench.time_is_up
    fault_run.end_early(bench, signal.SIGTERM, None)
    assert bench.time_is_up
    with pytest.raises(SystemExit, match="143"):
        fault_run.end_early(bench, signal.SIGTERM, None)

    made = Restarts(None, NO_RUN[0], "none", NO_RUN[1])  # type: ignore[arg-type]
    monkeypatch.setattr(Bench, "restarts", lambda *_: made)
    monkeypatch.setattr(Restarts, "finish", lambda _: None)
    told = Result(2, "fault", "target", "how")
    report(told, result.chain(bench, NO_RUN[0], "row", ["a:kill"]), ["a:kill"])
    assert told.missing == ["1 of 1 places were not reached: a:kill"]


def test_a_row_that_breaks_did_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(bench: Bench) -> Result:
        raise RuntimeError("no server")

    monkeypatch.setitem(ROWS, 9, broken)
    told = run_row(Bench(server=None, scratch=tmp_path), 9)  # type: ignore[arg-type]
    assert told.verdict == "NOT HELD" and "no server" in told.problems[0]


def test_kills_cover_every_point_and_are_understood() -> None:
    """Catches a list of faults that the code would not take, and a point that no kill reaches."""
    texts = kills(list(POINTS), 2, (1, 2))
    parsed = [parse(text)[0] for text in texts]
    assert {fault.point for fault in parsed} == set(POINTS) and {
        fault.action for fault in parsed
    } == {"kill"}
    assert {fault.rank for fault in parsed if fault.point == "save.hashed"} == {0, 1}


NO_RUN = TinyRun(Path("unused"), 1, 1), Reference({}, {}, "", 0.1)


def made_attempt(faults: str, codes: list[int]) -> Attempt:
    job = Job(
        [1] * len(codes),
        0,
        Path("unused"),
        0.0,
        {rank: (code, 1.0) for rank, code in enumerate(codes)},
    )
    return Attempt(faults, job, "", 0, 0)


def test_a_fault_that_struck_nobody_is_told() -> None:
    """Catches a table that counts kills which never came."""
    attempts = [
        made_attempt("a:kill", [0, 0]),
        made_attempt("b:kill", [1, -9]),
        made_attempt("c:kill", [0, 0]),
    ]
    attempts.append(made_attempt("c:kill", [-9, 1]))
    assert not_struck(attempts, ["a:kill", "b:kill", "c:kill", "d:kill"]) == ["a:kill", "d:kill"]


def test_a_fault_counts_when_it_was_seen_to_strike() -> None:
    """Catches an endurance run that counts what it armed."""
    armed = Drawn("gradient@rank=1@step=4:nan;save.model@rank=0@nth=1:error=EIO")
    assert armed.struck({"save.model:error"}) and not armed.struck(
        {"save.model:kill", "gradient:inf"}
    )
    assert Drawn(done=True).struck(set()) and not Drawn().struck({"step.read:kill"})
    assert Drawn(mark="read:ESTALE").struck({"read:ESTALE"})
    assert not Drawn(mark="read:ESTALE").struck({"read:kill"})
    assert set(LATE) <= set(ENDING) and set(HARMLESS) <= set(LIVED_WITH)


def test_a_stopped_rank_may_be_left_to_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches an alarm of the runner itself: nobody is left to end a stopped rank when the others
    are dead. A rank that is not stopped must end by itself.
    """
    (tmp_path / "trace").write_text("1 0 start.agreed\n1 1 start.agreed\n2 1 !step.read:stop\n")
    monkeypatch.setattr(Restarts, "_look", lambda *_: [])
    for late, told in (([1], 0), ([0], 1), ([0, 1], 1)):
        job = Job([1, 2], 0, tmp_path, 0.0, {0: (-9, 2.0), 1: (-9, 3.0)}, late)
        server = SimpleNamespace(
            begin=lambda *_, job=job: job,
            wait_as_launcher=lambda *_: "had to be killed",
        )
        restarts = Restarts(server, NO_RUN[0], "stopped", NO_RUN[1])  # type: ignore[arg-type]
        restarts.attempt("step.read@rank=1:stop")
        assert len(restarts.problems) == told, restarts.problems


def test_promises_are_those_of_an_idle_machine(tmp_path: Path) -> None:
    """Catches a verdict that a busy machine decides, and a limit that an idle one does not keep."""
    attempts = []
    for number, seconds in enumerate((0.3, 4.0, 4.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "trace").write_text(f"{10 + seconds} 0 step.done\n")
        job = Job([1], 0, folder, 10.0)
        attempts.append(Attempt("a:kill", job, "", 0, 0))
    assert result.allowed_seconds(5.0, attempts[:1]) == result.allowed_seconds(5.0, []) == 5.0
    assert result.allowed_seconds(5.0, attempts) == pytest.approx(20.0)


def test_points_and_strikes_are_told_apart(tmp_path: Path) -> None:
    """Catches a strike taken for a visit, and half a line of a rank killed while it wrote."""
    (tmp_path / "trace").write_text("1.0 0 step.read\n1.1 1 !step.read:kill\n1.2 0 st")
    job = Job([1], 0, tmp_path, 0.0)
    assert job.points()[:1] == [(1.0, 0, "step.read")] and job.strikes() == [
        (1.1, 1, "step.read:kill")
    ]


def test_list_names_every_row_and_point(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a list from which a row or a point has fallen out."""
    assert fault_run.main(["--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {int(line.split()[0]) for line in told if line[:4].strip().isdigit()} == set(ROWS)
    assert set(POINTS) <= {line.strip() for line in told}


def test_of_two_exchanged_files_either_may_be_named() -> None:
    """Catches an alarm of the runner itself, and a message that names neither."""

    def named(text: str) -> str:
        attempt = SimpleNamespace(text=f"refused: ckpt_003: {text}")
        restarts = SimpleNamespace(expect_fewer=lambda: None, attempt=lambda: attempt)
        shard = Path("ckpt_003/model/shard_a")
        return harmed_start(restarts, shard, "exchanged with shard_b")  # type: ignore[arg-type]

    assert named("model/shard_a is damaged") == named("model/shard_b is damaged") == ""
    assert "not named" in named("model/shard_c is damaged")


@pytest.mark.parametrize("kind", sorted(file_damage.KINDS))
def test_damage_changes_the_folder(kind: str, tmp_path: Path) -> None:
    """Catches harm that harms nothing, which every check would survive."""
    for name, content in (("a", b"one" * 40), ("b", b"two" * 40)):
        (tmp_path / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    file_damage.KINDS[kind](tmp_path / "a", random.Random(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before


def row(step: int, attempt: int = 1, **changes: Any) -> str:
    start = (step - 1) % 2 * 4
    facts = {
        "step": step,
        "attempt": attempt,
        "chunk": f"chunk_{(step - 1) // 2:03d}",
        "rows": [start, start + 4],
    }
    facts |= {"loss": 1.0 / step, "grad_norm": 1.0, "lr": 0.1, "applied": True, "seconds": 0.1}
    return json.dumps({**facts, **changes}) + "\n"


def reference(steps: int) -> Reference:
    records = [StepRecord.of(json.loads(row(step))) for step in range(1, steps + 1)]
    rows = {record.step: disk_state.values_of(record) for record in records}
    return Reference({}, rows, "ckpt_002", 0.1)


def test_a_step_that_differs_is_told(tmp_path: Path) -> None:
    """Catches a comparison that looks at the last attempt alone, or not at all."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(row(step) for step in range(1, 5)))
    assert disk_state.row_problems(tmp_path, reference(4), done=True) == []
    metrics.write_text(row(1) + row(2, loss=0.5000001) + row(2, 2) + row(3, 2))
    told = disk_state.row_problems(tmp_path, reference(4), done=True)
    assert (
        "step 2 of attempt 1 differs" in told[0]
        and "1 steps have no row, the first is 4" in told[1]
    )


@pytest.mark.parametrize("change", ["twice", "left out", "another chunk"])
def test_samples_are_counted(change: str, tmp_path: Path) -> None:
    """Catches a row of a chunk that is read twice or never."""
    world, metrics = TinyRun(tmp_path, 2, 2), tmp_path / "metrics.jsonl"
    metrics.write_text("".join(row(step) for step in range(1, 5)))
    assert disk_state.sample_problems(tmp_path, world) == []
    changes: dict[str, dict[str, Any]] = {
        "twice": {"rows": [0, 4]},
        "left out": {"rows": [4, 7]},
        "another chunk": {"chunk": "chunk_000"},
    }
    changed = changes[change]
    metrics.write_text("".join(row(step, **(changed if step == 4 else {})) for step in range(1, 5)))
    assert disk_state.sample_problems(tmp_path, world) != []


def test_a_held_port_is_for_one_program_only() -> None:
    """Catches a port that somebody else gets before the ranks meet there."""
    with ports.held_port() as held, socket.socket() as stranger, socket.socket() as meant:
        place = "127.0.0.1", ports.port_of(held)
        with pytest.raises(OSError, match="in use"):
            stranger.bind(place)
        meant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meant.bind(place)
        meant.listen()
        with socket.create_connection(place):
            meant.accept()[0].close()


WAITS_IF_SECOND = """
import os, pathlib, sys, time
while os.environ["RANK"] == "1" and not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""


def test_the_port_of_a_job_is_held_until_its_last_rank_has_ended(tmp_path: Path) -> None:
    """Catches ranks that find another program where they are to meet."""
    (script := tmp_path / "waits.py").write_text(WAITS_IF_SECOND)
    go_on, warm = tmp_path / "go_on", forkserver.server()
    job = warm.start([[script, go_on]] * 2, os.environ, launched=True)
    try:
        assert soon(lambda: warm.poll() or 0 in job.ends)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", job.port))
        go_on.touch()
        assert warm.wait(job, HANG_SECONDS) and job.codes == [0, 0]
        assert job.held is not None and job.held.fileno() < 0, "a descriptor is left for each job"
    finally:
        warm.end(job)


def test_a_process_left_behind_is_found() -> None:
    """Catches an orphan: alive in the group of the job, and no rank that is known."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3600)"], process_group=0
    )
    try:
        assert [pid for pid, _ in processes.processes_of(child.pid, -1, set())] == [child.pid]
        assert processes.processes_of(child.pid, -1, {child.pid}) == []
    finally:
        child.kill()
        child.wait()
    assert processes.processes_of(child.pid, -1, set()) == []


def test_names_of_ranks() -> None:
    """Catches a message taken for one that names the rank."""
    assert result.names_rank("k2train: rank 1 (pid 5 on n) died at step 7, forward\n", 1)
    assert not result.names_rank("k2train: rank 11 died at step 7", 1)
    assert not result.names_rank("rank 1 goes on\nrank 0 died", 1)


def skip_unless_possible(problem: str) -> None:
    """Skip with the reason that the table itself would print."""
    if problem:
        pytest.skip(problem)


def test_the_number_of_the_shutdown_ioctl() -> None:
    """By hand: read (2) in bits 30-31, size 4 in bits 16-29, 'X' (0x58), 125 (0x7d)."""
    assert EXT4_IOC_SHUTDOWN == 0x8004_587D


def test_a_power_cut_drops_what_was_not_synced(tmp_path: Path) -> None:
    """Catches a cut that cuts nothing, after which every program would look safe.

    A synced file survives, other files do not, and writes fail until the next mount.
    """
    with MountedDisk(tmp_path / "disk", megabytes=16) as disk:
        skip_unless_possible(disk.problem)
        (disk.folder / "late").write_bytes(b"lost" * 1000)
        cut_power(disk.folder)
        with pytest.raises(OSError, match="error"):
            (disk.folder / "later").write_bytes(b"refused")

        disk.remount()
        assert disk.control_problem() == ""
        assert not (disk.folder / "late").exists() or not (disk.folder / "late").stat().st_size

        # A cut that loses a synced file, and one that loses nothing, are no power cuts.
        (disk.folder / SYNCED).write_bytes(b"")
        assert "lost a synced file" in disk.control_problem()
        disk.remount()
        (disk.folder / "control_unsynced").write_bytes((disk.folder / SYNCED).read_bytes())
        disk.remount()
        assert "lost nothing" in disk.control_problem()
    assert not any("disk" in line for line in mounts_below(tmp_path))


def mounts_below(folder: Path) -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]


def test_a_cut_is_made_at_every_point_of_a_save() -> None:
    """Catches a new point of a save at which no power is cut."""
    wanted = {point for point in POINTS if point.startswith(("save.", "retire."))}
    assert set(cases_power.power_points()) == wanted | {"ledger.append"}


CGROUPS = "0::/\n4:memory:/job\n5:cpu,cpuacct:/other\n"


@pytest.mark.parametrize(
    ("kind", "limit"), [("v1", "memory.limit_in_bytes"), ("v2", "memory.max"), ("none", "")]
)
def test_the_memory_controller_is_found(kind: str, limit: str, tmp_path: Path) -> None:
    """Catches a group made where it limits nothing: another controller's, or not below this
    process' own.
    """
    (tmp_path / "memory" / "job").mkdir(parents=True)
    lines = [f"cgroup {tmp_path}/cpu cgroup rw,cpu 0 0"]
    if kind == "v1":
        lines.append(f"cgroup {tmp_path}/memory cgroup rw,memory 0 0")
    if kind == "v2":
        (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
        lines.append(f"cgroup2 {tmp_path} cgroup2 rw 0 0")
    found = memory_group.find_interface("\n".join(lines), CGROUPS)
    assert (found.limit if found else "") == limit
    if kind == "v1":
        assert found is not None and found.parent == tmp_path / "memory" / "job"


def test_the_kernel_kills_the_chosen_process_of_a_full_group() -> None:
    """Catches a group without a limit, and one that outlives the test with its processes."""
    sleeps = [sys.executable, "-c", "import time; time.sleep(3600)"]
    victim, other = (subprocess.Popen(sleeps) for _ in range(2))
    try:
        with MemoryGroup(f"k2train_test_{os.getpid()}") as group:
            skip_unless_possible(group.problem)
            group.add([victim.pid, other.pid], victim.pid)
            group.start_hog()
            group.fill(room=4 << 20)
            assert victim.wait(HANG_SECONDS) == -signal.SIGKILL
            assert other.poll() is None and group.kills == 1
        assert not group.folder.exists()
        assert other.wait(HANG_SECONDS) == -signal.SIGKILL
    finally:
        for process in (victim, other):
            process.kill()
            process.wait()


def socket_in(namespace: str, address: str) -> socket.socket:
    """A socket in a network namespace: a thread may enter one alone."""
    made: list[socket.socket] = []

    def enter() -> None:
        with open(f"/run/netns/{namespace}") as opened:
            assert ctypes.CDLL(None).setns(opened.fileno(), CLONE_NEWNET) == 0
        made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made[0].bind((address, 5000))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    made[0].settimeout(1)
    return made[0]


def arrives(sender: socket.socket, receiver: socket.socket) -> bool:
    """True when one packet of several does: the first may only ask for the way.

    Each has a number of its own: an earlier one may come late.
    """
    for number in range(3):
        sent = f"{time.monotonic()} {number}".encode()
        with suppress(OSError):
            sender.sendto(sent, receiver.getsockname())
            while (received := receiver.recv(100)) != sent:
                assert received
            return True
    return False


def test_a_cut_of_one_direction_leaves_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a cut that cuts nothing, or both directions, or that is not mended."""
    monkeypatch.setattr(cases_network, "BURST_SECONDS", 0.01)
    job = Job([1, 2], 0, tmp_path, 0.0)
    with Cable() as cable:
        skip_unless_possible(cable.problem)
        a, b = (
            socket_in(name, address) for name, address in zip(cable.names, ADDRESSES, strict=True)
        )
        with a, b:
            assert arrives(a, b) and arrives(b, a)
            for sides, seen in (((), [False, False]), ((0,), [False, True]), ((1,), [True, False])):
                cable.cut(Cut("one way", None, 10, sides), None, job)  # type: ignore[arg-type]
                assert [arrives(a, b), arrives(b, a)] == seen
                cable.restore()
                assert arrives(a, b) and arrives(b, a)
    assert not Path(f"/run/netns/{cable.names[0]}").exists()


def test_c_code_sees_the_clock_jump(tmp_path: Path) -> None:
    """Catches a library that moves nothing, or the monotonic clock as well."""
    library, problem = build_library(tmp_path)
    skip_unless_possible(problem)
    program = (
        "import time\nseen = set()\nbegan = time.monotonic()\n"
        # Right, an hour ahead and an hour behind, however seldom it may look on a busy machine.
        "while len(seen) < 3 and time.monotonic() - began < 50:\n"
        "    seen.add(round((time.time() - time.monotonic()) / 3600))\n    time.sleep(0.01)\n"
        "print(max(seen) - min(seen), time.monotonic() - began < 60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2", "True"]


# What follows starts real processes.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def judged(
    server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyRun, Reference]:
    world = make_tiny_run(tmp_path_factory.mktemp("faults") / "world", 6, 2)
    return world, undisturbed(server, world)


def test_a_kill_is_survived_and_leaves_nothing(
    server: ForkServer, judged: tuple[TinyRun, Reference]
) -> None:
    """Catches a runner whose faults do not reach the ranks, or whose checks fail a sound run."""
    restarts = Restarts(server, *judged_as(judged, "sound"))
    assert restarts.attempt("save.hashed@rank=1@nth=3:kill").codes[1] == -signal.SIGKILL
    assert restarts.attempt("step.forward@rank=0@nth=3:kill").codes[0] == -signal.SIGKILL
    # A disk that stays full ends a run after its patience; a run that is asked to end saves first.
    full = "save.optimizer@rank=1@nth=2:error=ENOSPC"
    assert restarts.attempt(
        full, None, GOING_ON, LIMIT_SECONDS, "checkpoint.retry_seconds=0"
    ).codes == [1, 1]
    assert restarts.attempt("step.done@rank=0@nth=2:term").codes == [75, 75]
    restarts.finish()
    assert restarts.problems == []
    assert [name for _, _, name in restarts.attempts[0].job.points() if name.startswith("save.")]


def judged_as(judged: tuple[TinyRun, Reference], name: str) -> tuple[TinyRun, str, Reference]:
    return judged[0], name, judged[1]


@pytest.mark.parametrize(
    ("patch", "fault", "told"),
    [
        ("writes_in_place", "save.hashed@rank=0@nth=3:kill", "not whole"),
        ("forgets_an_item", "step.read@rank=0@nth=5:kill", "differs"),
        ("keeps_none", "save.begin@rank=0@nth=4:kill", "complete verified checkpoints"),
    ],
)
def test_the_runner_finds_broken_code(
    patch: str, fault: str, told: str, server: ForkServer, judged: tuple[TinyRun, Reference]
) -> None:
    """Catches a runner that cannot fail: each patch is a change that somebody could make.

    The run's own resume drill is off: it would stop a bad restart before the runner compares.
    """
    world, name, reference = judged_as(judged, patch)
    restarts = Restarts(
        server,
        world.changed(("audit.resume_drill", "off")),
        name,
        reference,
        environments=[{"FAULT_RUN_PATCH": f"code_patches:{patch}"}] * 2,
    )
    restarts.attempt(fault, limit=60)
    restarts.attempt("", None, (1, 2, 75, -9), 60)
    assert [problem for problem in restarts.problems if told in problem], restarts.problems


def test_points_that_are_imported_by_name_are_traced(
    server: ForkServer, judged: tuple[TinyRun, Reference]
) -> None:
    """Catches a trace without the ledger's point, at which no random fault would then strike."""
    world, name, _ = judged_as(judged, "traced")
    job = server.begin(world.arguments(name), 2, "ledger.append@nth=2:kill")
    server.wait_as_launcher(job, 60, 15)
    assert [name for _, rank, name in job.points() if name == "ledger.append"] == [
        "ledger.append"
    ] * 2


@pytest.mark.parametrize("patch", ["power_cut", "never_syncs"])
def test_a_power_cut_shows_a_missing_sync(
    patch: str, server: ForkServer, judged: tuple[TinyRun, Reference], tmp_path: Path
) -> None:
    """Catches a judge that asks for nothing: without any fsync the run is lost; else it is not."""
    with MountedDisk(tmp_path / "disk") as disk:
        skip_unless_possible(disk.problem)
        world, reference = cases_power.world_on(disk, judged[0]), judged[1]
        environments = [{"FAULT_RUN_PATCH": f"code_patches:{patch}"}] * 2
        restarts = Restarts(server, world, "cut", reference, environments=environments)
        run = cases_power.PowerRun(restarts, disk)
        assert run.attempt(cases_power.PointCut(server, disk, "save.committed", 2))
        assert run.events >= 3 and run.saved == ["ckpt_000", "ckpt_001"]
        if patch == "power_cut":
            run.finish()
            assert restarts.problems == []
        else:
            assert any("was saved and is gone" in problem for problem in restarts.problems)
            assert any("what was acknowledged" in problem for problem in restarts.problems)


def test_rows_are_durable_before_their_checkpoint(
    server: ForkServer, judged: tuple[TinyRun, Reference], tmp_path: Path
) -> None:
    """Catches rows that a power cut takes although a durable checkpoint follows them: no later
    start takes these steps again.
    """
    with MountedDisk(tmp_path / "disk") as disk:
        skip_unless_possible(disk.problem)
        environments = [{"FAULT_RUN_PATCH": "code_patches:power_cut"}] * 2
        world = cases_power.world_on(disk, judged[0])
        restarts = Restarts(server, world, "rows", judged[1], environments=environments)
        run = cases_power.PowerRun(restarts, disk)
        # The event of a save is durable on the disk here, and nothing that follows it.
        assert run.attempt(cases_power.PointCut(server, disk, "ledger.append", 7))
        run.finish()
        assert restarts.problems == []


def test_a_hang_is_ended_and_told(server: ForkServer, judged: tuple[TinyRun, Reference]) -> None:
    """Catches a runner that waits for ever, or that takes a rank it killed for one that ended."""
    world, name, _ = judged_as(judged, "hangs")
    job = server.begin(
        world.arguments(name, "watch.heartbeat_seconds=0"), 2, "step.forward@rank=1@nth=2:stop"
    )
    began = time.monotonic()
    assert server.wait_as_launcher(job, 6, 2) != ""
    assert time.monotonic() - began < HANG_SECONDS and job.over and server.left_behind(job) == []


def test_endurance_is_the_same_for_the_same_seed(server: ForkServer, tmp_path: Path) -> None:
    """Catches a draw that depends on the time, so that a failure could not be run again."""
    drawn = []
    for name in ("a", "b"):
        run = Endurance(Bench(server, tmp_path / name, seed=4, endurance=4), 4)
        drawn.append([[(kind, one.text) for kind, one in run.next_faults()] for _ in range(12)])
    assert drawn[0] == drawn[1] and len({kind for faults in drawn[0] for kind, _ in faults}) > 6


@pytest.mark.slow
def test_the_short_set_holds(tmp_path: Path) -> None:
    """Catches what no test of one module sees.

    A run under kills, a full disk, signals and damage that does not end as an undisturbed one.
    """
    page_file = tmp_path / "faults.md"
    command = [
        sys.executable,
        str(ROOT / "tools/fault_run.py"),
        "--short",
        "--page",
        str(page_file),
    ]
    command += ["--kills", "2", "--endurance", "6"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "NOT HELD" not in page_file.read_text()
