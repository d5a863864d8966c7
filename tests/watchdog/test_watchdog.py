"""The watchdog against hangs and deaths of real processes, and its parts with simulated clocks.

Of real processes: which rank is named, how soon, and that nothing is left.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2train import retry
from k2train.processes import Process, process_state, start_ticks, this_process
from k2train.retry import retried
from k2train.watchdog import heartbeat, heartbeat_thread
from k2train.watchdog.failure_report import (
    STACKS_SIGNAL,
    kill_processes,
    publish_report,
    read_report,
    report_id,
)
from k2train.watchdog.hang_analysis import find_faulty_ranks
from k2train.watchdog.heartbeat import (
    LENGTH_BYTES,
    Heartbeat,
    Observer,
    RankStatus,
    decode,
    encode,
    heartbeat_path,
    read_heartbeat,
    write_heartbeat,
)
from k2train.watchdog.own_heartbeat import Member, OwnHeartbeat
from k2train.watchdog.phase_timer import PhaseTimer
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog
from tests.support.command_line import HANG_SECONDS, soon
from tests.support.scenarios import (
    Scenario,
    UnavailableError,
    after,
    chosen,
    judged,
    judges,
    side_by_side,
)
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


def of_hang(directory: Path, fault: str) -> Scenario:
    with Job(directory, 3, LIMIT, (fault, 1, 25)) as job:
        yield lambda: job.over
        return directory, job.pids[1], job.ended()


def of_stop_in_a_long_wait(directory: Path) -> Scenario:
    with Job(directory, 2, 1800.0, ("stop", 1, 25)) as job:
        yield lambda: job.over
        return job.ended()


def of_kill(directory: Path, *fault: object) -> Scenario:
    """Killed at a step by itself, or by a signal in a collective."""
    with Job(directory, 3, 60.0, fault, WATCHED_WORK="0.05") as job:
        yield lambda: job.at_step(24)
        if not fault:
            job.send(signal.SIGKILL, 2)
        yield lambda: job.over
        return job.pids[2], job.step(2), job.ended()


def all_in_phase(directory: Path, world: int, phase: str) -> bool:
    """Whether the heartbeats of all ranks say so."""
    return all(
        (one := read_heartbeat(directory, rank)) is not None and one.phase == phase
        for rank in range(world)
    )


def of_kill_outside_collectives(directory: Path) -> Scenario:
    with Job(directory, 2, 200.0, ("kill", 1, 3), WATCHED_WORK="60", WATCHED_STEPS="3") as job:
        began = time.monotonic()
        yield lambda: all_in_phase(directory / "watch", 2, "step")
        unit = time.monotonic() - began
        yield after(2)
        job.send(signal.SIGKILL, 1)
        killed = time.monotonic()
        yield lambda: job.over
        ended = job.ended()
        return replace(ended, seconds=time.monotonic() - killed, unit=unit)


def of_error(directory: Path) -> Scenario:
    with Job(directory, 3, 60.0, ("raise", 0, 25)) as job:
        yield lambda: job.over
        return job.ended()


def of_pause_of_all(directory: Path) -> Scenario:
    with Job(
        directory, 2, LIMIT, WATCHED_CLOCK_JUMP="3600", WATCHED_WORK="0.1", WATCHED_STEPS="60"
    ) as job:
        yield lambda: job.at_step(10)
        job.send(signal.SIGSTOP, 0, 1)
        yield after(2 * LIMIT)
        job.send(signal.SIGCONT, 0, 1)
        yield lambda: job.over
        return directory, job.ended()


def of_one_rank(directory: Path) -> Scenario:
    with Job(directory, 1, LIMIT, ("sleep", 0, 25)) as job:
        yield lambda: job.over
        return directory, job.ended()


def of_one_rank_that_holds(directory: Path) -> Scenario:
    """Holds Python's lock: its own watchdog cannot run; a person sends the signal."""
    with Job(directory, 1, LIMIT, ("hold", 0, 25)) as job:
        yield lambda: job.at_step(24)
        yield after(1)
        job.job.send(0, STACKS_SIGNAL)
        stacks = directory / "watch/stacks_rank_00000.txt"
        yield lambda: " in main" in stacks.read_text()
        return stacks.read_text()


