"""Kernels of a setup: what the line of a run says about choices that decide over bits."""

from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of
from tests.support.tiny_model import tiny_config


def test_the_kernels_line_says_how_gradients_are_added() -> None:
    """Catches a choice that decides over bits and is in no line, and so in no signature."""
    told = {
        choice: str(kernels_of(Setup.of(tiny_config(**choice_of(*choice)), 1)))
        for choice in (("fp32", "torch"), ("bf16", "torch"), ("fp32", "onednn"))
    }
    assert ", gradients fp32 in place, deterministic on" in told["fp32", "torch"]
    assert ", gradients rounded, deterministic on" in told["bf16", "torch"]
    assert ", gradients fp32 in two steps, deterministic on" in told["fp32", "onednn"]


def choice_of(precision: str, matmul: str) -> dict[str, str]:
    return {"precision": precision, "kernels__matmul": matmul}
