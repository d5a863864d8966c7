"""pass@k: probability that one of k samples solves a problem, by the unbiased estimator.

- Of n samples, c are right. Of all choices of k among the n, the share with no right one is
  C(n-c, k) / C(n, k); pass@k is the rest.
- Whole numbers and one division: no product of many rounded factors.
- A task's pass@k is the mean over its problems; its standard error is that of the mean.

Alternatives considered:
- 1 - (1 - c/n)^k: too low, by more the fewer samples there are.

Source: Chen et al. 2021 (arXiv:2107.03374), section 2.1.
"""

from collections.abc import Sequence
from math import comb, sqrt

from k2train.errors import UserError


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate pass@k of one problem from `samples` samples, of which `correct` are right.

    Raises UserError when there are fewer samples than k.
    """
    check_k(samples, [k])
    assert 0 <= correct <= samples, f"{correct} of {samples} samples are right"
    return 1 - comb(samples - correct, k) / comb(samples, k)


def check_k(samples: int, ks: Sequence[int]) -> None:
    """Raise UserError when a k cannot be estimated from so many samples."""
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(
                f"--k ({k}) must be from 1 to --samples ({samples}): take more samples, or a "
                "smaller k"
            )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of problems and its standard error; no error of fewer than two."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, sqrt(variance / count)
