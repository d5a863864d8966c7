"""The Triton norm against the formula written out in float64, and against its unfused form."""

from itertools import product

import torch
from torch import Tensor

from k2train.launch.environment import Launch
from k2train.model.kernels.elementwise import reference_norm
from tests.support.gloo_pool import GlooPool

# Relative to the largest value: half a unit in the last place of bf16, or fp32 sums of a row.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
EPS = 1e-3


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_near(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == dtype, name
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], f"{name}: {float(error):.1e}"


def values_job(launch: Launch) -> None:
    """Norm and norm of a sum, with their gradients, in both precisions and at odd sizes."""
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.triton_kernels import norm

    norm.WEIGHT_BLOCKS = 4
    # Rows that do not divide into blocks, features that are no power of two, one of each.
    for dtype, shape in product(TOLERANCE, ((7, 2, 48), (1, 1, 1), (3, 3, 129), (5, 1, 64))):
        x, delta = (0.05 * randn(*shape, seed=s, dtype=dtype) for s in (1, 2))
        weight, dy, dtotal = (
            (1 + randn(shape[-1], seed=3)).to(dtype),
            randn(*shape, seed=4, dtype=dtype),
            randn(*shape, seed=5, dtype=dtype),
        )
        for added in (False, True):
            leaves = [t.clone().requires_grad_() for t in (x, delta, weight)]
            total, y = norm.add_norm(leaves[0], leaves[1] if added else None, leaves[2], EPS)
            assert torch.equal(total, x + delta if added else x), "the sum is not torch's"
            torch.autograd.backward((total, y), (dtotal, dy))

            # In float64, from the sum as it is rounded.
            s = total.detach().double().requires_grad_()
            w = weight.double().requires_grad_()
            expected = reference_norm(s, w, EPS)
            torch.autograd.backward((s, expected), (dtotal.double(), dy.double()))
            assert s.grad is not None and w.grad is not None
            assert_near("y", y.detach(), expected.detach(), dtype)
            assert_near("dx", leaves[0].grad, s.grad, dtype)
            assert_near("dw", leaves[2].grad, w.grad, dtype)
            assert not added or torch.equal(leaves[0].grad, leaves[1].grad)

            # The norm alone, as a layer computes it again: the same bits.
            alone = leaves[2].detach().clone().requires_grad_(), total.detach().requires_grad_()
            again = norm.norm(alone[1], alone[0], EPS)
            assert torch.equal(again, y), "computed again, the norm has other bits"
            again.backward(dy)
            assert torch.equal(alone[0].grad, leaves[2].grad)


def test_norms_and_sums(interpreter: GlooPool) -> None:
    """Catches a wrong backward, the residual's gradient left out or rounded twice, sums in bf16, a
    last block of rows left out, and a norm that differs when a layer recomputes it.
    """
    interpreter.run(1, values_job)


def shapes_job(launch: Launch) -> None:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.triton_kernels.norm import add_norm, norm

    weight = torch.ones(8, requires_grad=True)
    empty = torch.zeros(0, 3, 8, requires_grad=True)
    norm(empty, weight, EPS).sum().backward()
    assert empty.grad.shape == (0, 3, 8) and torch.equal(weight.grad, torch.zeros(8))

    # Other strides, forward and backward.
    x, dy = randn(4, 6, 8, dtype=torch.float32), randn(4, 6, 8, seed=1, dtype=torch.float32)
    grads = []
    for strided in (False, True):
        leaf = x.clone().requires_grad_()
        given = leaf.transpose(0, 1).contiguous().transpose(0, 1) if strided else leaf
        y = norm(given, weight, EPS)
        y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1) if strided else dy)
        grads.append((y.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    # Only one of the two results is used.
    for used in (0, 1):
        leaf, w = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
        add_norm(leaf, None, w, EPS)[used].backward(dy)
        assert torch.equal(leaf.grad, dy) if used == 0 else leaf.grad.isfinite().all()
        assert (w.grad is None) == (used == 0)

    # What is not finite stays in its row, and reaches the weight.
    for value in (float("nan"), float("inf"), 3e38):
        leaf, w = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
        with torch.no_grad():
            leaf[1, 2, 3] = value
        y = norm(leaf, w, EPS)
        plain = reference_norm(leaf.detach(), weight.detach(), EPS)
        assert torch.equal(y.isfinite(), plain.isfinite())
        y.backward(dy)
        bad = ~leaf.grad.isfinite().all(-1)
        assert bad.sum() <= 1 and (bad[1, 2] or value == 3e38)


def test_sizes_strides_and_what_is_not_finite(interpreter: GlooPool) -> None:
    """Catches a launch of no programs, memory read instead of indices, a gradient expected where
    none comes, and a NaN that is hidden or spreads.
    """
    interpreter.run(1, shapes_job)
