"""`inference/options.py`: catches an option out of its range that is taken."""

import pytest

from k2train.errors import UserError
from k2train.inference.options import Sampling


@pytest.mark.parametrize(
    ("options", "told"),
    (
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k"),
        ({"top_k": 5}, "--temperature above 0"),
        ({"top_p": 0.5}, "--temperature above 0"),
    ),
)
def test_a_wrong_option_is_named(options: dict[str, float], told: str) -> None:
    """Catches a top-k that greedy choice ignores in silence, and an endless or empty choice."""
    with pytest.raises(UserError, match=told):
        Sampling(**options)  # type: ignore[arg-type]
