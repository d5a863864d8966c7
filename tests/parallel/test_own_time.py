"""Own time of a step: device seconds between exchanges, and a slow device that is named by them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from k2train.guard.stragglers import WINDOW, Stragglers
from k2train.launch.environment import Launch
from k2train.parallel.comm_tracker import CommTracker, collective_scope, wait_scope
from k2train.parallel.own_time import DeviceMarks, HostMarks, OwnTime, marks_of
from k2train.plan.layout import Layout


class Event:
    """An event of a device: when the device comes to it."""

    def __init__(self, at: float):
        self.at = at


class Device:
    """Marks of a device whose stream is at `now`; the host has seen it up to `seen`."""

    def __init__(self, speed: float = 1.0):
        self.speed, self.now, self.seen = speed, 0.0, 0.0
        self.alive, self.most = 0, 0

    def compute(self, work: float) -> None:
        self.now += work / self.speed

    def mark(self) -> Event:
        self.alive += 1
        self.most = max(self.most, self.alive)
        return Event(self.now)

    def passed(self, mark: Event) -> bool:
        return mark.at <= self.seen

    def seconds(self, begin: Event, end: Event) -> float:
        assert self.passed(begin) and self.passed(end), "an event is read before it is there"
        return end.at - begin.at

    def release(self, marks: Sequence[Event]) -> None:
        self.alive -= len(marks)


class World:
    """Ranks that compute between all-reduces, at which the streams of all wait for the last."""

    def __init__(self, speeds: Sequence[float]):
        self.devices = [Device(speed) for speed in speeds]
        self.comms = [CommTracker() for _ in speeds]
        self.times = [OwnTime(device) for device in self.devices]
        for comm, own in zip(self.comms, self.times, strict=True):
            comm.own_time = own

    def step(self, work: float, exchanges: int) -> list[float]:
        """One step; returns what the step shares of the one before."""
        found = [own.read() for own in self.times]
        for own in self.times:
            own.begin()
        for _ in range(exchanges):
            for device in self.devices:
                device.compute(work / exchanges)
            waits = [wait_scope(comm, "all-reduce tp") for comm in self.comms]
            for wait in waits:
                wait.__enter__()
            met = max(device.now for device in self.devices)
            for device, wait in zip(self.devices, waits, strict=True):
                device.now = met
                wait.__exit__(None, None, None)
        for device, own in zip(self.devices, self.times, strict=True):
            own.end()
            # The host waits for its device once a step.
            device.seen = device.now
        return found


def test_a_slow_device_is_named_within_20_steps_and_no_rank_that_waits_for_it() -> None:
    """Catches device time that counts the wait for others: all ranks would be equally slow."""
    world = World((1.0, 1.0, 1 / 1.5, 1.0))
    watch = Stragglers(Layout(tensor=4))
    told = []
    for number in range(1, WINDOW + 3):
        seconds = world.step(0.3, exchanges=8)
        if any(seconds):
            told.append((number, watch.observe(number, seconds)))
    (named,) = [(number, line) for number, line in told if line]
    assert named[0] == WINDOW + 1, "the first step has nothing to share yet"
    assert named[1].startswith(
        "rank 2 is slow: 450 ms of own work per step, the others take 300 ms"
    )


def test_devices_alike_are_never_named() -> None:
    """Catches a wait of one rank that is taken for work of another."""
    world, watch = World((1.0,) * 4), Stragglers(Layout(data=4))
    for number in range(1, 60):
        seconds = world.step(0.3, exchanges=3)
        assert seconds == pytest.approx([0.3 if number > 1 else 0.0] * 4)
        assert watch.observe(number, seconds) is None


def test_a_device_that_is_not_there_yet_is_not_waited_for() -> None:
    """Catches a read that synchronizes, or that reads an event before it has happened."""
    device = Device()
    own = OwnTime(device)
    own.begin()
    device.compute(2.0)
    own.end()
    assert own.read() == 0.0
    own.begin()
    device.compute(3.0)
    device.seen = 2.0
    assert own.read() == 2.0
    own.end()
    # The device lags behind: the last seconds known stay.
    assert own.read() == 2.0
    device.seen = device.now
    assert own.read() == 3.0


def test_marks_are_used_again() -> None:
    """Catches events that pile up from step to step, also where steps are never read."""
    world = World((1.0, 1.0))
    for _ in range(50):
        world.step(0.1, exchanges=5)
    assert all(device.most <= 2 * (2 * 5 + 2) for device in world.devices)
    unread = OwnTime(device := Device())
    for _ in range(50):
        unread.begin()
        unread.end()
    unread.begin()
    unread.begin()
    assert device.most <= 5


def test_exchanges_outside_of_a_step_do_not_count() -> None:
    """Catches the exchanges of a save or an evaluation in the time of a step."""
    comm, device = CommTracker(), Device()
    comm.own_time = own = OwnTime(device)
    with collective_scope(comm, "all-gather of a save"):
        device.compute(5.0)
    own.begin()
    device.compute(1.0)
    with collective_scope(comm, "all-reduce dp"):
        device.now += 7.0
    device.compute(1.0)
    own.end()
    device.seen = device.now
    assert own.read() == 2.0


def test_an_exchange_that_fails_ends_its_wait() -> None:
    """Catches marks that no longer come in pairs after an error that was survived."""
    comm = CommTracker()
    comm.own_time = own = OwnTime(HostMarks())
    own.begin()
    with pytest.raises(RuntimeError), collective_scope(comm, "all-reduce dp"):
        raise RuntimeError("connection closed")
    own.end()
    assert own.read() > 0.0


def test_hosts_have_clocks_and_devices_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches host clocks on CUDA, and an event that is recorded without timing."""
    made: list[Any] = []

    class CudaEvent:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing
            made.append(self)
            self.recorded = 0

        def record(self) -> None:
            self.recorded += 1

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: "CudaEvent") -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    assert isinstance(marks_of(torch.device("cpu")), HostMarks)
    marks = marks_of(torch.device("cuda", 0))
    assert isinstance(marks, DeviceMarks)
    own = OwnTime(marks)
    for _ in range(3):
        own.begin()
        own.end()
        assert own.read() == 1.5
    assert len(made) == 2 and all(event.recorded == 3 for event in made)


def test_a_grid_is_timed_by_its_monitor(tmp_path: Any, pool: Any) -> None:
    """Catches a monitor that shares no own seconds, or the time in which it waited for others."""
    (shared,) = pool.run(1, monitor_job, str(tmp_path))
    assert shared[0] == 0.0 and 0.0 < shared[1] < shared[2]


def monitor_job(launch: Launch, folder: str) -> list[float]:
    """Seconds shared in the first step, in the second, and the duration of the first."""
    import time
    from pathlib import Path

    from k2train.guard.stop_signals import StopRequest
    from k2train.train.monitor import SECONDS, RunMonitor
    from k2train.train.setup import Setup
    from tests.support.tiny_model import grid_of, tiny_config

    config = tiny_config()
    grid = grid_of(launch, config)
    monitor = RunMonitor(Setup.of(config, 1), grid, Path(folder), StopRequest())
    first = monitor.begin_step(1, saving=False, save_due=False, failed=False)
    began = time.perf_counter()
    with collective_scope(grid.comm, "all-reduce dp"):
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    monitor.end_step(seconds, first)
    second = monitor.begin_step(2, saving=False, save_due=False, failed=False)
    return [first[SECONDS], second[SECONDS], seconds]