class Network:
    """Two machines: network namespaces joined by a bridge in a third, whose cable can be pulled."""

    def __init__(self, name: str) -> None:
        self.names = [f"k2w{os.getpid()}{name}{end}" for end in "abm"]

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def __enter__(self) -> "Network":
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            raise UnavailableError(
                f"no network namespaces here (needs root and ip netns): {error}"
            ) from error
        return self

    def _make(self) -> None:
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

    def cable(self, state: str) -> None:
        """`down` or `up`."""
        self._ip("-n", self.names[2], "link", "set", "port1", state)

    def of_ranks(self) -> list[dict[str, str]]:
        """The variable that starts each of two ranks on its own machine."""
        return [{"FAULT_RUN_NETNS": f"/var/run/netns/{name}"} for name in self.names[:2]]

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def of_partition(directory: Path) -> Scenario:
    with (
        Network("p") as network,
        Job(
            directory, 2, 10.0, rank_environments=network.of_ranks(), GLOO_SOCKET_IFNAME="eth0"
        ) as job,
    ):
        yield lambda: job.at_step(20)
        network.cable("down")
        yield lambda: job.over
        return job.ended()


def of_flap(directory: Path) -> Scenario:
    steps = {"WATCHED_STEPS": "150", "WATCHED_WORK": "0.1", "GLOO_SOCKET_IFNAME": "eth0"}
    with (
        Network("f") as network,
        Job(directory, 2, 120.0, rank_environments=network.of_ranks(), **steps) as job,
    ):
        yield lambda: job.at_step(20)
        network.cable("down")
        yield after(30)
        network.cable("up")
        yield lambda: job.over
        return job.ended()


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    **{fault: partial(of_hang, fault=fault) for fault in NAMES},
    "stopped in a long wait": of_stop_in_a_long_wait,
    "killed in a collective": of_kill,
    "killed outside": lambda directory: of_kill(directory, "kill", 2, 25),
    "killed while nobody exchanges": of_kill_outside_collectives,
    "error": of_error,
    "pause of all": of_pause_of_all,
    "one rank": of_one_rank,
    "one rank that holds": of_one_rank_that_holds,
    "partition": of_partition,
    "flap": of_flap,
}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of the scenarios that the chosen tests judge."""
    names = chosen(request.session.items, SCENARIOS)
    return side_by_side(
        {name: SCENARIOS[name](tmp_path_factory.mktemp("watched")) for name in names}
    )


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Any]) -> Any:
    return judged(outcomes[request.param])


@judges(*NAMES)
def test_a_rank_that_hangs_is_named_with_its_stacks_and_no_process_is_left(
    outcome: Any, request: pytest.FixtureRequest
) -> None:
    directory, pid, ended = outcome
    fault = request.node.callspec.params["outcome"]
    assert len(ended.lines) == 1, ended.errors
    line = ended.lines[0]
    assert line.startswith(f"rank 1 (pid {pid} on host {os.uname().nodename}) {NAMES[fault]}"), line
    assert re.search(r": step 25, forward/backward, for \d+ s; last collective 49", line), line
    stacks = directory / "watch/stacks_rank_00001.txt"
    # A process that does not run is not slow.
    advice = "; if it is only slow, raise watch.step_seconds" if "stuck" in NAMES[fault] else ""
    assert line.endswith(f"stacks in {stacks}{advice}"), line
    assert "watched.py" in stacks.read_text() and " in do" in stacks.read_text()
    assert 0 not in ended.codes
    assert ended.within(max(10.0, 2 * LIMIT))
    verdict = json.loads((directory / "watch/verdict.json").read_text())
    assert (verdict["line"], verdict["suspects"][0]["rank"]) == (line, 1)


@judges("stopped in a long wait")
def test_a_stopped_rank_is_found_wherever_the_others_wait(outcome: Any) -> None:
    """A save may take half an hour, and so may the limit of the phase that the others are in.

    A stopped rank does no work, whatever its limit.
    """
    ended = outcome
    assert (
        len(ended.lines) == 1
        and "rank 1" in ended.lines[0]
        and "is stopped (SIGSTOP)" in ended.lines[0]
    ), ended.errors
    assert 0 not in ended.codes and ended.within(30)


@judges("killed in a collective", "killed outside")
def test_ranks_are_gone_5_seconds_after_one_was_killed(
    outcome: Any, request: pytest.FixtureRequest
) -> None:
    pid, last_step, ended = outcome
    assert len(ended.lines) == 1, ended.errors
    told = re.fullmatch(
        rf"rank 2 \(pid {pid} on host \S+\) died at step (\d+), forward/backward; "
        r"(in|last) collective (\d+).*",
        ended.lines[0],
    )
    assert told, ended.lines
    # Not where it was at its last heartbeat: where it was.
    outside = request.node.callspec.params["outcome"] == "killed outside"
    assert int(told[1]) == 25 if outside else int(told[1]) - last_step in (0, 1)
    assert int(told[3]) in (2 * int(told[1]) - 2, 2 * int(told[1]) - 1, 2 * int(told[1]))
    assert ended.codes == [1, 1, -9]
    assert ended.within(5.0)


@judges("killed while nobody exchanges")
def test_a_death_is_seen_by_ranks_that_are_in_no_collective(outcome: Any) -> None:
    assert outcome.within(5.0)
    assert outcome.codes == [1, -9]
    assert " died at step 1, forward/backward" in outcome.lines[0]


@judges("error")
def test_a_rank_that_raises_is_named_with_its_error(outcome: Any) -> None:
    ended = outcome
    # Slow at writing its message, it is ended by the others.
    assert ended.codes[0] in (1, -signal.SIGKILL) and ended.codes[1:] == [1, 1]
    assert len(ended.lines) == 1, ended.errors
    assert ended.lines[0].endswith("failed at step 25, forward/backward: ValueError: made up")
    assert "Traceback" in ended.errors[0]
    assert ended.within(10.0)


@judges("pause of all")
def test_a_job_whose_ranks_are_all_stopped_for_a_while_goes_on_though_clocks_jump(
    outcome: Any,
) -> None:
    directory, ended = outcome
    assert ended.codes == [0, 0], ended.errors
    assert ended.lines == []
    # Nobody reads the frames of threads that run: that crashes a healthy process now and then.
    for rank in range(2):
        assert (directory / f"watch/stacks_rank_{rank:05}.txt").read_text() == ""


@judges("one rank")
def test_a_world_of_one_ends_itself(outcome: Any) -> None:
    directory, ended = outcome
    assert ended.codes == [1]
    assert " is stuck: step 25, forward/backward" in ended.lines[0]
    assert " in do" in (directory / "watch/stacks_rank_00000.txt").read_text()
    assert ended.within(10.0)


HELD_RECORDER = """
import ctypes, os, pathlib, sys, time
from k2train.watchdog import own_heartbeat
from k2train.watchdog.own_heartbeat import Member
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog
own_heartbeat.HELD_SECONDS = 2.0
limits = Timeouts(heartbeat_seconds=0.2, step_seconds=1.0)
watch = Watchdog(
    pathlib.Path(sys.argv[1]), Member(0, 1), limits, print, lambda: (3, "tp all-reduce", "", 0.0)
)
watch.attempt = 1
# Holds Python's lock for good, as torch's recorder does while NCCL holds the recorder's.
watch.recording = lambda: ctypes.PyDLL(None).sleep(3600)
watch.start()
watch.phase("step", 7)
time.sleep(3600)
"""


def test_a_flight_recorder_that_hangs_keeps_no_report_back(tmp_path: Path) -> None:
    """Catches a dump before the report, and a process that hangs in it for good."""
    process = subprocess.Popen([sys.executable, "-c", HELD_RECORDER, str(tmp_path)])
    try:
        assert process.wait(HANG_SECONDS) == -signal.SIGALRM
    finally:
        process.kill()
        process.wait()
    report = read_report(tmp_path)
    assert report is not None and "is stuck: step 7, forward/backward" in report["line"]


@judges("one rank that holds")
def test_a_world_of_one_writes_its_stacks_when_it_is_asked(outcome: Any) -> None:
    assert " in do" in outcome


@pytest.mark.slow
@judges("partition")
def test_a_partition_for_good_ends_the_run_in_time(outcome: Any) -> None:
    ended = outcome
    assert ended.codes == [1, 1]
    assert len(ended.lines) == 1, ended.errors
    told = re.search(
        r"rank [01] .*: step \d+, forward/backward, for (\d+) s; in collective \d+ all-",
        ended.lines[0],
    )
    assert told and int(told[1]) >= 10, ended.lines
    assert ended.within(20.0)


@pytest.mark.slow
@judges("flap")
def test_a_flap_of_30_seconds_within_the_limit_is_survived(outcome: Any) -> None:
    assert outcome.codes == [0, 0], outcome.errors


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
    """Neither if the watchdog saw the pause before the step ended, nor if the step was quicker."""
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


def test_two_dumps_at_once_leave_no_alarm_behind(tmp_path: Path) -> None:
    """Catches one that puts the other's timer back: SIGALRM would end the process 6 s later."""

    def dump(rank: int, began: threading.Event, wait: threading.Event) -> threading.Thread:
        timer = PhaseTimer(Timeouts(), time.monotonic)
        own = OwnHeartbeat(tmp_path, Member(rank, 2), timer, lambda: (0, "", "", 0.0))

        def recording() -> None:
            began.set()
            wait.wait(0.5)

        own.recording = recording
        thread = threading.Thread(target=own.dump_recording)
        thread.start()
        return thread

    first, second = threading.Event(), threading.Event()
    threads = [dump(0, first, second)]
    assert first.wait(HANG_SECONDS)
    threads.append(dump(1, second, threading.Event()))
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert signal.setitimer(signal.ITIMER_REAL, 0.0) == (0.0, 0.0)


