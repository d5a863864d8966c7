"""Zero-bubble schedules against the papers: bubbles, activations, and never behind 1F1B."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.plan.schedule import build_programs
from k2train.plan.simulate import constant_seconds, idle_seconds, peak_in_flight, simulate
from k2train.plan.zero_bubble import zb_h1, zb_h2

ENOUGH = [
    (pipeline, count)
    for pipeline in range(1, 9)
    for count in sorted({2 * pipeline - 1, 2 * pipeline, 24})
]
SECONDS = st.integers(1, 20).map(lambda tenths: tenths / 10)


def length(
    kind: str, pipeline: int, count: int, f: float, i: float, w: float, transfer: float = 0.0
) -> float:
    """Seconds of a step whose ranks hold the same layers under every schedule: a half-size stage
    takes half as long.
    """
    v = 2 if kind == "zb-v" else 1
    seconds = constant_seconds(f / v, (i + w) / v, transfer, i / v, w / v)
    return max(
        span.end_seconds for span in simulate(build_programs(kind, pipeline, count, v), seconds)
    )


@pytest.mark.parametrize(("pipeline", "count"), ENOUGH)
def test_bubbles_of_the_papers(pipeline: int, count: int) -> None:
    """Catches a list that is legal and slow.

    Idle a rank: zb-h1 (p-1)(F+I-W), 1f1b (p-1)(F+I+W); zb-h2 and zb-v none.
    """
    for f, i, w in ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.0, 2.0, 1.0)):
        assert length("zb-h1", pipeline, count, f, i, w) == count * (f + i + w) + (pipeline - 1) * (
            f + i - w
        )
        assert length("1f1b", pipeline, count, f, i, w) == (count + pipeline - 1) * (f + i + w)

    for kind, v in (("zb-h2", 1), ("zb-v", 2)):
        spans = simulate(build_programs(kind, pipeline, count, v))
        assert idle_seconds(spans) == (0.0,) * pipeline, kind
        assert max(span.end_seconds for span in spans) == 3 * v * count + pipeline - 1, kind

    # The memory of zb-h2 is spent for an input gradient longer than the weights'.
    if pipeline > 1 and count >= 2 * pipeline:
        assert length("zb-h2", pipeline, count, 1, 1.5, 1) < length(
            "zb-h1", pipeline, count, 1, 1.5, 1
        )


@pytest.mark.parametrize(
    ("pipeline", "count"), [(p, m) for p in range(1, 9) for m in (1, 2, 3, p, 2 * p, 24)]
)
def test_activations_of_the_papers(pipeline: int, count: int) -> None:
    """Catches a forward or a late W too many: the same bubble, and out of memory."""
    one, two, v = (
        build_programs(*k)
        for k in (
            ("zb-h1", pipeline, count),
            ("zb-h2", pipeline, count),
            ("zb-v", pipeline, count, 2),
        )
    )
    ranks = range(pipeline)
    assert peak_in_flight(one, until_input=True) == tuple(min(count, pipeline - pp) for pp in ranks)
    assert max(peak_in_flight(one)) == max(peak_in_flight(build_programs("1f1b", pipeline, count)))

    if count >= 2 * pipeline - 1:
        assert peak_in_flight(two, until_input=True) == tuple(
            2 * (pipeline - pp) - 1 for pp in ranks
        )
        assert set(peak_in_flight(two)) == {2 * pipeline - 1}
        # In half-size stages: as many bytes as 1F1B's first rank holds.
        assert set(peak_in_flight(v)) == {2 * pipeline}

    assert max(peak_in_flight(v)) <= 2 * min(pipeline, count)


@given(
    st.integers(1, 6), st.integers(1, 14), SECONDS, SECONDS, SECONDS, st.sampled_from((0.0, 0.1))
)
@settings(max_examples=80, deadline=None)
def test_never_longer_than_1f1b(
    pipeline: int, count: int, f: float, i: float, w: float, transfer: float
) -> None:
    """Catches a W in the position where an I is waited for, whatever the three last."""
    base = length("1f1b", pipeline, count, f, i, w, transfer)
    for kind in ("zb-h1", "zb-h2"):
        assert length(kind, pipeline, count, f, i, w, transfer) <= base + 1e-9, kind
    assert (
        length("zb-v", pipeline, count, f, i, w) <= length("1f1b", pipeline, count, f, i, w) + 1e-9
    )


def test_few_micro_batches() -> None:
    """Catches a warm-up that a short step cannot pay for, and gaps that a W would have filled."""
    assert zb_h2(4, 6) == zb_h1(4, 6) and zb_h2(4, 7) != zb_h1(4, 7)
    for pipeline, count in product(range(1, 6), range(1, 9)):
        equal = {
            kind: length(kind, pipeline, count, 1, 1, 1)
            for kind in ("1f1b", "zb-h1", "zb-h2", "zb-v")
        }
        shorter = equal["1f1b"] - (pipeline - 1)
        assert max(equal["zb-h1"], equal["zb-h2"], equal["zb-v"]) <= shorter, (
            pipeline,
            count,
            equal,
        )


def test_orders_by_hand() -> None:
    """Catches a W out of its place: after as many I's as the rank is from the first (zb-h1), or
    twice that (zb-h2).
    """

    def text(program: object) -> str:
        return " ".join(map(str, program))  # type: ignore[call-overload]

    assert [text(program) for program in zb_h1(2, 3)] == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]
    assert [text(program) for program in zb_h2(2, 4)] == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3",
    ]
