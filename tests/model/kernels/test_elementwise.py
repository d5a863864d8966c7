"""Fused RMSNorm, rotary split and SwiGLU against the formulas written out, in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from k2train.model.kernels.elementwise import (
    fused_norm,
    fused_split,
    fused_swiglu,
    reference_norm,
    reference_split,
    reference_swiglu,
    rotate,
)
from k2train.model.kernels.select import NORM, SPLIT, SWIGLU
from k2train.parallel.grad_accumulation import GradAccumulator, attach

# Relative to the largest value. bf16 rounds by 2^-9; what is computed in fp32 and rounded once or
# twice stays within this.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


def values(
    function: Callable[..., object], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Outputs, then gradients of the inputs for fixed gradients of the outputs, all in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [randn(*o.shape, seed=7).to(dtype) for o in outs])
    return [t.detach().double() for t in (*outs, *(leaf.grad for leaf in leaves))]


def assert_equal(
    fast: Callable[..., object],
    plain: Callable[..., object],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """`fast` in `dtype` against `plain` in float64 on the same rounded numbers."""
    rounded = [x.to(dtype).double() for x in inputs]
    found, expected = values(fast, rounded, dtype), values(plain, rounded, torch.float64)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a - b).abs().max() / b.abs().max()
        assert error <= TOLERANCE[dtype], f"value {index}: {error:.1e}"


def tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = randn(length, 1, 1, head_dim // 2, seed=3)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(NORM))
def test_norms(name: str, dtype: torch.dtype) -> None:
    """Catches a wrong backward of the norm, a missing epsilon, and sums left in bf16."""
    small = 0.03 * randn(9, 3, 48)
    assert_equal(
        lambda x, w: NORM[name](x, w, 1e-3),
        lambda x, w: reference_norm(x, w, 1e-3),
        (small, 1 + randn(48)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_adds_to_its_sum_once(dtype: torch.dtype) -> None:
    """Catches a weight gradient that is lost, counted twice, or not rounded as autograd's is."""
    x, g = randn(6, 2, 20).to(dtype), randn(6, 2, 20, seed=7).to(dtype)
    alone, summed = (nn.Parameter(randn(20).to(dtype)) for _ in range(2))
    arrived: list[None] = []
    total = torch.full((20,), 3.0)
    attach(summed, GradAccumulator(total, lambda: arrived.append(None)))

    for weight in (alone, summed):
        fused_norm(x, weight, 1e-5).backward(g)

    assert alone.grad is not None and summed.grad is None
    assert torch.equal(total, 3.0 + alone.grad.float()) and len(arrived) == 1


@settings(max_examples=25, deadline=None)
@given(
    s=st.integers(1, 7),
    b=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 5),
)
def test_splits(s: int, b: int, kv: int, group: int, half: int) -> None:
    """Catches heads mixed up, grouped heads, a rotation the wrong way in the backward, odd lengths,
    long tables.
    """
    cos, sin = tables(s + 2, 2 * half)
    packed = randn(s, b, (group + 2) * kv * 2 * half)
    for dtype in DTYPES:
        assert_equal(
            lambda x: fused_split(x, cos, sin, group * kv, kv),
            lambda x: reference_split(x, cos, sin, group * kv, kv),
            (packed,),
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((5, 2, 14), (1, 1, 2), (64, 3, 96)))
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches gate and up exchanged, and a gradient of one of them."""
    assert_equal(fused_swiglu, reference_swiglu, (3 * randn(*shape),), dtype)


def strided(x: Tensor) -> Tensor:
    """The same values with other strides."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_other_strides_give_the_same_bits() -> None:
    """Catches a function that reads memory instead of indices, forward or backward."""
    cos, sin = tables(6, 4)
    cases: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (lambda x, w: fused_norm(x, w, 1e-5), (randn(6, 3, 20), randn(20))),
        (lambda x: fused_split(x, cos, sin, 3, 1), (randn(6, 3, 20),)),
        (fused_swiglu, (randn(6, 3, 20),)),
    ]
    for function, inputs in cases:
        plain = values(function, inputs, torch.float32)
        moved = values(lambda x, *rest, f=function: f(strided(x), *rest), inputs, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))

    x = randn(6, 3, 20).float().requires_grad_()
    gradient = randn(6, 3, 20).float()
    for g in (gradient, strided(gradient)):
        fused_norm(x, torch.ones(20), 1e-5).backward(g)

    twice = x.grad
    x.grad = None
    fused_norm(x, torch.ones(20), 1e-5).backward(gradient)
    assert x.grad is not None and torch.equal(twice, 2 * x.grad)


def test_derivatives_are_exact() -> None:
    """Catches a formula that is nearly right: numerical derivatives in float64."""
    cos, sin = (t.double() for t in tables(3, 4))
    x, w = randn(3, 2, 8).requires_grad_(), randn(8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: fused_norm(x, w, 1e-2), (x, w))
    assert torch.autograd.gradcheck(fused_swiglu, (x,))
    packed = randn(3, 2, 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused_split(x, cos, sin, 2, 1), (packed,))


def kept_bytes(function: Callable[..., object], *inputs: Tensor) -> int:
    """Bytes that autograd keeps besides the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    assert out is not None
    return sum(found.values())


def test_what_is_kept() -> None:
    """Catches a wide copy kept for the backward: a factor a position for the norm, nothing else for
    the others.
    """
    x, w = randn(6, 3, 24).bfloat16().requires_grad_(), randn(24).bfloat16().requires_grad_()
    cos, sin = tables(6, 4)
    assert kept_bytes(lambda x, w: fused_norm(x, w, 1e-5), x, w) == 4 * 6 * 3
    assert kept_bytes(fused_swiglu, x) == 0
    assert kept_bytes(lambda x: fused_split(x, cos, sin, 4, 1), x) == 0
    q, k, v = fused_split(x, cos, sin, 4, 1)
    for part in (q, k, v):
        assert part.untyped_storage().nbytes() == part.numel() * 2, "a part keeps the packed tensor"
        assert part.permute(2, 0, 1, 3).is_contiguous()


def test_rotating_back_is_the_inverse() -> None:
    """Catches tables read at another position: a rotation keeps lengths, and its opposite undoes
    it.
    """
    cos, sin = tables(9, 8)
    x = randn(5, 2, 3, 8).float()
    turned = rotate(x, cos, sin)
    assert not torch.allclose(turned, x)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.allclose(rotate(turned, cos, sin, sign=-1.0), x, atol=1e-5)


def test_every_choice_is_tested_here() -> None:
    """Catches a kernel added to the tables and to no test."""
    assert set(NORM) == {"fused", "torch", "reference"}
    assert set(SPLIT) == set(SWIGLU) == {"fused", "reference"}
