"""`checkpoint/moments.py`: catches a checkpoint said to be thinned that nobody thinned."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.checkpoint.manifest import THINNED
from k2train.checkpoint.moments import ORIGIN, why_without_moments


@pytest.mark.parametrize(
    ("merged", "marked", "extra", "expected"),
    [
        (None, False, None, ""),
        (None, True, None, "was thinned to its weights"),
        (None, True, {ORIGIN: {"folder": "hf"}}, "was imported from a Hugging Face folder"),
        ((1, 2, 3), False, {}, "was merged from 3 checkpoints"),
        ((1,), False, {}, "was merged from 1 checkpoint"),
    ],
)
def test_why(tmp_path: Path, merged: Any, marked: bool, extra: Any, expected: str) -> None:
    """Catches one reason given for another."""
    if marked:
        (tmp_path / THINNED).write_text("{}\n")
    facts = None if merged is None else SimpleNamespace(parents=merged)
    manifest: Any = SimpleNamespace(merged=facts, model_extra=extra)
    assert why_without_moments(tmp_path, manifest) == expected
