"""Lanes of the tests: which cases of a long parametrized test also run without `--all`.

- The quick lane keeps one case of every code path. The others differ from it by numbers.
- Continuous integration runs every case (`.ci/run`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def lanes(
    names: str | tuple[str, ...], cases: Sequence[Any], quick: Callable[[Any], bool]
) -> tuple[str | tuple[str, ...], list[Any]]:
    """Arguments of `parametrize`: cases that are not `quick` are marked slow.

    With one name a case is its value, with several a tuple of values.
    """
    assert any(map(quick, cases)), "the quick lane keeps no case"
    assert not all(map(quick, cases)), "no case is slow, so nothing has to be chosen"
    marks = [() if quick(case) else (pytest.mark.slow,) for case in cases]
    values = [(case,) if isinstance(names, str) else case for case in cases]
    return names, [pytest.param(*v, marks=m) for v, m in zip(values, marks, strict=True)]
