"""A calibration's process: every kernel and collective is timed on real ranks, side by side."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.calibrate import engines as engines_module
from k2train.calibrate import worker
from k2train.calibrate.clock import Clock, times_of
from k2train.calibrate.collectives import collective_times
from k2train.calibrate.engine_config import ENGINES, engine_config
from k2train.calibrate.engines import engine_times
from k2train.calibrate.rounds import KernelRounds, kernel_times
from k2train.calibrate.worker import facts_of
from k2train.launch.environment import Launch
from k2train.parallel.grid import Axis, start_process_group, stop_process_group
from k2train.planner.measured_section import COLLECTIVES, KERNELS
from tests.support.gloo_pool import GlooPool

TASK = {"device": "cpu", "precisions": ["fp32"], "rounds": 2, "tiny": True}
BYTES = [4096, 2**18]


Row = tuple[str, int, float]


def measured_job(launch: Launch) -> tuple[list[list[object]], list[Row], list[dict[str, object]]]:
    """Kernels and collectives of one rank, and the engines that it shares with the other."""
    clock = Clock(torch.device("cpu"))
    axis = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD)
    found = [
        (kind, size, times.seconds) for kind, size, times in collective_times(clock, axis, BYTES, 2)
    ]
    split = {"shallow": engine_config("shallow", "cpu", "fp32", None, 2, sequence=True)}
    engines = engine_times(clock, split, launch.world_size, launch.rank, 2, lambda: 1.0)
    return kernel_times(KernelRounds(clock, TASK), 2), found, engines


def test_two_ranks_time_everything_together(pool: GlooPool) -> None:
    """Catches a kernel or collective that no line comes of, one that ranks call in another order,
    and an amount that differs between ranks."""
    (kernels, sent, engines), (others, received, more) = pool.run(2, measured_job)
    assert engines[0]["parameters"] == more[0]["parameters"]
    assert all(engine[0][part] > 0 for engine in (engines, more) for part in ("forward", "rest"))
    assert {name for _, name, *_ in kernels} == {*KERNELS, "peak", "copy"}
    assert [row[:3] for row in kernels] == [row[:3] for row in others]
    assert all(seconds > 0 for *_, seconds, _ in kernels)
    assert {kind for kind, *_ in sent} == set(COLLECTIVES)
    assert [row[:2] for row in sent] == [row[:2] for row in received]
    assert all(seconds > 0 for *_, seconds in sent)


def test_a_round_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reference that counts the large copy, or another precision's kernels: it must be
    that of the calibration's table."""
    rounds = KernelRounds(Clock(torch.device("cpu")), {**TASK, "precisions": ["fp32", "bf16"]})
    precisions = [precision for precision, _ in rounds.cases]
    monkeypatch.setattr(rounds.clock, "seconds_of", lambda work: 1.0)
    assert rounds.reference() == precisions.count("fp32") == len(precisions) // 2


def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clock of one of two ranks, on which a kernel takes 3 s after a wait for the other, else 1."""
    waited = [False]

    def barrier() -> None:
        waited[0] = True

    def seconds_of(work: object) -> float:
        found = 3.0 if waited[0] else 1.0
        waited[0] = False
        return found

    clock = Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "seconds_of", seconds_of)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "barrier", barrier)
    return clock


def test_engines_have_a_reference_that_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches engines in the seconds of rounds whose kernels waited for other ranks and started
    cold: such a kernel takes three times as long here."""
    rounds = KernelRounds(two_ranks(monkeypatch), TASK)
    kernel_times(rounds, 2)
    kernels = len(rounds.cases) - 1
    assert rounds.sums == [3.0 * kernels] * 3
    assert rounds.alone == [1.0 * kernels] * 2
    # An engine alone has a group of one, which has nobody to wait for.
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert rounds.reference() == rounds.reference_alone() == kernels


