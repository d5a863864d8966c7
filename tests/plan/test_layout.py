"""Parallel layout: a wrong stride puts a rank in another's group, and training hides it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.errors import ConfigError
from k2train.plan.layout import AXES, Coordinate, Layout

degrees = st.integers(1, 5)
layouts = st.one_of(
    st.builds(
        Layout, tensor=degrees, pipeline=degrees, data=degrees, stages_per_rank=st.integers(1, 3)
    ),
    st.builds(Layout, pipeline=degrees, stages_per_rank=st.just(2), placement=st.just("v")),
)


@given(layouts)
def test_rank_and_coordinate_are_inverse(layout: Layout) -> None:
    """Catches two ranks with one place, and an axis whose stride is another's."""
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank(coordinate) for coordinate in coordinates] == list(range(layout.world_size))
    assert set(coordinates) == {
        Coordinate(pp, dp, tp)
        for pp in range(layout.pipeline)
        for dp in range(layout.data)
        for tp in range(layout.tensor)
    }


@given(layouts, st.sampled_from(AXES))
def test_groups_partition_the_world_along_their_axis(layout: Layout, axis: str) -> None:
    """Catches a rank in two groups or none, and a group that mixes two axes."""
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        coordinates = [layout.coordinate(rank) for rank in group]
        assert [getattr(coordinate, axis) for coordinate in coordinates] == list(
            range(layout.degree(axis))
        )
        for other in set(AXES) - {axis}:
            assert len({getattr(coordinate, other) for coordinate in coordinates}) == 1


@given(layouts, st.sampled_from(AXES))
def test_peers_are_the_group_that_holds_a_rank(layout: Layout, axis: str) -> None:
    """Catches a shortcut that gives a rank the group of another one."""
    for group in layout.groups(axis):
        assert all(layout.peers(rank, axis) == group for rank in group)
    for rank in range(layout.world_size):
        pp = layout.coordinate(rank).pp
        stage = [r for r in range(layout.world_size) if layout.coordinate(r).pp == pp]
        assert layout.peers(rank, "stage") == tuple(stage)


def test_tensor_is_innermost_and_pipeline_outermost() -> None:
    """Catches a swapped order: the chattiest group would cross nodes."""
    layout = Layout(tensor=2, pipeline=2, data=3)
    assert layout.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert layout.groups("dp") == [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)]
    assert layout.groups("pp") == [(0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]


@given(layouts, st.integers(1, 4))
def test_every_layer_has_one_home_and_stages_follow_each_other(
    layout: Layout, layers_per_stage: int
) -> None:
    """Catches a layer lost or doubled at a stage border, and an owner that does not hold its
    stage.
    """
    num_layers = layers_per_stage * layout.num_stages
    layers = [
        layer for stage in range(layout.num_stages) for layer in layout.layers_of(stage, num_layers)
    ]
    assert layers == list(range(num_layers))
    held = sorted((stage, pp) for pp in range(layout.pipeline) for stage in layout.stages_of(pp))
    assert held == [(stage, layout.owner(stage)) for stage in range(layout.num_stages)]


def test_interleaved_stages_are_dealt_round_robin() -> None:
    """Catches the contiguous deal, under which the interleaved order waits for itself."""
    layout = Layout(pipeline=2, stages_per_rank=2)
    assert (layout.stages_of(0), layout.stages_of(1)) == ((0, 2), (1, 3))
    assert list(layout.layers_of(2, 8)) == [4, 5]


def test_a_v_goes_down_the_ranks_and_back_up() -> None:
    """Catches a loop where a V is meant: the last stage is on the first rank, and the turn within
    the last.
    """
    layout = Layout(pipeline=3, stages_per_rank=2, placement="v")
    assert [layout.stages_of(pp) for pp in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [layout.owner(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    with pytest.raises(AssertionError, match="a V has two stages a rank"):
        Layout(pipeline=3, placement="v")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_uneven_stages_hold_the_layers_they_are_given(counts: list[int]) -> None:
    """Catches a layer lost, doubled or on another stage when the split is not the even one."""
    layout = Layout(pipeline=len(counts), layers_per_stage=tuple(counts))
    held = [list(layout.layers_of(stage, sum(counts))) for stage in range(len(counts))]
    assert [len(layers) for layers in held] == counts
    assert [layer for layers in held for layer in layers] == list(range(sum(counts)))
    with pytest.raises(AssertionError, match="is not a split of"):
        layout.layers_of(0, sum(counts) + 1)


@pytest.mark.parametrize("counts", [(1, 2, 3), (0, 4), ()])
def test_a_split_over_other_stages_is_our_bug(counts: tuple[int, ...]) -> None:
    """Catches a stage without layers and a count too many."""
    with pytest.raises(AssertionError, match="must have 2 counts of at least 1"):
        Layout(pipeline=2, layers_per_stage=counts)


def test_for_world_leaves_the_rest_to_data() -> None:
    """Catches a data degree that is not what is left of the world."""
    assert Layout.for_world(480, tensor=8, pipeline=4) == Layout(tensor=8, pipeline=4, data=15)
    assert Layout.for_world(4, 1, 2, 2, "v", (1, 2, 3, 4)) == Layout(1, 2, 2, 2, "v", (1, 2, 3, 4))


@pytest.mark.parametrize(("world", "nearest"), [(10, "8, 16"), (3, "8"), (23, "16, 24")])
def test_a_world_that_does_not_divide_is_refused_with_the_nearest(world: int, nearest: str) -> None:
    """Catches ranks left out of the grid in silence, and a suggestion that is not legal either."""
    with pytest.raises(
        ConfigError,
        match=rf"{world} processes.*tensor \(4\).*pipeline \(2\) = 8; .*are: {nearest}$",
    ):
        Layout.for_world(world, tensor=4, pipeline=2)


def test_layers_that_do_not_divide_are_our_bug() -> None:
    """Catches layers dropped by a rounded-down share."""
    with pytest.raises(AssertionError, match="10 layers do not divide over 4 stages"):
        Layout(pipeline=4).layers_of(0, 10)
