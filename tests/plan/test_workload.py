"""Workloads: parameters, FLOPs and stages of models beyond this project's configs."""

import pytest

from k2train.errors import ConfigError
from k2train.plan import cost
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.workload import Workload, uneven_layers

LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128256)
K2 = ModelShape(80, 8192, 22016, 64, 64, 32032)


def test_parameters_are_the_published_ones() -> None:
    """Catches grouped heads, a third matrix or an embedding counted wrongly."""
    # Meta's Llama 3 8B has 8,030,261,248 parameters, LLM360's K2 65,286,184,960.
    assert Workload(LLAMA_8B, 8192, 1, 8).parameters == 8_030_261_248
    assert Workload(K2, 2048, 1, 8).parameters == 65_286_184_960
    # GPT-2's largest with rotary positions: no position table, no biases; tied, two matrices.
    gpt = Workload(ModelShape(48, 1600, 6400, 25, 25, 50257), 1024, 1, 8, gated=False, tied=True)
    assert gpt.parameters == pytest.approx(1.557e9, rel=2e-3)


def test_counts_agree_with_those_of_a_config() -> None:
    """Catches a second formula that drifts from `plan.cost`."""
    work = Workload(K2, 2048, 4, 2040, tensor=8, pipeline=4, data=15)
    layout = Layout(8, 4, 15)
    for pp in range(4):
        assert work.rank_parameters(pp) == cost.rank_parameters(K2, layout, pp)
    assert work.model_flops == cost.flops_per_token(K2, 2048) * 2040 * 2048
    assert work.num_microbatches == 34


def test_a_tied_table_is_on_both_ends_and_once_on_one_rank() -> None:
    """Catches a tied embedding counted twice on one rank, or missing on the last."""
    shape = ModelShape(4, 64, 256, 4, 4, 1000)
    one = Workload(shape, 64, 1, 4, tied=True, gated=False)
    assert one.rank_parameters(0) == one.parameters
    two = Workload(shape, 64, 1, 4, pipeline=2, tied=True, gated=False)
    extra = sum(map(two.rank_parameters, (0, 1))) - two.parameters
    assert extra == shape.vocab_size * shape.hidden_size


def test_stages_that_do_not_divide_take_from_the_ends() -> None:
    """Catches a middle stage that is short: the zero-bubble papers' 22 layers on 8 ranks."""
    assert uneven_layers(22, 8) == (2, 3, 3, 3, 3, 3, 3, 2)
    assert uneven_layers(24, 8) is None
    counts = uneven_layers(10, 4)
    assert counts == (2, 3, 3, 2)


def test_what_cannot_be_is_refused_with_its_numbers() -> None:
    """Catches a batch rounded down in silence, and stages without a layer."""
    with pytest.raises(ConfigError, match=r"batch of 10 .* ranks \(3\) x .* \(2\) = 6"):
        Workload(K2, 2048, 2, 10, data=3)
    with pytest.raises(ConfigError, match=r"80 layers are too few for 81 pipeline ranks"):
        Workload(K2, 2048, 1, 8, pipeline=81)
