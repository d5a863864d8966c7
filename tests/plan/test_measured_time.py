"""Steps of a measured machine: counted by hand, and by layout."""

from dataclasses import replace

import pytest

from k2train.plan.cost import ModelShape
from k2train.plan.efficiency import constants_of
from k2train.plan.layer_time import LayerTime
from k2train.plan.measured_time import MeasuredTime, time_of
from k2train.plan.step_time import step_time
from k2train.plan.uncertainty import interval
from k2train.plan.workload import Workload
from tests.support.measured import measured_cluster

WORK = Workload(
    ModelShape(2, 64, 96, 2, 2, 256), 64, 2, 8, precision="fp32", sequence_parallel=False
)
CPU = measured_cluster()


def test_a_layer_is_counted_by_hand() -> None:
    """Catches a product, a norm or a residual sum that is left out, host time that is, and a start
    that counts although the host time of a layer has it."""
    time = time_of(WORK, CPU, constants_of("cpu"))
    assert isinstance(time, MeasuredTime)
    n, h, f = 128, 64, 96

    def line(flops: float, elements: float, start: float = 0.0) -> float:
        # In a layer a kernel takes 0.8 of its line, and on a GPU of its start.
        return 0.8 * (start + 1e-11 * flops + 4e-10 * elements)

    shapes = [(h, 3 * h), (h, h), (h, 2 * f), (f, h)]
    products = sum(line(2 * n * k * m, n * k + k * m + n * m) for k, m in shapes)
    elementwise = 4 * line(0, n * h) + line(0, 3 * n * h) + line(0, 2 * n * f)
    pairs = 2 * 2 * 64 * 64
    # Its starts are those of blocks: more of them for a longer sequence.
    attention = line(4 * pairs * 32, pairs, 1e-5)
    forward = time.forward()
    assert forward.terms["matmul"] == pytest.approx(products)
    assert forward.terms["memory-bound"] == pytest.approx(elementwise)
    assert forward.terms["attention"] == pytest.approx(attention)
    assert forward.seconds == pytest.approx(products + elementwise + attention + 1e-4)

    device = MeasuredTime(WORK, measured_cluster(cores=None), constants_of("cpu")).forward()
    assert device.terms["matmul"] == pytest.approx(products + 4 * 0.8e-5)
    assert device.terms["memory-bound"] == pytest.approx(elementwise + 6 * 0.8e-5)
    assert device.terms["attention"] == pytest.approx(attention)
    assert isinstance(time_of(WORK, replace(CPU, measured=None), constants_of("cpu")), LayerTime)


def test_a_tensor_parallel_layer_pays_its_collectives() -> None:
    """Catches sums that are free, counted on one pass only, or of the wrong size."""
    two = replace(WORK, tensor=2)
    time = MeasuredTime(two, CPU, constants_of("cpu"))
    # Two all-reduces of [128, 64] fp32, forward and backward.
    each = 2 * (5e-5 + 4 * 128 * 64 * 1e-9)
    assert time.forward().terms["tensor traffic"] == pytest.approx(each)
    assert time.input_backward().terms["tensor traffic"] == pytest.approx(each)
    split = MeasuredTime(replace(two, sequence_parallel=True), CPU, constants_of("cpu"))
    assert split.forward().terms["tensor traffic"] == pytest.approx(2 * each)


def test_layouts_of_a_step() -> None:
    """Catches a step without its optimizer, gradients whose copy is free or half as large, and
    crowded cores that are free."""
    one = step_time(WORK, CPU)
    assert sum(one.terms.values()) == pytest.approx(one.seconds)
    count = WORK.rank_parameters(0)
    assert one.terms["optimizer"] == pytest.approx(1e-9 * count)
    assert one.terms["step overhead"] == 5e-4

    halves = step_time(replace(WORK, data=2), CPU)
    # Half of the update, and gradients and weights on their way.
    assert halves.terms["data traffic"] == pytest.approx(2 * (5e-5 + 4 * count * 1e-9))
    # The fp32 sums are copied into the transfer, twice their bytes, while the other rank does so.
    copied = 0.8 * 1.5 * (1e-5 + 4e-10 * 2 * count)
    assert halves.terms["optimizer"] == pytest.approx(1e-9 * count / 2 + copied)
    pipeline = replace(WORK, pipeline=2)
    assert step_time(pipeline, CPU).bubble > 0.1
    for crowded in (replace(WORK, data=4), replace(pipeline, tensor=2, data=2)):
        roomy = step_time(crowded, measured_cluster(cores=64)).seconds
        assert step_time(crowded, CPU).seconds > 1.3 * roomy


def test_a_noisy_machine_has_a_wider_interval() -> None:
    """Catches a measurement among other programs that is as sure as a quiet one."""
    quiet, noisy = (interval(WORK, measured_cluster(spread=s)) for s in (0.29, 0.31))
    assert quiet.calibrated and not noisy.calibrated
    assert noisy.high / noisy.seconds > 1.3 * quiet.high / quiet.seconds
    assert quiet.low < quiet.seconds < quiet.high
