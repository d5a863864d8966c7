"""Pipeline load balance with the head, against trying every split of layers."""

from dataclasses import replace
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.plan.balance import balanced_layers, head_flops, rank_flops, stage_flops, with_layers
from k2train.plan.cost import ModelShape, flops_per_token
from k2train.plan.layout import Layout
from k2train.plan.schedule import pipeline_layout

SMALL = ModelShape(8, 256, 688, 8, 8, 8192)


def test_stages_add_up_to_the_model() -> None:
    """Catches a head counted nowhere, twice, or on the wrong rank of a V."""
    for kind, v in (("1f1b", 1), ("interleaved", 2), ("zb-v", 2)):
        layout = pipeline_layout(kind, 2, v)
        each = [stage_flops(SMALL, layout, stage, 256) for stage in range(layout.num_stages)]
        assert sum(each) == sum(rank_flops(SMALL, layout, 256)) == flops_per_token(SMALL, 256)
        assert each[-1] - each[0] == head_flops(SMALL)
    assert (
        rank_flops(SMALL, pipeline_layout("zb-v", 2, 2), 256)[0] > rank_flops(SMALL, layout, 256)[1]
    )


@given(
    st.integers(1, 3),
    st.sampled_from(("1f1b", "interleaved", "zb-v")),
    st.integers(1, 12),
    st.sampled_from((32, 8192, 40000)),
)
@settings(max_examples=60, deadline=None)
def test_no_other_split_has_a_faster_slowest_rank(
    pipeline: int, kind: str, num_layers: int, vocab_size: int
) -> None:
    """Catches a hint that makes the pipeline slower, or that leaves a stage empty or a layer
    out.
    """
    shape = ModelShape(num_layers, 256, 688, 8, 8, vocab_size)
    layout = pipeline_layout(kind, pipeline, 1 if kind == "1f1b" else 2)
    found = balanced_layers(shape, layout, 256)

    if num_layers < layout.num_stages:
        assert found is None
        return
    assert found is not None and min(found) >= 1 and sum(found) == num_layers
    best = min(
        max(rank_flops(shape, with_layers(layout, split), 256))
        for split in splits(num_layers, layout.num_stages)
    )
    assert max(rank_flops(shape, with_layers(layout, found), 256)) == best


def splits(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write `total` as so many counts of at least 1, in order."""
    borders = [(0, *cut, total) for cut in combinations(range(1, total), parts - 1)]
    return [tuple(b - a for a, b in pairwise(border)) for border in borders]


def test_the_stage_with_the_head_gets_fewer_layers() -> None:
    """Catches a deal that looks at ranks only: in a V the head's rank has another stage to give
    layers to.
    """
    assert balanced_layers(SMALL, Layout(pipeline=2), 256) == (5, 3)
    assert balanced_layers(SMALL, pipeline_layout("zb-v", 2, 2), 256) == (2, 3, 2, 1)
    assert balanced_layers(replace(SMALL, num_layers=16), pipeline_layout("zb-v", 2, 2), 256) == (
        5,
        5,
        4,
        2,
    )
