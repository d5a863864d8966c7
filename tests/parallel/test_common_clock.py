"""One clock for all ranks: offsets of clocks that are apart, and of ranks on one machine."""

import time

import pytest

from k2train.launch.environment import Launch
from k2train.parallel import common_clock
from k2train.parallel.common_clock import CommonTime, agree_on_time, offset_of
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import grid_of, tiny_config

AHEAD = 1e6
"""Seconds that a clock is ahead: far more than any exchange takes."""


def test_the_offset_is_a_median_with_its_error() -> None:
    """Catches an offset of the wrong sign, and one late rank of one round that moves all times."""
    rounds = [[10.0, 60.0], [20.0, 70.5], [30.0, 99.0], [40.0, 90.5], [50.0, 100.5]]
    assert offset_of(rounds, 0) == (0.0, 0.0)
    offset, error = offset_of(rounds, 1)
    assert offset == 50.5 and error == pytest.approx(9.5)


def _agree(launch: Launch, machines: list[str]) -> tuple[CommonTime, float]:
    """What a rank agrees on, where rank 1 has another clock; and its reading of that clock."""

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + AHEAD * launch.rank

    common_clock.time = Clock  # type: ignore[assignment]
    try:
        shared = agree_on_time(grid_of(launch, tiny_config()), machines[launch.rank])
        return shared, Clock.monotonic()
    finally:
        common_clock.time = time


def test_clocks_of_two_machines_count_from_one_moment(pool: GlooPool) -> None:
    """Catches lanes of two machines that are a million seconds apart, and machines taken for one
    because neither has a name.
    """
    for machines in (["a", "b"], ["", ""]):
        shared = pool.run(2, _agree, machines)
        since = [now - one.zero for one, now in shared]
        # Bounded by how long the test itself took, whatever the load.
        assert all(0 <= seconds < AHEAD / 10 for seconds in since)
        assert shared[0][0].how == "clocks of machines, compared 9 times"
    same = pool.run(2, _agree, ["a", "a"])
    assert same[0][0].error_seconds == 0.0 and "one machine" in same[0][0].how
    assert same[0][0].zero == same[1][0].zero
