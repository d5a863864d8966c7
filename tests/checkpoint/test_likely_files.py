"""Files that probably hold a rank's values: enough on every layout, few on a large one."""

import itertools
from collections.abc import Iterator

import pytest

from k2train.checkpoint.likely_files import likely_files, saved_layout
from k2train.checkpoint.run_facts import LayoutFacts
from k2train.parallel.shard import even_slice
from k2train.plan.layout import Coordinate, Layout

SHAPES = ((64, 48, 0), (63, 48, 0), (64, 80, 1), (31, 16, None), (251, 24, 0))
"""Rows, columns, and the dimension that tensor parallelism cuts."""
Box = tuple[range, range]


def box(shape: tuple[int, int, int | None], layout: Layout, tp: int, dp: int) -> Box:
    """Rows and columns that a rank holds."""
    sizes, dim = list(shape[:2]), shape[2]
    low = [0, 0]
    if dim is not None:
        start, stop = even_slice(sizes[dim], layout.tensor, tp)
        low[dim], sizes[dim] = start, stop - start
    start, stop = even_slice(sizes[0], layout.data, dp)
    rows = range(low[0] + start, low[0] + stop)
    return rows, range(low[1], low[1] + sizes[1])


def overlap(a: Box, b: Box) -> bool:
    return all(max(x.start, y.start) < min(x.stop, y.stop) for x, y in zip(a, b, strict=True))


def needed(layout: Layout, rank: int, saved: Layout) -> Iterator[tuple[int, int]]:
    """Saved (tp, dp) whose files hold a value of this rank, found by looking at all of them."""
    at = layout.coordinate(rank)
    for shape in SHAPES:
        mine = box(shape, layout, at.tp, at.dp)
        for tp, dp in itertools.product(range(saved.tensor), range(saved.data)):
            written = shape[2] is not None or tp == 0
            if written and overlap(mine, box(shape, saved, tp, dp)):
                yield tp, dp


LAYOUTS = [Layout(t, 1, d) for t, d in ((1, 1), (2, 1), (1, 4), (2, 3), (4, 2), (2, 5), (8, 2))]


@pytest.mark.parametrize(("layout", "saved"), [*itertools.product(LAYOUTS, LAYOUTS)], ids=str)
def test_they_hold_every_value(layout: Layout, saved: Layout) -> None:
    """Catches a neighbour that is left out: all side files would then be read."""
    for rank in range(layout.world_size):
        found = set(likely_files(layout, rank, saved))
        for tp, dp in needed(layout, rank, saved):
            assert dp * saved.tensor + tp in found, (rank, tp, dp)


def test_they_are_few_on_a_large_world() -> None:
    """One data-parallel rank fewer, or half the tensor parallelism: not thousands of files."""
    saved = Layout(8, 4, 512)
    for layout, most in ((Layout(8, 4, 511), 60), (Layout(4, 4, 512), 120)):
        for rank in (0, 1, 777, layout.world_size - 1):
            assert len(likely_files(layout, rank, saved)) <= most


def test_the_same_layout_needs_its_own_files() -> None:
    layout = Layout(8, 4, 15)
    assert likely_files(layout, 133, layout) == [133, 128]
    assert likely_files(layout, 133, None) == [133, 128]


def test_other_stages_are_another_layout() -> None:
    """Catches ranks that keep to their own files, and then read those of all others, when only the
    pipeline's stages are cut elsewhere.
    """
    layout = Layout(1, 4, 2)
    for saved in (Layout(1, 4, 2, 2), Layout(1, 4, 2, 1, "loop", (1, 3, 2, 2))):
        for rank in range(8):
            dp = layout.coordinate(rank).dp
            own = {saved.rank(Coordinate(pp=pp, dp=dp, tp=0)) for pp in range(4)}
            assert own <= set(likely_files(layout, rank, saved))


def test_a_layout_that_cannot_have_written_the_files_is_none() -> None:
    """Catches a manifest whose layout of a billion ranks is gone through, one after the other."""
    facts = LayoutFacts(tensor=2, pipeline=3, data=4)
    assert saved_layout(facts, 24) == saved_layout(facts, 48) == Layout(2, 3, 4)
    assert saved_layout(facts, 23) is None and saved_layout(None, 48) is None
    for odd in ({"placement": "x"}, {"placement": "v"}, {"layers_per_stage": [1]}):
        assert saved_layout(facts.model_copy(update=odd), 24) is None