def test_ranks_wait_for_one_whose_work_gets_on_and_no_longer(tmp_path: Path) -> None:
    """Rank 1 hashes for three times the limit while rank 0 waits in a collective; then it hangs."""
    limits = Timeouts(heartbeat_seconds=0.1, start_seconds=2.0)
    left: list[float] = []
    said: list[str] = []
    watches = [
        Watchdog(
            tmp_path,
            Member(rank, 2),
            limits,
            said.append,
            position,
            lambda _: left.append(time.monotonic()),
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
            last = time.monotonic()
            watches[1].progress()
            time.sleep(0.2)
        assert not left and not said
        while not left and time.monotonic() < until + HANG_SECONDS:
            time.sleep(0.05)
    finally:
        for watch in watches:
            watch._ended.set()
    assert left and left[0] - last >= 2.0
    assert " is stuck: step 0, choosing a checkpoint" in said[0]
    verdict = read_report(tmp_path)
    assert verdict is not None and (verdict["attempt"], verdict["suspects"][0]["rank"]) == (3, 1)


def test_a_rank_that_waits_for_a_file_server_is_not_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a watchdog that ends the run before the retry of a read does, and one that never
    ends it.
    """
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 4.0)
    left: list[float] = []
    limits = Timeouts(heartbeat_seconds=0.1, start_seconds=1.0)
    watch = Watchdog(
        tmp_path,
        Member(0, 1),
        limits,
        lambda text: None,
        lambda: (0, "", "", 0.0),
        lambda _: left.append(time.monotonic()),
    )
    watch.start()
    watch.phase("load", 3)

    def stale() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    try:
        with pytest.raises(RuntimeError, match="Stale file handle, for 4s"):
            retried(stale, "a shard")
        waited = time.monotonic()
        assert not left
        assert soon(lambda: left)
    finally:
        watch._ended.set()
    assert left[0] - waited >= 0.5


@pytest.mark.parametrize("patience", [60.0, 0.5])
def test_a_rank_under_a_debugger_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Catches a job ended by its first debugger, by the time it takes to load symbols, and one that
    waits for ever.
    """
    traced = [True]
    other = replace(this_process(), pid=2**22 + 5)

    def state(process: Process, reader: Process) -> str:
        return "traced" if process == other and traced[0] else "running"

    for module in (heartbeat_thread, heartbeat):
        monkeypatch.setattr(module, "process_state", state)
    monkeypatch.setattr(heartbeat_thread, "TRACED_SECONDS", patience)
    left: list[float] = []
    said: list[str] = []
    watch = Watchdog(
        tmp_path,
        Member(0, 2),
        Timeouts(heartbeat_seconds=0.1, start_seconds=3.0),
        said.append,
        lambda: (1, "all-reduce dp", "", 0.0),
        lambda _: left.append(time.monotonic()),
    )
    write_heartbeat(tmp_path, record(1, process=other, count=0, current=""))
    watch.start()
    watch.phase("step", 1)
    try:
        began = time.monotonic()
        if patience > 5:
            time.sleep(8.0)
            assert not left
            traced[0] = False
            began = time.monotonic()
        assert soon(lambda: left)
        assert left[0] - began >= 2.5
    finally:
        watch._ended.set()
    assert said[0] == (
        "rank 1 is held by a debugger or profiler; the others wait for it, at most "
        f"{patience:.0f} s"
    )
    assert len(said) == 2 and "rank 1" in said[1]


def test_a_verdict_stays_until_the_next_start_has_been_able_to_read_it(tmp_path: Path) -> None:
    publish_report(tmp_path, {"line": "rank 1 died", "told_by": 0, "attempt": 4}, None)
    watches = [
        Watchdog(tmp_path, Member(rank, 2), Timeouts(), print, lambda: (0, "", "", 0.0))
        for rank in (1, 0)
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


def test_only_that_process_is_killed() -> None:
    """Catches a stranger killed because it got the id of a process which is gone."""
    me = this_process()
    with subprocess.Popen(["sleep", "600"]) as child:
        other = replace(me, pid=child.pid, start_ticks=start_ticks(child.pid))
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
        (
            {
                2: {"record": record(2, current="", count=5), "moving": True},
                1: {"record": record(1, current="")},
            },
            1,
            "stuck",
        ),
        ({3: {"record": record(3, count=1200)}}, 3, "behind"),
        ({3: {"record": record(3, step=40, count=2000)}}, 3, "behind"),
        (
            {0: {"record": record(0, state="failed", problem="boom")}, 1: {"process": "gone"}},
            0,
            "failed",
        ),
        (
            {
                0: {"record": record(0, state="leaving"), "process": "gone"},
                1: {"record": record(1, current="")},
            },
            1,
            "stuck",
        ),
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
        Member(0, 1),
        Timeouts(heartbeat_seconds=0.05),
        print,
        lambda: (7, "", "x", 0.0),
        left.append,
    )
    watch.start()
    watch.phase("evaluate", 3)
    assert soon(lambda: (now := read_heartbeat(tmp_path / "watch", 0)) is not None and now.beat > 3)
    during = read_heartbeat(tmp_path / "watch", 0)
    assert during is not None and (during.phase, during.step, during.count) == ("evaluate", 3, 7)
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
        Member(0, 1),
        limits,
        said.append,
        lambda: (7, "", "x", 0.0),
        lambda _: left.append(time.monotonic()),
    )
    monkeypatch.setattr("k2train.watchdog.timeout_thread.DIAGNOSIS_SECONDS", 1.0)
    watch.start()
    answers = threading.Event()
    monkeypatch.setattr(
        "k2train.watchdog.own_heartbeat.write_heartbeat", lambda *_: answers.wait(600)
    )
    while not left and time.monotonic() - began < HANG_SECONDS:
        time.sleep(0.05)
    watch._ended.set()
    answers.set()
    assert left, "it waited for the file system"
    assert said and "does not answer" in said[0]


def test_without_a_heartbeat_there_is_no_watch(tmp_path: Path) -> None:
    watch = Watchdog(
        tmp_path / "watch",
        Member(0, 1),
        Timeouts(heartbeat_seconds=0),
        print,
        lambda: (0, "", "", 0.0),
    )
    watch.start()
    watch.phase("step", 1)
    assert "rank 0" in watch.connection_lost(RuntimeError("gone"))
    watch.close()
    assert not (tmp_path / "watch").exists()


def test_why_another_rank_left_is_told_by_its_heartbeat(tmp_path: Path) -> None:
    """Catches a mistake that one rank found and that ends the others like a crash, a stop without
    its rank and signal, and what an earlier start has left behind.
    """
    watches = [
        Watchdog(
            tmp_path,
            Member(rank, 3),
            Timeouts(heartbeat_seconds=60.0),
            print,
            lambda: (0, "", "", 0.0),
            lambda code: None,
        )
        for rank in range(3)
    ]
    for watch in watches:
        watch.attempt = 2
        watch.start()
    first, second, third = watches
    assert (first.refusal(), first.another_stopped()) == ("", "")
    second.close("chunk_001 is gone", code=2)
    assert first.refusal() == "chunk_001 is gone" and second.refusal() == ""
    third.close(stopped="SIGUSR1")
    assert first.another_stopped() == "SIGUSR1 on rank 2"
    first.attempt = 3
    assert (first.refusal(), first.another_stopped()) == ("", "")
    first.close()
