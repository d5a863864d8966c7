"""Cost model: counts against published numbers and each other.

MFU and the memory plan rest on them.
"""

from hypothesis import given
from hypothesis import strategies as st

from k2train.plan.cost import (
    ModelShape,
    embedding_parameters,
    flops_per_token,
    layer_parameters,
    parameters,
    rank_parameters,
    stage_parameters,
    state_bytes,
)
from k2train.plan.layout import Layout

K2 = ModelShape(80, 8192, 22016, 64, 64, 32032)
K2_GRID = Layout(tensor=8, pipeline=4, data=15)


def test_k2_counts_exactly() -> None:
    """Catches a forgotten norm, a tied embedding, a bias."""
    assert layer_parameters(K2) == 809_517_056
    assert embedding_parameters(K2) == 524_812_288
    assert parameters(K2) == 65_286_184_960


def test_grouped_queries_and_small_shapes_by_hand() -> None:
    """Catches key and value matrices of full width: Llama-3-8B has 8,030,261,248 parameters."""
    assert parameters(ModelShape(32, 4096, 14336, 32, 8, 128256)) == 8_030_261_248


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 5]),
    st.integers(30, 70),
)
def test_stages_and_ranks_sum_to_the_whole(
    tensor: int, pipeline: int, stages_per_rank: int, vocab_size: int
) -> None:
    """Catches an embedding on every stage, norms split over tensor ranks, and padding that is
    lost.
    """
    shape = ModelShape(40, 16, 48, 8, 4, vocab_size)
    layout = Layout(tensor, pipeline, 1, stages_per_rank)
    stages = [stage_parameters(shape, layout, stage) for stage in range(layout.num_stages)]
    assert sum(stages) == parameters(shape)
    padding = -vocab_size % tensor * 16 * 2
    copies_of_norms = (tensor - 1) * (40 * 2 + 1) * 16
    held = sum(tensor * rank_parameters(shape, layout, pp) for pp in range(pipeline))
    assert held == parameters(shape) + padding + copies_of_norms


def test_k2_flops_by_hand() -> None:
    """Catches an embedding counted as a product, a head left out, an attention halved or with heads
    left out.
    """
    matrices = 80 * (4 * 8192**2 + 3 * 8192 * 22016) + 32032 * 8192
    assert flops_per_token(K2, 2048) == 6 * matrices + 12 * 80 * 2048 * 8192
    assert flops_per_token(K2, 8192) - flops_per_token(K2, 2048) == 12 * 80 * 6144 * 8192


def test_state_bytes_of_the_fullest_and_the_emptiest_rank() -> None:
    """Catches optimizer states on every data-parallel rank, gradients in bf16, fp32 weights counted
    twice on one rank.
    """
    count = rank_parameters(K2, K2_GRID, 0)
    assert count == 20 * ((809_517_056 - 16384) // 8 + 16384) + 4004 * 8192
    state = state_bytes(K2, K2_GRID, "bf16")
    share = -(-count // 15)
    assert (state.weights_bytes, state.gradients_bytes) == (2 * count, 4 * count + 4 * share)
    assert state.optimizer_bytes == 12 * share
    assert state.total_bytes == state.weights_bytes + state.gradients_bytes + state.optimizer_bytes
    assert state_bytes(K2, K2_GRID, "fp32").weights_bytes == 4 * count
    alone = state_bytes(K2, Layout(tensor=8, pipeline=4), "bf16", pp=1)
    assert alone.total_bytes == 18 * rank_parameters(K2, K2_GRID, 1)
    assert state_bytes(
        K2, Layout(tensor=8, pipeline=4), "fp32", pp=1
    ).total_bytes == 16 * rank_parameters(K2, K2_GRID, 1)
    assert (
        rank_parameters(K2, K2_GRID, 1)
        < rank_parameters(K2, K2_GRID, 0)
        < rank_parameters(K2, K2_GRID, 3)
    )
