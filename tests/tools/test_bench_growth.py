"""`tools/bench_growth.py`: exact counts of messages, bytes, groups and files on large worlds."""

from pathlib import Path

import bench_growth
import pytest

from benchmarks import growth
from benchmarks.growth_bounds import BOUNDS
from k2train.plan.connections import host_row_ranks

WORLDS = (480, 4096, 16384)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, growth.Found]:
    return {world: growth.growth_of(tmp_path_factory.mktemp("growth"), world) for world in WORLDS}


def numbers(found: dict[int, growth.Found], part: str, unit: str) -> list[float]:
    return [found[world][part, unit].number for world in WORLDS]


def test_nothing_grows_faster_than_it_may(found: dict[int, growth.Found]) -> None:
    """Catches quadratic work, and a part of every rank that grows with the world."""
    for (part, unit), bound in BOUNDS.items():
        grows = growth.exponent(WORLDS, numbers(found, part, unit))
        assert grows <= bound.exponent + growth.SLACK, (part, unit)


def test_counts_by_hand(found: dict[int, growth.Found]) -> None:
    """Catches a count that misses messages: a table of nothing would grow nowhere."""
    # Default, tp, dp, pp and stage; the saving thread's group, which is two above 512 ranks.
    assert numbers(found, "groups of a rank", "groups") == [6, 7, 7]
    assert numbers(found, "connections of a rank", "sockets") == [2 * 480, 4 * 64, 4 * 128]
    # One reduction each for three agreements, and the length of rank 0's message. Rank 0 is in a
    # row and among its firsts: up, along, and down.
    assert numbers(found, "nothing is wrong", "messages") == [4, 3 * 3 + 2, 3 * 3 + 2]
    # `first` reduces two numbers, the others one.
    assert numbers(found, "nothing is wrong", "bytes") == [40, 3 * 32 + 16, 3 * 32 + 16]
    # Its own 32 bytes and 32 of each rank; above 512 of its row, and of each row.
    first, *large = numbers(found, "chunk opened, rank 0", "bytes")
    assert first == 16 + 32 * (1 + 480) + 8
    for world, told in zip(WORLDS[1:], large, strict=True):
        row = host_row_ranks(world)
        assert told == 3 * 16 + 32 * (1 + row) + 32 * (row + world) + 2 * 8
    # Of 728 sums, four flags and a number of each rank, over a stage and over stages.
    assert numbers(found, "exchange of a step", "bytes") == [
        2 * 8 * (728 + growth.SECONDS + world) for world in WORLDS
    ]
    assert numbers(found, "heartbeats, start", "files") == [128] * 3
    assert numbers(found, "start, a rank reads", "files") == [5] * 3
    assert numbers(found, "rows of a step, a rank", "rows") == [1092, 128, 32]


def test_what_grows_too_fast_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a table that is printed and judged by nobody, and worlds that cannot be."""

    def told(folder: Path, world: int) -> growth.Found:
        size = {key: float(world) ** bound.exponent for key, bound in BOUNDS.items()}
        size["groups of a rank", "groups"] = world
        return {key: growth.Measured(number, 0.25) for key, number in size.items()}

    monkeypatch.setattr(growth, "growth_of", told)
    assert bench_growth.main(["--worlds", "480", "960"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(BOUNDS) + 2 and "960" in lines[0]
    assert lines[-1] == (
        "groups of a rank: groups grow with the world's power 1.00, at most 0 is allowed "
        "(its own only)"
    )
    assert bench_growth.main(["--worlds", "480", "500"]) == 2
    assert "no multiple of 32" in capsys.readouterr().err
    assert bench_growth.main(["--worlds", "480"]) == 2
