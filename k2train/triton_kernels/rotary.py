"""Split of the fused query/key/value product, with rotary positions, in Triton.

- Forward: one pass that reads the packed product and writes q, k and v. Backward: one pass the
  other way, with the rotation turned back. Keeps nothing but the tables.
- One program a token, so that a token's angles are read once for all heads.

Formula: rotate-half (Su et al. 2021, arXiv:2104.09864, section 3.4.2), in fp32, rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048
"""Values of half a head that a program holds at a time."""


@triton.jit
def _move(
    source,
    source_head,
    into,
    into_head,
    heads,
    cos,
    sin,
    half,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Copy a token's heads, turned by its angles where TURN."""
    columns = tl.arange(0, HALF)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (columns < half)
        a = tl.load(source + head * source_head + columns, mask=inside, other=0.0)
        b = tl.load(source + head * source_head + half + columns, mask=inside, other=0.0)

        x, y = a.to(tl.float32), b.to(tl.float32)
        if TURN:
            x, y = x * cos - y * sin, y * cos + x * sin
        to = into + head * into_head + columns
        tl.store(to, x.to(into.dtype.element_ty), mask=inside)
        tl.store(to + half, y.to(into.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos, sin, position, half, HALF: tl.constexpr):
    """A token's angles, as a row: the tables hold them twice, [s, 2 half]."""
    columns = tl.arange(0, HALF)[None, :]
    at = position * 2 * half + columns
    inside = columns < half
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _split_kernel(
    packed,
    packed_s,
    packed_b,
    q,
    k,
    v,
    cos,
    sin,
    batch,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position, row = token // batch, token % batch
    c, s = _angles(cos, sin, position, half, HALF)
    wide, q_width, kv_width = 2 * half, heads * 2 * half, kv_heads * 2 * half

    source = packed + position * packed_s + row * packed_b
    _move(source, wide, q + token * q_width, wide, heads, c, s, half, True, HEADS, HALF)
    source += q_width
    _move(source, wide, k + token * kv_width, wide, kv_heads, c, s, half, True, KV, HALF)
    source += kv_width
    _move(source, wide, v + token * kv_width, wide, kv_heads, c, s, half, False, KV, HALF)


@triton.jit
def _join_kernel(
    dq,
    dq_b,
    dq_n,
    dq_s,
    dk,
    dk_b,
    dk_n,
    dk_s,
    dv,
    dv_b,
    dv_n,
    dv_s,
    packed,
    cos,
    sin,
    batch,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position, row = token // batch, token % batch
    c, s = _angles(cos, sin, position, half, HALF)
    s = -s
    wide, q_width, kv_width = 2 * half, heads * 2 * half, kv_heads * 2 * half

    into = packed + token * (q_width + 2 * kv_width)
    source = dq + position * dq_s + row * dq_b
    _move(source, dq_n, into, wide, heads, c, s, half, True, HEADS, HALF)
    into += q_width
    source = dk + position * dk_s + row * dk_b
    _move(source, dk_n, into, wide, kv_heads, c, s, half, True, KV, HALF)
    into += kv_width
    source = dv + position * dv_s + row * dv_b
    _move(source, dv_n, into, wide, kv_heads, c, s, half, False, KV, HALF)


def _tiles(heads: int, kv_heads: int, half: int) -> dict[str, Any]:
    """Launch options: as many heads at a time as TILE holds."""
    columns = triton.next_power_of_2(half)
    most = max(1, TILE // columns)
    return {
        "HEADS": min(most, triton.next_power_of_2(heads)),
        "KV": min(most, triton.next_power_of_2(kv_heads)),
        "HALF": columns,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


class _Split(torch.autograd.Function):
    """Split and rotate; backward rotates the other way into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if packed.stride(-1) != 1:
            packed = packed.contiguous()
        s, b, width = packed.shape
        half = width // (heads + 2 * kv_heads) // 2
        ctx.cos, ctx.sin, ctx.heads, ctx.half = cos, sin, (heads, kv_heads), half

        q, k, v = (packed.new_empty(s, b, n, 2 * half) for n in (heads, kv_heads, kv_heads))
        if s * b:
            _split_kernel[(s * b,)](
                packed,
                packed.stride(0),
                packed.stride(1),
                q,
                k,
                v,
                cos,
                sin,
                b,
                heads,
                kv_heads,
                half,
                **_tiles(heads, kv_heads, half),
            )
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (heads, kv_heads), half = ctx.heads, ctx.half
        dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk, dv))
        b, _, s, _ = dq.shape
        dpacked = dq.new_empty(s, b, (heads + 2 * kv_heads) * 2 * half)
        if s * b:
            _join_kernel[(s * b,)](
                *(part for t in (dq, dk, dv) for part in (t, *t.stride()[:3])),
                dpacked,
                ctx.cos,
                ctx.sin,
                b,
                heads,
                kv_heads,
                half,
                **_tiles(heads, kv_heads, half),
            )
        return dpacked, None, None, None, None


def split(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [s, b, (n + 2 n_kv) d] into q [b, n, s, d], k and v [b, n_kv, s, d]; q and k rotated.

    The tables are fp32 [>= s, 1, 1, d], both halves equal. Each result has memory of its own, in
    the order [s, b, heads, d].
    """
    return _Split.apply(packed, cos, sin, heads, kv_heads)
