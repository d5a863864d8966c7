"""A machine from the times of its processes: times made of known lines give these lines again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from k2train.calibrate import machine
from k2train.calibrate.engine_config import ENGINES, LAYERED, engine_config
from k2train.calibrate.machine import Request, checked_ranks, device_of_machine, measure
from k2train.calibrate.workload import workload_of
from k2train.config.load import Config
from k2train.errors import ConfigError
from k2train.plan import cost
from k2train.plan.efficiency import constants_of
from k2train.plan.hardware import Link
from k2train.plan.measured import Amount, Line, RankSpeed
from k2train.plan.measured_time import MeasuredTime
from k2train.plan.step_time import step_time
from k2train.planner.measured_section import COLLECTIVES, KERNELS
from k2train.train.setup import architecture_of
from tests.support.measured import measured_cluster, speed

AMOUNTS: list[Amount] = [(1.0, 1e6, 1e5), (1.0, 1e8, 1e6), (4.0, 3e7, 9e6), (2.0, 5e8, 1e5)]


def engine_of_worker(true: RankSpeed, name: str, config: Config) -> dict[str, Any]:
    """Times of one engine on a machine with these lines."""
    ranks, layers = config.parallel.tensor, config.model.num_layers
    time = MeasuredTime(workload_of(config, ranks), measured_cluster(), constants_of("cpu"))
    time.__dict__["speed"] = true
    head_forward, head_backward = time.head()
    count = cost.parameters(architecture_of(config))
    return {
        "name": name,
        "layers": layers,
        "vocab": config.model.vocab_size,
        "parameters": count,
        "forward": layers * time.forward().seconds + (head_forward + time.embedding()).seconds,
        "backward": layers * time.backward().seconds + (head_backward + time.embedding()).seconds,
        "rest": true.step_seconds + count * true.optimizer_seconds,
    }


def times_of_worker(true: RankSpeed, ranks: int) -> dict[str, Any]:
    """What a worker of a machine with these lines reports."""
    lines = true.kernels["fp32"]
    kernels = [
        ["fp32", name, list(amount), lines[name].seconds(amount), 0.05]
        for name in KERNELS
        for amount in AMOUNTS
    ]
    kernels += [["fp32", "peak", [1, 2e9, 1e6], 0.02, 0.05], ["", "copy", [1, 0, 1e8], 0.01, 0.05]]
    engines = [engine_of_worker(true, name, engine_config(name, "cpu", "fp32")) for name in ENGINES]
    split = [
        engine_of_worker(
            true,
            f"{name} {'sequence' if sequence else 'whole'}",
            engine_config(name, "cpu", "fp32", None, 2, sequence),
        )
        for name in LAYERED
        for sequence in (False, True)
    ]
    link = Line(5e-5, 0.0, 1e-9)
    sizes = (4096, 65536, 2**20)
    return {
        "facts": {"device": "", "memory_bytes": 16e9, "torch": "2.0", "devices": 0},
        "kernels": kernels,
        "engines": engines,
        "tensor engines": split if ranks == 2 else [],
        "rounds": [1.0, 1.0, 1.0],
        "collectives": [
            [kind, size, link.seconds((1, 0, size)) * (2 if kind == "send" else 1), 0.05]
            for kind in COLLECTIVES
            for size in (sizes if ranks > 1 else ())
        ],
    }


def test_known_lines_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line of another kernel, host time that counts twice, a send that counts there and
    back, ranks beyond the cores that are timed as if each had one, and what a collective waits
    taken for its bytes."""
    asked: list[tuple[int, int, bool]] = []

    def run_task(task: Mapping[str, Any], limit: float) -> list[dict[str, Any]]:
        ranks = task["ranks"]
        asked.append((ranks, task["threads"], task["kernels"]))
        alone = speed(ranks, 1.0 if ranks == 1 else 1.5)
        # Planted: each collective waits 300 us, and ranks that computed a layer a seventh of it.
        waiting = replace(alone, wait_seconds=3e-4, wait_share=1 / 7)
        found = times_of_worker(waiting if ranks == 2 else alone, ranks)
        if not task["kernels"]:
            for key in ("kernels", "engines", "tensor engines", "rounds"):
                del found[key]
        # Planted: of two ranks the second is a tenth slower than the first.
        return [{**found, "rounds": [1.0 + 0.1 * rank] * 3} for rank in range(ranks)]

    monkeypatch.setattr(machine, "run_task", run_task)
    request = Request("cpu", 4, 2, ("fp32",))
    found = measure(request, "2026-01-01 00:00 UTC", (), 100.0, lambda text: None)
    assert asked == [(1, 2, True), (2, 1, True), (4, 1, False)]
    measured, expected = found.measured, measured_cluster()
    assert measured is not None and expected.measured is not None
    assert measured.cores == 2 and measured.error < 1e-6
    for mine, true in zip(measured.speeds, expected.measured.speeds, strict=True):
        assert mine.kernels["fp32"]["loss"].seconds_per_flop == pytest.approx(
            true.kernels["fp32"]["loss"].seconds_per_flop, rel=1e-5
        )
    first, second = measured.speeds
    assert (first.wait_seconds, first.wait_share) == (0.0, 0.0)
    assert second.wait_seconds == pytest.approx(3e-4, rel=1e-4)
    assert second.wait_share == pytest.approx(1 / 7, rel=1e-4)
    assert first.uneven == 0.0 and second.uneven == pytest.approx(1.1 / 1.05 - 1)
    kernels = len(KERNELS) * sum(Line(1e-5, 1e-11, 1e-10).seconds(one) for one in AMOUNTS)
    assert first.reference_seconds == pytest.approx(kernels + 0.02)
    assert second.reference_seconds == pytest.approx(1.5 * kernels + 0.02)
    config = engine_config("large deep", "cpu", "fp32")
    assert measured.speeds[0].in_layer == pytest.approx(0.8)
    work = workload_of(config, 1)
    assert step_time(work, found).seconds == pytest.approx(step_time(work, expected).seconds)
    for kind in COLLECTIVES:
        line = measured.collective(kind, 4)
        assert line is not None and line.seconds((1.0, 0.0, 1e6)) == pytest.approx(1.05e-3)
    assert found.device.peak("fp32") == pytest.approx(1e11)
    assert found.device.memory_bytes == pytest.approx(8e9)

    # One rank has no link; those of another cluster serve.
    alone = Request("cpu", 1, 2, ("fp32",))
    with pytest.raises(ConfigError, match="one rank has no link to measure: give --links"):
        measure(alone, "now", (), 100.0, lambda text: None)
    given = (Link("mine", 0, 1e9, 1e-6),)
    assert measure(alone, "now", given, 100.0, lambda text: None).links == given


