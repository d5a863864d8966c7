"""Rules on `run.exact`: each refusal names the key, the numbers and a way out."""

from typing import Any

import pytest

from k2train.config.load import check_world
from k2train.errors import ConfigError
from tests.support.tiny_model import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"batch__micro_sequences": 3, "batch__exact_unit": 2},
            "batch.micro_sequences (3) must be divisible by batch.exact_unit (2) with run.exact; "
            "nearest batch.exact_unit: 1",
        ),
        (
            {"batch__micro_sequences": 4, "batch__exact_unit": 4, "batch__exact_leaf": 6},
            "batch.exact_leaf (6) must be divisible by batch.exact_unit (4) with run.exact; "
            "nearest batch.exact_unit: 2",
        ),
        (
            {"batch__exact_leaf": 5},
            "batch.global_sequences (24) must be divisible by batch.exact_leaf (5) with run.exact; "
            "nearest batch.exact_leaf: 4, 6",
        ),
        ({"parallel__tensor": 2}, "run.exact needs parallel.tensor 1 (is 2)"),
        ({"kernels__matmul": "fp8"}, "run.exact cannot have kernels.matmul (fp8)"),
        ({"kernels__deterministic": False}, "run.exact needs kernels.deterministic true"),
        (
            {"run__exact": False, "batch__exact_unit": 2},
            "batch.exact_unit (2) has no effect with run.exact false",
        ),
        (
            {"run__exact": False, "batch__exact_leaf": 4},
            "batch.exact_leaf (4) has no effect with run.exact false",
        ),
    ),
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], message: str) -> None:
    """Catches a run whose bits are said to be the same, and are not."""
    with pytest.raises(ValueError) as refused:
        tiny_config(**{"run__exact": True, **changes})
    (line,) = [text for text in str(refused.value).splitlines() if message in text]
    assert line


def test_leaves_must_divide_the_share_of_a_rank() -> None:
    """Catches a rank that would hold half a leaf."""
    config = tiny_config(run__exact=True, batch__exact_leaf=8)
    check_world(config, 3)
    with pytest.raises(ConfigError) as refused:
        check_world(config, 2)
    assert str(refused.value) == (
        "batch.global_sequences (24) / data-parallel size (2) = 12 must be divisible by "
        "batch.exact_leaf (8) with run.exact; nearest batch.exact_leaf: 6, 12"
    )
    check_world(tiny_config(batch__exact_unit=1), 2)
