"""Attention kernels against the formula written out, in float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2train.model.kernels.attention import BLOCK, plain_attention, reference_attention
from k2train.model.kernels.documents import Documents, packed
from k2train.model.kernels.select import ATTENTION, Attention
from k2train.model.kernels.upcast import UPCAST_ATTENTION

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""The largest relative error of one rounding."""
DTYPES = tuple(ROUNDING)
HERE = ("sdpa", "plain", "by_length", "flash", "reference")
"""What can run on a CPU."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


def inputs_of(b: int, n: int, kv: int, s: int, d: int) -> list[Tensor]:
    """q, k, v as the model gives them: [b, heads, s, d] that lie in memory as [s, b, heads, d]."""
    return [
        randn(s, b, heads, d, seed=i).permute(1, 2, 0, 3) for i, heads in enumerate((n, kv, kv))
    ]


def values(
    kernel: Attention,
    inputs: Sequence[Tensor],
    dout: Tensor,
    documents: Documents | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The output and the gradients of q, k and v, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = kernel(*leaves, documents)
    out.backward(dout.to(dtype))
    return [t.detach().double() for t in (out, *(leaf.grad for leaf in leaves))]


def sizes(inputs: Sequence[Tensor], dout: Tensor, documents: Documents | None) -> list[Tensor]:
    """Output, dq, dk and dv with all terms of their sums taken positive.

    Rounding errors are relative to these. The values themselves may cancel: of a single position
    dq and dk are 0, and what is found are rounding errors alone.
    """
    q, k, v = inputs
    s, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    seen = torch.ones(s, s, dtype=torch.bool).tril() if documents is None else documents.mask
    p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    dp = dout.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q.abs(), p.mT @ dout.abs()))
    return [p @ v.abs(), ds @ k.abs(), dk, dv]


def assert_equal(
    kernel: Attention, inputs: Sequence[Tensor], documents: Documents | None, dtype: torch.dtype
) -> None:
    """Every value agrees but for rounding.

    In fp32 n additions are off by about sqrt(n) roundings, whatever their order (Higham and Mary
    2019, doi:10.1137/18M1226312). The longest chain is a score, a softmax and a weighted sum:
    d + 2 s. What is stored on the way is rounded to the dtype: score, probability, the score's
    gradient, result.
    """
    rounded = [x.to(dtype).double() for x in inputs]
    dout = randn(*inputs[0].shape, seed=9).to(dtype).double()
    s, d = inputs[0].shape[2:]
    tolerance = (d + 2 * s) ** 0.5 * ROUNDING[torch.float32] + 4 * ROUNDING[dtype]
    found = values(kernel, rounded, dout, documents, dtype)
    expected = values(reference_attention, rounded, dout, documents, torch.float64)
    for name, a, b, size in zip(
        ("output", "dq", "dk", "dv"), found, expected, sizes(rounded, dout, documents), strict=True
    ):
        error = ((a - b).abs() / size).max()
        assert error <= tolerance, f"{name}: {error:.1e} of its terms, more than {tolerance:.1e}"


def documents_of(b: int, s: int) -> Documents:
    numbers = torch.randint(0, 3, (b, s), generator=torch.Generator().manual_seed(s))
    return Documents(numbers.sort(dim=-1).values)


SHAPES = ((2, 4, 4, 2 * BLOCK, 16), (2, 6, 2, 2 * BLOCK + 5, 8), (1, 4, 1, 13, 32), (3, 2, 2, 1, 8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_causal(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Catches a look ahead at a block's border, grouped heads mixed up, a scale left out, a wrong
    backward.
    """
    assert_equal(ATTENTION[name], inputs_of(*shape), None, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("sdpa", "packed plain", "packed sdpa", "packed flash"))
def test_within_documents(name: str, dtype: torch.dtype) -> None:
    """Catches a mask cut at the wrong rows or given to the wrong sequence of the batch, and
    documents that are packed another way than they are put back.
    """
    *how, kernel = name.split()
    attend = packed(ATTENTION[kernel]) if how else ATTENTION[kernel]
    for shape in SHAPES:
        assert_equal(attend, inputs_of(*shape), documents_of(shape[0], shape[3]), dtype)


@pytest.mark.parametrize("name", ("sdpa", "plain", "by_length"))
def test_upcast(name: str) -> None:
    """Catches groups of heads that are repeated and not summed, and a scale that is left out."""
    kernel = UPCAST_ATTENTION[name]
    for shape in SHAPES:
        assert_equal(kernel, inputs_of(*shape), None, torch.bfloat16)
        documents = documents_of(shape[0], shape[3])
        assert_equal(packed(kernel), inputs_of(*shape), documents, torch.bfloat16)


@settings(max_examples=20, deadline=None)
@given(
    b=st.integers(1, 2),
    kv=st.integers(1, 2),
    group=st.integers(1, 3),
    s=st.integers(1, 2 * BLOCK + 2),
    masked=st.booleans(),
)
def test_plain_at_any_length(b: int, kv: int, group: int, s: int, masked: bool) -> None:
    """Catches a last block of odd size."""
    documents = documents_of(b, s) if masked else None
    assert_equal(
        packed(plain_attention), inputs_of(b, group * kv, kv, s, 4), documents, torch.float32
    )


def test_plain_in_any_order_of_memory() -> None:
    """Catches a kernel that reads memory instead of indices: forward and with gradients of other
    strides.
    """
    inputs = inputs_of(2, 4, 2, BLOCK + 9, 8)
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (3, 0, 1, 2)):
        back = [order.index(i) for i in range(4)]

        def moved(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            documents: Documents | None,
            order: tuple = order,
            back: list = back,
        ) -> Tensor:
            q, k, v = (t.permute(order).contiguous().permute(back) for t in (q, k, v))
            return plain_attention(q, k, v, documents).permute(order).contiguous().permute(back)

        assert_equal(moved, inputs, None, torch.float32)


def test_derivatives_are_exact() -> None:
    """Catches a formula that is nearly right: numerical derivatives in float64."""
    q, k, v = (t.detach().requires_grad_() for t in inputs_of(1, 2, 1, 5, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: plain_attention(q, k, v), (q, k, v))
    documents, within = documents_of(1, 5), packed(plain_attention)
    assert torch.autograd.gradcheck(lambda q, k, v: within(q, k, v, documents), (q, k, v))


def test_what_plain_keeps() -> None:
    """Catches scores kept in full or twice: of each block its queries times the keys that they may
    see.
    """
    b, n, s, d = 2, 4, 2 * BLOCK + 8, 8
    q, k, v = (t.bfloat16().requires_grad_() for t in inputs_of(b, n, n, s, d))
    known = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = plain_attention(q, k, v)

    expected = BLOCK * BLOCK + BLOCK * 2 * BLOCK + 8 * s
    assert sum(found.values()) == 2 * b * n * expected
    assert out.permute(2, 0, 1, 3).is_contiguous(), (
        "the output needs a copy before the next product"
    )


def test_every_choice_is_known_here() -> None:
    """Catches a kernel added to the table and to no test; cuDNN's needs its device."""
    assert set(ATTENTION) == {*HERE, "cudnn"}