def test_more_ranks_than_the_machine_has() -> None:
    """Catches processes that are started for a number no machine here can measure."""
    assert checked_ranks(None, "cpu", 0, 2) == 4
    assert checked_ranks(8, "cpu", 0, 2) == 8
    with pytest.raises(ConfigError, match=r"--ranks \(9\) must be at most 8: 4 for each of 2"):
        checked_ranks(9, "cpu", 0, 2)
    with pytest.raises(ConfigError, match=r"--ranks \(2\) must be at most 1: this machine has 1"):
        checked_ranks(2, "cuda", 1, 16)


def test_torch_is_asked_for_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seconds of imports for a machine without a GPU, and a GPU that torch cannot use."""
    asked: list[Mapping[str, Any]] = []
    facts = {"devices": 0}

    def run_task(task: Mapping[str, Any], limit: float) -> list[dict[str, Any]]:
        asked.append(task)
        return [facts]

    monkeypatch.setattr(machine, "run_task", run_task)
    monkeypatch.setattr(machine, "has_accelerator", lambda: False)
    assert device_of_machine("cpu") == device_of_machine("auto") == ("cpu", 0)
    assert not asked
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        device_of_machine("cuda")
    monkeypatch.setattr(machine, "has_accelerator", lambda: True)
    assert device_of_machine("auto") == ("cpu", 0)
    facts["devices"] = 4
    assert device_of_machine("auto") == ("cuda", 4)
    assert [task["facts"] for task in asked] == [True] * 3