def test_a_task_counts_in_the_seconds_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches engines of a rank alone in the seconds of rounds that wait, those of two ranks in the
    seconds of rounds that do not, and collectives timed without a run's shared memory."""
    clock, shared = two_ranks(monkeypatch), object()

    def engine_shares(*given: object) -> list[dict[str, float]]:
        return [dict.fromkeys(engines_module.PARTS, 0.5)]

    def timed(clock: Clock, axis: object, *given: object) -> list[Any]:
        assert axis is shared
        return [("all-gather", 4096, times_of([1.0, 1.0]))]

    monkeypatch.setattr(worker, "_prepared", lambda task, rank: clock)
    monkeypatch.setattr(worker, "_join", lambda task, rank: None)
    monkeypatch.setattr(worker, "start_process_group", lambda *given: None)
    monkeypatch.setattr(worker, "stop_process_group", lambda: None)
    monkeypatch.setattr(worker, "share_memory", lambda axis, device: shared)
    monkeypatch.setattr(worker, "engine_times", engine_shares)
    monkeypatch.setattr(worker, "collective_times", timed)
    found = worker.run({**TASK, "ranks": 2, "kernels": True}, 0)
    kernels = len(found["kernels"]) - 1
    assert found["engines"] == [dict.fromkeys(engines_module.PARTS, 0.5 * kernels)]
    assert found["tensor engines"] == [dict.fromkeys(engines_module.PARTS, 0.5 * 3 * kernels)]
    assert found["rounds"] == [3.0 * kernels] * 2
    assert found["collectives"] == [["all-gather", 4096, 1.0, 0.0]]


def test_a_step_is_measured_in_its_turns_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a machine that slows down and makes later steps larger: the work is the same, and
    takes longer from turn to turn."""
    now = [0.0]

    class Slower:
        def __init__(self, *given: object) -> None:
            self.samples: list[float] = []

        def step(self) -> None:
            # Between two references, whose mean is the machine's speed.
            self.last = 3.0 * (now[0] + 0.5)

        def finish(self, reference: float, keep: bool) -> None:
            self.samples += [self.last / reference] if keep else []

        def found(self) -> dict[str, object]:
            return {"samples": self.samples}

    def reference() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(engines_module, "_Stepper", Slower)
    config = engine_config("shallow", "cpu", "fp32")
    clock = Clock(torch.device("cpu"))
    (one,) = engine_times(clock, {"one": config}, 1, 0, 4, reference)
    assert one["samples"] == [3.0] * 4


def test_engines_show_their_layers() -> None:
    """Catches time of a layer in the step's rest, and work of one engine in another's row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = Clock(torch.device("cpu"), "processor")
        configs = {name: engine_config(name, "cpu", "fp32") for name in ENGINES}
        start_process_group(Launch(0, 1, 0, launched=False), clock.device)
        shallow, deep, wide, large, _ = found = engine_times(clock, configs, 1, 0, 6, lambda: 1.0)
    finally:
        stop_process_group()
        torch.set_num_threads(threads)
    assert [one["name"] for one in found] == list(ENGINES)
    assert deep["layers"] - shallow["layers"] == 4
    # Four layers more, in processor time. Quiet, it is 1.8 to 2.1 forward and 3.4 to 3.9 backward;
    # beside other programs caches are colder, and the shorter part was seen at 1.4.
    both = [one["forward"] + one["backward"] for one in (shallow, deep)]
    assert both[1] > 1.5 * both[0]
    assert deep["forward"] > 1.2 * shallow["forward"]
    assert deep["backward"] > 1.2 * shallow["backward"]
    assert wide["parameters"] > 10 * shallow["parameters"]
    assert large["forward"] > 2 * shallow["forward"]
    assert wide["rest"] > shallow["rest"]
    assert facts_of(torch.device("cpu"))["memory_bytes"] > 2**28


def test_medians_and_quartiles() -> None:
    """Catches one slow sample that moves a time, and a clock that counts each thread."""
    times = times_of([1.0, 1.1, 1.2, 1.3, 50.0])
    assert times.seconds == 1.2
    assert times.spread == pytest.approx((1.3 - 1.1) / 1.2)
    work = torch.randn(200, 200)
    one = Clock(torch.device("cpu"), "processor", 1)
    four = Clock(torch.device("cpu"), "processor", 4)
    assert one.now() == pytest.approx(4 * four.now(), rel=0.05)
    assert one.seconds_of(lambda: work @ work) >= 0.0
