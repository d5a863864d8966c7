"""Hangs and deaths of real processes: who is named, how soon, and that nothing is left; and the watch's parts with made-up clocks."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2train.watchdog.failure_report import kill_processes, publish_report, read_report, report_id
from k2train.watchdog.hang_analysis import find_faulty_ranks
from k2train.watchdog.heartbeat import (
    LENGTH_BYTES,
    Heartbeat,
    Observer,
    Process,
    RankStatus,
    decode,
    encode,
    heartbeat_path,
    process_state,
    read_heartbeat,
    this_process,
    write_heartbeat,
)
from k2train.watchdog.phase_timer import PhaseTimer
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog
from tests.support.watched_jobs import Job

ELSEWHERE = Process(1, 1, "another boot", "pid:[1]", "n2")


def record(rank: int, **changes: Any) -> Heartbeat:
    made = Heartbeat(
        rank, 4, this_process(), 1, "step", 41, 12.0, 1234, "all-reduce tp", "all-reduce tp"
    )
    return replace(made, **changes)


def seen(**changes: Any) -> RankStatus:
    given = {"silent_seconds": 0.1, "process": "running", "moving": False} | changes
    return RankStatus(given.pop("record"), **given)


# -- real processes

LIMIT = 4.0
NAMES = {
    "stop": "is stopped (SIGSTOP)",
    "hold": "gives no sign of life for",
    "loop": "is stuck",
    "sleep": "is stuck",
}


@pytest.mark.parametrize(
    "fault",
    ["stop", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hold", "loop", "sleep"))],
)
def test_a_rank_that_hangs_is_named_with_its_stacks_and_no_process_is_left(
    tmp_path: Path, fault: str
) -> None:
    with Job(tmp_path, 3, LIMIT, (fault, 1, 25)) as job:
        pid = job.processes[1].pid
        ended = job.ended()
    assert len(ended.lines) == 1, ended.errors
    line = ended.lines[0]
    assert line.startswith(f"rank 1 (pid {pid} on host {os.uname().nodename}) {NAMES[fault]}"), line
    assert re.search(r": step 25, forward/backward, for \d+ s; last collective 49", line), line
    stacks = tmp_path / "watch/stacks_rank_00001.txt"
    assert line.endswith(f"stacks in {stacks}")
    assert "watched.py" in stacks.read_text() and " in do" in stacks.read_text()
    assert 0 not in ended.codes
    assert ended.seconds < max(10.0, 2 * LIMIT)
    verdict = json.loads((tmp_path / "watch/verdict.json").read_text())
    assert (verdict["line"], verdict["suspects"][0]["rank"]) == (line, 1)


@pytest.mark.slow
def test_a_stopped_rank_is_found_wherever_the_others_wait(tmp_path: Path) -> None:
    """A save may take half an hour, and so may the limit of where the others are: nobody is at work who is stopped."""
    with Job(tmp_path, 2, 1800.0, ("stop", 1, 25)) as job:
        ended = job.ended()
    assert (
        len(ended.lines) == 1
        and "rank 1" in ended.lines[0]
        and "is stopped (SIGSTOP)" in ended.lines[0]
    ), ended.errors
    assert 0 not in ended.codes and ended.seconds < 30


@pytest.mark.parametrize(
    "where", ["in a collective", pytest.param("outside", marks=pytest.mark.slow)]
)
def test_ranks_are_gone_5_seconds_after_one_was_killed(tmp_path: Path, where: str) -> None:
    fault = ("kill", 2, 25) if where == "outside" else ()
    with Job(tmp_path, 3, 60.0, fault, WATCHED_WORK="0.05") as job:
        job.until_step(24)
        if where == "in a collective":
            job.send(signal.SIGKILL, 2)
        pid = job.processes[2].pid
        ended = job.ended()
    assert len(ended.lines) == 1, ended.errors
    told = re.fullmatch(
        rf"rank 2 \(pid {pid} on host \S+\) died at step (\d+), forward/backward; (in|last) collective (\d+).*",
        ended.lines[0],
    )
    assert told, ended.lines
    # Not where it was at its last heartbeat: where it was.
    assert int(told[1]) == 25 if where == "outside" else int(told[1]) - job.step(2) in (0, 1)
    assert int(told[3]) in (2 * int(told[1]) - 2, 2 * int(told[1]) - 1, 2 * int(told[1]))
    assert ended.codes == [1, 1, -9]
    assert ended.seconds < 5.0


def wait_for_phase(directory: Path, world: int, phase: str) -> None:
    """Return when the heartbeats of all ranks say that they are in a phase."""
    until = time.monotonic() + 120
    while any(
        (one := read_heartbeat(directory, rank)) is None or one.phase != phase
        for rank in range(world)
    ):
        assert time.monotonic() < until, f"not all ranks came to {phase}"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_death_is_seen_by_ranks_that_are_in_no_collective(tmp_path: Path) -> None:
    with Job(tmp_path, 2, 200.0, ("kill", 1, 3), WATCHED_WORK="60", WATCHED_STEPS="3") as job:
        wait_for_phase(tmp_path / "watch", 2, "step")
        time.sleep(2)
        job.send(signal.SIGKILL, 1)
        began = time.monotonic()
        ended = job.ended()
    assert time.monotonic() - began < 5.0
    assert ended.codes == [1, -9]
    assert " died at step 1, forward/backward" in ended.lines[0]


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_its_error(tmp_path: Path) -> None:
    with Job(tmp_path, 3, 60.0, ("raise", 0, 25)) as job:
        ended = job.ended()
    # Slow at writing its message, it is ended by the others.
    assert ended.codes[0] in (1, -signal.SIGKILL) and ended.codes[1:] == [1, 1]
    assert len(ended.lines) == 1, ended.errors
    assert ended.lines[0].endswith("failed at step 25, forward/backward: ValueError: made up")
    assert "Traceback" in ended.errors[0]
    assert ended.seconds < 10.0


@pytest.mark.slow
def test_a_job_whose_ranks_are_all_stopped_for_a_while_goes_on_though_clocks_jump(
    tmp_path: Path,
) -> None:
    with Job(
        tmp_path, 2, LIMIT, WATCHED_CLOCK_JUMP="3600", WATCHED_WORK="0.1", WATCHED_STEPS="60"
    ) as job:
        job.until_step(10)
        job.send(signal.SIGSTOP, 0, 1)
        time.sleep(2 * LIMIT)
        job.send(signal.SIGCONT, 0, 1)
        ended = job.ended()
    assert ended.codes == [0, 0], ended.errors
    assert ended.lines == []


@pytest.mark.slow
def test_a_world_of_one_ends_itself(tmp_path: Path) -> None:
    with Job(tmp_path, 1, LIMIT, ("sleep", 0, 25)) as job:
        ended = job.ended()
    assert ended.codes == [1]
    assert " is stuck: step 25, forward/backward" in ended.lines[0]
    assert " in do" in (tmp_path / "watch/stacks_rank_00000.txt").read_text()
    assert ended.seconds < 10.0


# -- two machines, as far as the network goes


class Network:
    """Two network namespaces joined by a bridge in a third, whose cable can be pulled."""

    def __init__(self) -> None:
        self.names = [f"k2w{os.getpid()}{end}" for end in "abm"]

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def __enter__(self) -> "Network":
        first, second, middle = self.names
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip("-n", middle, "link", "add", "br0", "type", "bridge")
        self._ip("-n", middle, "link", "set", "br0", "up")
        for number, name in enumerate((first, second)):
            self._ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                f"port{number}",
                "netns",
                middle,
            )
            self._ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", name, "link", "set", device, "up")
            self._ip("-n", middle, "link", "set", f"port{number}", "master", "br0", "up")
        return self

    def cable(self, state: str) -> None:
        """`down` or `up`."""
        self._ip("-n", self.names[2], "link", "set", "port1", state)

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def network() -> Any:
    made = Network()
    try:
        made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        made.__exit__()
        pytest.skip(f"no network namespaces here (needs root and ip netns): {error}")
    yield made
    made.__exit__()


def two_hosts(network: Network) -> list[list[str]]:
    return [["ip", "netns", "exec", name] for name in network.names[:2]]


@pytest.mark.slow
def test_a_partition_for_good_ends_the_run_in_time(tmp_path: Path, network: Network) -> None:
    with Job(tmp_path, 2, 10.0, prefixes=two_hosts(network), GLOO_SOCKET_IFNAME="eth0") as job:
        job.until_step(20)
        network.cable("down")
        ended = job.ended()
    assert ended.codes == [1, 1]
    assert len(ended.lines) == 1, ended.errors
    assert re.search(
        r"rank [01] .*: step \d+, forward/backward, for 10 s; in collective \d+ all-",
        ended.lines[0],
    )
    assert ended.seconds < 20.0


@pytest.mark.slow
def test_a_flap_of_30_seconds_within_the_limit_is_survived(
    tmp_path: Path, network: Network
) -> None:
    steps = {"WATCHED_STEPS": "150", "WATCHED_WORK": "0.1", "GLOO_SOCKET_IFNAME": "eth0"}
    with Job(tmp_path, 2, 120.0, prefixes=two_hosts(network), **steps) as job:
        job.until_step(20)
        network.cable("down")
        time.sleep(30)
        network.cable("up")
        ended = job.ended(180)
    assert ended.codes == [0, 0], ended.errors


# -- parts


def test_a_clock_runs_through_the_phases_of_a_step_and_begins_again_with_the_next() -> None:
    now = [0.0]
    clocks = PhaseTimer(Timeouts(step_seconds=10.0, evaluate_seconds=50.0), lambda: now[0])
    clocks.enter("read", 1)
    now[0] = 6.0
    clocks.enter("step", 1)
    now[0] = 11.0
    assert clocks.overrun() == pytest.approx(1.0)
    clocks.enter("evaluate", 1)
    now[0] = 60.0
    assert clocks.overrun() == pytest.approx(-1.0)
    clocks.enter("read", 2)
    assert clocks.overrun() == -10.0


def test_time_in_which_nothing_ran_is_given_back_to_the_place_it_was_lost_at() -> None:
    now = [0.0]
    clocks = PhaseTimer(Timeouts(step_seconds=10.0, save_seconds=20.0), lambda: now[0])
    clocks.enter("step", 1)
    clocks.saving(True)
    now[0] = 3600.0
    clocks.exclude_pause(3599.0)
    assert clocks.overrun() == pytest.approx(-9.0)
    now[0] = 3615.0
    assert clocks.overrun() == pytest.approx(6.0)
    clocks.enter("step", 2)
    assert clocks.overrun() == pytest.approx(-4.0), "the save of 16 s is the closest to its limit"
    now[0] = 3622.0
    clocks.enter("step", 3)
    assert clocks.overrun() == pytest.approx(3.0), "steps go on, and the save is over its limit"
    clocks.saving(False)
    assert clocks.overrun() == -10.0


def steps_with_a_pause(clocks: PhaseTimer, now: list[float], noticed: bool) -> None:
    """Twenty steps of 1 s, in one of which nothing ran for an hour; the watch ticks."""
    for step in range(1, 21):
        clocks.enter("step", step)
        began = now[0]
        for _ in range(4):
            now[0] += 0.25
            clocks.tick()
        if step == 7:
            now[0] += 3600.0
            if noticed:
                assert clocks.tick()
        clocks.step_done(now[0] - began)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_step_is_not_measured_by_a_pause_of_the_whole_process(noticed: bool) -> None:
    """Neither where the watch saw the pause before the step ended, nor where the step was quicker."""
    now = [0.0]
    clocks = PhaseTimer(Timeouts(), lambda: now[0])
    clocks.tick()
    steps_with_a_pause(clocks, now, noticed)
    assert clocks.limit() <= 30.0
    clocks.enter("step", 21)
    now[0] += 0.25
    clocks.tick()
    # A pause that is seen one place later is not that one's time.
    assert clocks.elapsed() == pytest.approx(0.25)


def test_each_phase_of_a_start_has_its_own_clock_which_progress_begins_again() -> None:
    now = [0.0]
    clocks = PhaseTimer(Timeouts(start_seconds=600.0), lambda: now[0])
    for phase in ("choose", "start", "load", "start"):
        now[0] += 500.0
        clocks.enter(phase, 0)
        assert clocks.overrun() == -600.0, phase
    clocks.enter("load", 0)
    for count in range(1, 10):
        now[0] += 500.0
        assert clocks.overrun() == pytest.approx(-100.0)
        clocks.progress()
        assert (clocks.overrun(), clocks.progress_count) == (-600.0, count)
    now[0] += 601.0
    assert clocks.overrun() == pytest.approx(1.0)
    clocks.exclude_pause(600.0)
    assert clocks.overrun() == pytest.approx(-599.0)
    clocks.enter("step", 1)
    assert (clocks.overrun(), clocks.progress_count) == (-600.0, 0)


def test_ranks_wait_for_one_whose_work_gets_on_and_no_longer(tmp_path: Path) -> None:
    """Rank 1 hashes for three times the limit, rank 0 waits for it in a collective; then rank 1 hangs."""
    limits = Timeouts(heartbeat_seconds=0.1, start_seconds=2.0)
    left: list[float] = []
    said: list[str] = []
    watches = [
        Watchdog(
            tmp_path,
            rank,
            2,
            limits,
            said.append,
            position,
            exit_process=lambda _: left.append(time.monotonic()),
        )
        for rank, position in enumerate(
            [lambda: (1, "all-gather host", "", 0.0), lambda: (1, "", "x", 0.0)]
        )
    ]
    for watch in watches:
        watch.attempt, watch.cells[0] = 3, 1
        watch.start()
        watch.phase("choose", 0)
    try:
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            watches[1].progress()
            time.sleep(0.2)
        assert not left and not said
        while not left and time.monotonic() < until + 30:
            time.sleep(0.05)
    finally:
        for watch in watches:
            watch._ended.set()
    assert left and 1.5 < left[0] - until < 20
    assert " is stuck: step 0, choosing a checkpoint" in said[0]
    verdict = read_report(tmp_path)
    assert verdict is not None and (verdict["attempt"], verdict["suspects"][0]["rank"]) == (3, 1)


def test_a_verdict_stays_until_the_next_start_has_been_able_to_read_it(tmp_path: Path) -> None:
    publish_report(tmp_path, {"line": "rank 1 died", "told_by": 0, "attempt": 4}, None)
    watches = [
        Watchdog(tmp_path, rank, 2, Timeouts(), print, lambda: (0, "", "", 0.0)) for rank in (1, 0)
    ]
    watches[0].start()
    assert read_report(tmp_path) == {"line": "rank 1 died", "told_by": 0, "attempt": 4}
    watches[1].start()
    assert read_report(tmp_path) is None and (tmp_path / "earlier_verdict.json").exists()
    for watch in watches:
        watch.close()


def test_the_limit_of_a_step_is_learnt() -> None:
    limits = Timeouts(start_seconds=600.0)
    assert limits.seconds("step", [0.1] * 4) == 600.0
    assert limits.seconds("step", [0.1] * 19) == 30.0
    assert limits.seconds("step", [9.0] * 5) == 45.0
    assert limits.seconds("step", [0.1] * 20) == 10.0
    assert limits.seconds("step", [7.0] * 20) == 14.0
    assert limits.seconds("step", [1.0] * 495 + [90.0] * 5) == 10.0
    assert limits.seconds("step", [1.0] * 490 + [90.0] * 10) == 180.0
    assert replace(limits, step_seconds=3.0).seconds("step", [7.0] * 20) == 3.0


def test_a_heartbeat_is_read_back_whole_or_not_at_all(tmp_path: Path) -> None:
    given = record(3, facts={"job": "17"}, current="é" * 300)
    write_heartbeat(tmp_path, given)
    data = heartbeat_path(tmp_path, 3).read_bytes()
    assert len(data) == LENGTH_BYTES
    assert read_heartbeat(tmp_path, 3) == replace(given, current="é" * 160)
    other = encode(record(3, beat=2, step=999, problem="x" * 500))
    for cut in range(0, LENGTH_BYTES, 7):
        mixed = decode(other[:cut] + data[cut:])
        assert mixed is None or mixed in (decode(data), decode(other))
    assert decode(data[:-1]) is None
    assert decode(b"") is None
    assert read_heartbeat(tmp_path, 4) is None


def test_processes_are_told_apart() -> None:
    me = this_process()
    assert process_state(me, me) == "running"
    assert process_state(replace(me, start_ticks=me.start_ticks + 1), me) == "gone"
    assert process_state(ELSEWHERE, me) == ""
    assert process_state(replace(me, pid_namespace="pid:[1]"), me) == ""
    with subprocess.Popen(["sleep", "60"]) as child:
        other = replace(
            me,
            pid=child.pid,
            start_ticks=int(Path(f"/proc/{child.pid}/stat").read_text().split()[21]),
        )
        kill_processes([replace(other, start_ticks=1), ELSEWHERE], me)
        assert child.poll() is None, "another process with the same number was ended"
        child.send_signal(signal.SIGSTOP)
        while process_state(other, me) != "stopped":
            time.sleep(0.01)
        kill_processes([other], me)
        assert child.wait() != 0
        assert process_state(other, me) == "gone"


def test_beats_are_judged_by_the_readers_own_clock(tmp_path: Path) -> None:
    now = [100.0]
    observer = Observer(tmp_path, 2, this_process(), lambda: now[0])
    for beat in range(1, 9):
        # Each wall clock jumps; rank 1's heartbeat stands still.
        write_heartbeat(
            tmp_path, record(0, beat=beat, process=ELSEWHERE, wall=f"20{99 - beat}-01-01")
        )
        write_heartbeat(tmp_path, record(1, beat=5, process=ELSEWHERE, wall=f"20{beat}0-01-01"))
        observer.sample()
        now[0] += 1.0
    found = find_faulty_ranks(observer.statuses(), 2.5)
    assert [(one.rank, one.kind) for one in found] == [(1, "silent")]
    assert (
        found[0]
        .line()
        .startswith("rank 1 (pid 1 on host n2) gives no sign of life for 8 s: step 41")
    )


@pytest.mark.parametrize(
    ("changes", "rank", "kind"),
    [
        ({2: {"process": "gone"}}, 2, "died"),
        ({1: {"process": "stopped"}, 2: {"process": "gone"}}, 2, "died"),
        ({2: {"silent_seconds": 9.0}}, 2, "silent"),
        ({2: {"record": None, "silent_seconds": 9.0}}, 2, "missing"),
        ({2: {"record": record(2, current="")}}, 2, "stuck"),
        ({2: {"record": record(2, current="")}, 3: {"record": record(3, count=7)}}, 2, "stuck"),
        ({2: {"record": record(2, current="", count=5), "moving": True}, 1: {"record": record(1, current="")}}, 1, "stuck"),
        ({3: {"record": record(3, count=1200)}}, 3, "behind"),
        ({3: {"record": record(3, step=40, count=2000)}}, 3, "behind"),
        ({0: {"record": record(0, state="failed", problem="boom")}, 1: {"process": "gone"}}, 0, "failed"),
        ({0: {"record": record(0, state="leaving"), "process": "gone"}, 1: {"record": record(1, current="")}}, 1, "stuck"),
    ],
)  # fmt: skip
def test_who_is_suspected(changes: dict[int, dict[str, Any]], rank: int, kind: str) -> None:
    ranks = {r: seen(**({"record": record(r)} | changes.get(r, {}))) for r in range(4)}
    first = find_faulty_ranks(ranks, 2.5)[0]
    assert (first.rank, first.kind) == (rank, kind)
    assert first.line().startswith(f"rank {rank} ")


def test_exactly_one_rank_speaks_and_an_earlier_verdict_does_not_silence_it(tmp_path: Path) -> None:
    told = [publish_report(tmp_path, {"line": "a", "told_by": rank}, None) for rank in (3, 1, 2)]
    assert told == [True, False, False]
    stale = report_id(tmp_path)
    told = [publish_report(tmp_path, {"line": "b", "told_by": rank}, stale) for rank in (5, 4)]
    assert told == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdict.json"]


def test_a_watch_that_was_closed_is_nobody_s_suspect_and_leaves_no_thread(tmp_path: Path) -> None:
    left: list[int] = []
    watch = Watchdog(
        tmp_path / "watch",
        0,
        1,
        Timeouts(heartbeat_seconds=0.05),
        print,
        lambda: (7, "", "x", 0.0),
        exit_process=left.append,
    )
    watch.start()
    watch.phase("evaluate", 3)
    time.sleep(0.6)
    during = read_heartbeat(tmp_path / "watch", 0)
    assert during is not None and (during.phase, during.step, during.count) == ("evaluate", 3, 7)
    assert during.beat > 3
    watch.close()
    after = read_heartbeat(tmp_path / "watch", 0)
    assert after is not None and after.state == "closed" and not left
    watch.close()


def test_a_file_system_that_does_not_answer_does_not_stop_the_clock(
    tmp_path: Path, monkeypatch: Any
) -> None:
    left: list[float] = []
    said: list[str] = []
    began = time.monotonic()
    limits = Timeouts(heartbeat_seconds=0.1, start_seconds=1.5)
    watch = Watchdog(
        tmp_path,
        0,
        1,
        limits,
        said.append,
        lambda: (7, "", "x", 0.0),
        exit_process=lambda _: left.append(time.monotonic()),
    )
    monkeypatch.setattr("k2train.watchdog.watchdog.DIAGNOSIS_SECONDS", 1.0)
    watch.start()
    monkeypatch.setattr("k2train.watchdog.watchdog.write_heartbeat", lambda *_: time.sleep(8))
    while not left and time.monotonic() - began < 20:
        time.sleep(0.05)
    watch._ended.set()
    assert left and left[0] - began < 12, left
    assert said and "does not answer" in said[0]


def test_without_a_heartbeat_there_is_no_watch(tmp_path: Path) -> None:
    watch = Watchdog(
        tmp_path / "watch", 0, 1, Timeouts(heartbeat_seconds=0), print, lambda: (0, "", "", 0.0)
    )
    watch.start()
    watch.phase("step", 1)
    assert "rank 0" in watch.connection_lost(RuntimeError("gone"))
    watch.close()
    assert not (tmp_path / "watch").exists()
