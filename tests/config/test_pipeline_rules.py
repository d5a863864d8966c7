"""Rules on the pipeline: what `auto` may be combined with, and what it cannot divide."""

from typing import Any

import pytest

from tests.support.tiny_model import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"pipeline": 6, "layers_per_stage": "auto"},
            "model.num_layers (4) must be at least parallel.pipeline (6) * "
            "parallel.stages_per_rank (1) = 6; nearest parallel.pipeline: 4; "
            "nearest model.num_layers: 6",
        ),
        (
            {
                "pipeline": 3,
                "layers_per_stage": "auto",
                "stages_per_rank": 2,
                "schedule": "interleaved",
            },
            "model.num_layers (4) must be at least parallel.pipeline (3) * "
            "parallel.stages_per_rank (2) = 6; nearest parallel.pipeline: 2; "
            "nearest model.num_layers: 6",
        ),
        (
            {"pipeline": 3, "schedule": "auto", "layers_per_stage": None},
            "model.num_layers (4) must be divisible by parallel.pipeline (3) * "
            "parallel.stages_per_rank (1) = 3; nearest parallel.pipeline: 2, 4; "
            "nearest model.num_layers: 3, 6; or parallel.layers_per_stage: auto",
        ),
        (
            {"pipeline": 2, "schedule": "auto", "layers_per_stage": (1, 1, 2)},
            "parallel.layers_per_stage (1, 1, 2) must have parallel.pipeline (2) * "
            "parallel.stages_per_rank (1) = 2 counts, has 3; nearest parallel.pipeline: 3; "
            "or null: as many layers on every stage",
        ),
        (
            {"pipeline": 2, "stages_per_rank": 2, "schedule": "1f1b", "layers_per_stage": "auto"},
            "parallel.schedule (1f1b) runs 1 stage a rank, but parallel.stages_per_rank is 2; "
            "set parallel.stages_per_rank: 1 or parallel.schedule: interleaved or zb-v",
        ),
        (
            {"pipeline": 2, "layers_per_stage": "even"},
            "Input should be 'auto'",
        ),
    ),
)
def test_what_auto_cannot_divide_is_one_line(changes: dict[str, Any], message: str) -> None:
    """Catches a start that fails later, or a hint that leads to another mistake."""
    with pytest.raises(ValueError) as refused:
        tiny_config(**{f"parallel__{key}": value for key, value in changes.items()})
    assert [text for text in str(refused.value).splitlines() if message in text]


def test_auto_needs_no_even_stages() -> None:
    """Catches a rule for even stages that is held against a cut to be chosen, as by default."""
    assert tiny_config(parallel__pipeline=3) == tiny_config(
        parallel__pipeline=3, parallel__layers_per_stage="auto"
    )
    # Two stages a rank are the most that may be taken: one divides the layers.
    assert tiny_config(parallel__pipeline=4, parallel__schedule="auto", parallel__stages_per_rank=3)
    recompute = {"kernels__recompute": "full", "kernels__recompute_layers": 3}
    assert tiny_config(parallel__pipeline=2, parallel__layers_per_stage="auto", **recompute)
    with pytest.raises(ValueError, match=r"at most the layers of a pipeline stage \(2\)"):
        tiny_config(parallel__pipeline=2, parallel__layers_per_stage=None, **recompute)
