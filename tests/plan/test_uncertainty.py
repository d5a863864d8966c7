"""Intervals of predicted steps: from named parts, wider where nothing was measured."""

import math
from dataclasses import replace

import pytest

from k2train.plan.cost import ModelShape
from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.uncertainty import NORMAL_90, interval
from k2train.plan.workload import Workload

DEVICE = Device("A", "ampere", {"bf16": 312e12}, 80e9, 2e12, 400.0)
CLUSTER = Cluster("c", DEVICE, (Link("nvlink", 8, 300e9, 4e-6), Link("network", 0, 25e9, 8e-6)))
WORK = Workload(ModelShape(8, 8192, 22016, 64, 64, 32000), 2048, 2, 64, tensor=2, data=8)


def test_the_interval_is_its_parts() -> None:
    """Catches an interval that no named uncertainty explains."""
    found = interval(WORK, CLUSTER)
    spread = math.sqrt(sum(part**2 for part in found.parts.values()))
    assert math.log(found.high / found.seconds) == pytest.approx(NORMAL_90 * spread)
    assert found.low * found.high == pytest.approx(found.seconds**2)
    assert set(found.parts) == {
        "program",
        "link",
        "matmul efficiency",
        "attention",
        "memory",
        "overlap",
        "host",
    }


def test_a_step_that_waits_for_its_host_is_not_sure() -> None:
    """Catches a small model's step, all kernel starts, with the interval of a large one's."""
    small = Workload(ModelShape(8, 256, 704, 4, 4, 8192), 256, 2, 16, data=8)
    parts = interval(small, CLUSTER).parts
    # Half or twice of all that the host takes is e^0.7 of nearly the whole step.
    assert 0.6 < parts["host"] < 0.7
    assert interval(WORK, CLUSTER).parts["host"] < 0.02


def test_a_step_bound_by_links_is_less_sure() -> None:
    """Catches one percentage for every step."""
    across = replace(WORK, tensor=16, data=1)
    assert interval(across, CLUSTER).parts["link"] > 3 * interval(WORK, CLUSTER).parts["link"]


def test_a_machine_never_calibrated_says_so_and_is_wide() -> None:
    """Catches a guess that looks like a measurement."""
    new = replace(CLUSTER, device=replace(DEVICE, generation="blackwell"))
    found, known = interval(WORK, new), interval(WORK, CLUSTER)
    assert known.calibrated and not found.calibrated
    assert math.log(found.high / found.seconds) > 1.8 * math.log(known.high / known.seconds)


def test_rows_of_another_precision_are_no_calibration() -> None:
    """Catches a generation that is sure of bf16 because its fp8 was published."""
    peaks = {"bf16": 2500e12, "fp8": 5000e12, "mxfp8": 5000e12, "nvfp4": 10000e12}
    device = replace(DEVICE, generation="blackwell", peak_flops=peaks)
    new = replace(CLUSTER, device=device)
    found = {one: interval(replace(WORK, precision=one), new) for one in peaks}
    assert [one for one, each in found.items() if not each.calibrated] == ["bf16"]
    spread = {one: math.log(each.high / each.seconds) for one, each in found.items()}
    assert spread["bf16"] > 1.5 * spread["nvfp4"] > 1.5 * max(spread["mxfp8"], spread["fp8"])
    # The narrower, the less sure its products; the link's part grows as these get faster.
    own = [found[one].parts.get(f"{one} products", 0.0) for one in ("nvfp4", "mxfp8", "fp8")]
    assert own == sorted(own, reverse=True) and own[1] > 0.01 and own[2] == 0.0
