"""Square sums that are the same bits however rows are spread, and right to the last bit."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from k2train.optim.exact_norm import BINS, add_exactly, square_sums_of_rows, value_of


def bins_of(values: Tensor, tensors: int = 1, index: Tensor | None = None) -> Tensor:
    bins = torch.zeros(tensors, BINS, dtype=torch.float64)
    index = torch.zeros(len(values), dtype=torch.int64) if index is None else index
    add_exactly(bins, values, index)
    return bins


def wide_values() -> Tensor:
    """Squares from 2**-298 to 2**255 in one sum, which plain fp64 sums do not add exactly."""
    generator = torch.Generator().manual_seed(3)
    mantissa = torch.rand(2000, dtype=torch.float64, generator=generator) + 1.0
    exponent = torch.randint(-245, 255, (2000,), generator=generator)
    scale = torch.tensor([2.0 ** int(e) for e in exponent], dtype=torch.float64)
    extremes = torch.tensor([2.0**-298, 3 * 2.0**-298, 2.0**255, 0.0], dtype=torch.float64)
    return torch.cat((mantissa * scale, extremes))


def test_bins_hold_the_exact_sum() -> None:
    """Against rational numbers. Catches a lost part, a rounded power of two, a wrong bin."""
    values = wide_values()
    bins = bins_of(values)
    exact = sum((Fraction(value) for value in values.tolist()), Fraction(0))
    held = sum(
        (Fraction(v) * Fraction(2) ** (32 * n - 320) for n, v in enumerate(bins[0].tolist())),
        Fraction(0),
    )
    assert held == exact
    assert value_of(bins)[0] == float(exact)


def test_any_spread_over_ranks_gives_the_same_bits() -> None:
    """Catches bins that are rounded before they are added. Plain fp64 sums do differ."""
    values = wide_values()
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    parts = [bins_of(part) for part in shuffled.split(333)]
    assert torch.equal(torch.stack(parts).sum(0), bins_of(values))

    near = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    near = near.square()
    orders = torch.arange(2000), near.argsort(descending=True)
    sums = {float(near[order].cumsum(0)[-1]) for order in orders}
    assert len(sums) == 2, "these numbers add up alike in every order, so they show nothing"


def test_each_tensor_has_its_own_bins() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    sums = value_of(bins_of(values, 3, torch.tensor([0, 2, 0, 2])))
    assert sums.tolist() == [5.0, 0.0, 10.0]


@pytest.mark.parametrize("bad", (float("inf"), float("nan")))
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """Catches a step with a broken gradient that is applied."""
    sums = value_of(bins_of(torch.tensor([1.0, bad], dtype=torch.float64)))
    assert not torch.isfinite(sums).any()


@pytest.mark.parametrize("width", (1, 2, 5, 48, 1000))
def test_a_row_does_not_depend_on_the_others(width: int) -> None:
    """Catches a reduction that cuts its work by the number of rows, and a column left out."""
    rows = torch.randn(600, width, generator=torch.Generator().manual_seed(width))
    whole = square_sums_of_rows(rows)
    assert torch.equal(whole, torch.cat([square_sums_of_rows(part) for part in rows.split(7)]))
    assert torch.equal(whole[:1], square_sums_of_rows(rows[:1]))
    exact = torch.tensor(
        [float(sum(Fraction(x) ** 2 for x in row)) for row in rows[:20].tolist()],
        dtype=torch.float64,
    )
    assert torch.allclose(whole[:20], exact, rtol=1e-14, atol=0)
