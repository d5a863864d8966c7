"""Lines of a measured machine: what they count, and which entry a number of ranks takes."""

import pytest

from k2train.errors import ConfigError
from k2train.plan.measured import (
    Line,
    attention_amount,
    kernel_line,
    loss_amount,
    product_amount,
    weight_amount,
)
from tests.support.measured import measured_machine


def test_amounts_are_flops_and_bytes() -> None:
    """Catches a factor of two in FLOPs, fp32 sums left out, and a block without its start."""
    assert product_amount(8, 2, 4, 4) == (1.0, 128, 4 * (16 + 8 + 32))
    # The sum [2, 4] is read and written in fp32, whatever the factors are.
    assert weight_amount(8, 2, 4, 2) == (1.0, 128, 2 * (16 + 32) + 2 * 4 * 8)
    starts, flops, size = attention_amount(1, 1, 128, 32, 4)
    # Of 128 x 128 pairs two blocks of 64 queries see 64 and 128 keys.
    pairs = 64 * 64 + 64 * 128
    assert (starts, flops, size) == (2, 4 * pairs * 32, 4 * pairs)
    assert loss_amount(8, 2, 16, 4, 3) == (3.0, 6 * 8 * 2 * 16, 4 * 8 * 16)
    assert Line(1e-3, 1e-6, 1e-9).seconds((2.0, 10.0, 100.0)) == pytest.approx(2.0101e-3)


def test_ranks_beyond_the_cores_take_the_lines_of_as_many_as_compute() -> None:
    """Catches a crowded machine that is timed as an idle one, and a GPU that shares cores."""
    machine = measured_machine(cores=2)
    assert [machine.speed(ranks).ranks for ranks in (1, 2, 3, 8)] == [1, 2, 2, 2]
    assert [measured_machine(cores=None).speed(ranks).ranks for ranks in (1, 8)] == [1, 2]
    assert not machine.noisy and measured_machine(spread=0.31).noisy
    with pytest.raises(ConfigError, match="measured in fp32, not in bf16"):
        kernel_line(machine.speeds[0], "bf16", "add")
