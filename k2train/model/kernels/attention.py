"""Attention kernels: torch's own, one written as batched products, and the reference.

- All take q [b, n, s, d], k and v [b, n_kv, s, d] in any memory order and return [b, n, s, d].
- Causal. With `documents` they also stop at document borders, where a kernel can by itself: the
  reference and torch's own by a dense mask. `documents.packed` makes the others do so.
- The model passes tensors with memory order [s, b, n, d]. Products over all heads read that as fast
  as any other order, and the result needs no copy before the output product.

Alternatives considered:
- A memory order per kernel: would move the copies into the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from k2train.model.kernels.determinism import SDPA_BACKENDS
from k2train.model.kernels.documents import Documents
from k2train.model.kernels.elementwise import as_dtype, wide_dtype
from k2train.plan.documents import PLAIN_UP_TO as BY_LENGTH

Attention = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]

BLOCK = 64
"""Queries per product of `plain_attention`. Scores beyond a block's end are never computed."""

PLAIN_UP_TO = {torch.float32: 512, torch.bfloat16: 1024}
"""Sequence length up to which `auto` takes `plain` on a CPU, without document borders.

Milliseconds forward and backward of 1024 tokens (at 2048: of 2048), 8 heads of 32, one core, flash
/ plain:

    length    128          256          512          1024         2048
    fp32      8.3 / 7.2    13.6 / 10.8  27 / 21      40 / 35      132 / 137
    bf16      21 / 4.7     18.3 / 6.1   30 / 12      35 / 24      115 / 79

The limit is memory: `plain` keeps length / 2 probabilities per head and token. At a length of 32
head_dim that equals the layer's other activations together.
"""

PLAIN_DOCUMENTS_UP_TO = {torch.float32: BY_LENGTH["fp32"], torch.bfloat16: BY_LENGTH["bf16"]}
"""Length of a document up to which `by_length_attention` takes `plain_attention`."""


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """Attention written out, softmax in fp32 (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""
    # Grouped heads: each key and value serves n / n_kv queries.
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(wide_dtype(q.dtype)) * q.shape[-1] ** -0.5
    if documents is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    else:
        mask = documents.mask
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention by torch's scaled-dot-product kernel, chosen by torch.

    With documents it takes a dense mask, and then torch uses a kernel that computes every pair. The
    one that skips the future (flash) takes no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=grouped)


def deterministic_sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """`sdpa_attention` that leaves out cuDNN: the others fix the order of sums in strict mode."""
    with sdpa_kernel(list(SDPA_BACKENDS)):
        return sdpa_attention(q, k, v, documents)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention by torch's flash kernel and no other. It takes no mask.

    Its backward is deterministic in torch's strict mode only.
    """
    assert documents is None, "the flash kernel takes no mask"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention by cuDNN's kernel and no other. Never deterministic."""
    assert documents is None, "cuDNN's kernel was never tried with a mask"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q, k, v)


def _cut(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Positions start..stop of a dimension (a view); all of them without an operator."""
    return x if stop - start == x.shape[dim] else x.narrow(dim, start, stop - start)


def _rows(x: Tensor, kv_heads: int, start: int, stop: int) -> Tensor:
    """Positions start..stop of [b, n, s, d] as [b n_kv, (n / n_kv) (stop - start), d].

    One product then serves all heads of a group.
    """
    b, n, _, d = x.shape
    return _cut(x, 2, start, stop).reshape(b * kv_heads, n // kv_heads * (stop - start), d)


def _flat(x: Tensor) -> Tensor:
    """Reshape [b, n_kv, s, d] -> [b n_kv, s, d], contiguous in bf16.

    What a product reads transposed must be contiguous in bf16, or torch copies it.
    """
    flat = x.flatten(0, 1)
    return flat if x.dtype.itemsize >= 4 else flat.contiguous()


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T / sqrt(d)) v in blocks of queries. Products have factors of `dtype`.

    Returns the result, in memory order [s, b, n, d], and each block's probabilities.
    """
    b, n, s, d = q.shape
    kv_heads, scale = k.shape[1], d**-0.5
    keys, values = _flat(as_dtype(k, dtype)).transpose(1, 2), as_dtype(v, dtype).flatten(0, 1)

    out = q.new_empty((s, b, n, d)).permute(1, 2, 0, 3)
    # Of the longest block: every other one sees a part of it.
    future = _future(min(BLOCK, s), s, keys)
    kept = []
    for start in range(0, s, BLOCK):
        stop = min(start + BLOCK, s)
        scores = torch.baddbmm(
            _hidden(future, stop - start, stop, n // kv_heads),
            as_dtype(_rows(q, kv_heads, start, stop), dtype),
            _cut(keys, 2, 0, stop),
            alpha=scale,
        )
        probabilities = as_dtype(torch.softmax(scores, dim=-1), q.dtype)
        mixed = torch.bmm(as_dtype(probabilities, dtype), _cut(values, 1, 0, stop))
        _cut(out, 2, start, stop).copy_(mixed.view(b, n, stop - start, d))
        kept.append(probabilities)
    return out, kept


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `plain_forward`, which returned `kept`: dq, dk and dv."""
    b, n, s, d = q.shape
    kv_heads, scale = k.shape[1], d**-0.5
    keys, values = as_dtype(k, dtype).flatten(0, 1), _flat(as_dtype(v, dtype)).transpose(1, 2)

    dq = q.new_empty((s, b, n, d)).permute(1, 2, 0, 3)
    # Sums over blocks, therefore wide.
    dk, dv = (torch.zeros_like(keys, dtype=wide_dtype(q.dtype)) for _ in range(2))
    for start, saved in zip(range(0, s, BLOCK), kept, strict=True):
        stop = min(start + BLOCK, s)
        gradient = as_dtype(_rows(dout, kv_heads, start, stop), dtype)
        probabilities = as_dtype(saved, dtype)
        _cut(dv, 1, 0, stop).add_(torch.bmm(probabilities.transpose(1, 2), gradient))

        dscores = torch.bmm(gradient, _cut(values, 2, 0, stop))
        dscores = torch._softmax_backward_data(dscores, probabilities, -1, dtype)
        part = torch.bmm(dscores, _cut(keys, 1, 0, stop)).view(b, n, -1, d)
        if dtype == q.dtype:
            torch.mul(part, scale, out=_cut(dq, 2, start, stop))
        else:
            _cut(dq, 2, start, stop).copy_(part.mul_(scale))
        rows = as_dtype(_rows(q, kv_heads, start, stop), dtype)
        _cut(dk, 1, 0, stop).add_(torch.bmm(dscores.transpose(1, 2), rows))

    dk, dv = as_dtype(dk.mul_(scale), k.dtype), as_dtype(dv, v.dtype)
    return dq, dk.view_as(k), dv.view_as(v)


class _Plain(torch.autograd.Function):
    """Keeps q, k, v and each block's probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        out, kept = plain_forward(q, k, v, dtype)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.dtype = dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        return *plain_backward(dout, q, k, v, kept, ctx.dtype), None


def _future(rows: int, keys: int, like: Tensor) -> Tensor:
    """Additive causal mask [rows, keys]: -inf where a key comes after the row, else 0.

    The last row sees the last key.
    """
    return like.new_full((rows, keys), float("-inf")).triu_(1 + keys - rows)


def _hidden(future: Tensor, rows: int, keys: int, groups: int) -> Tensor:
    """Mask [groups rows, keys] of a block, whose last row sees the last key: a part of `future`."""
    most, longest = future.shape
    part = _cut(future, 0, most - rows, most)
    part = _cut(part, 1, longest - keys, longest)
    return part if groups == 1 else part.repeat(groups, 1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention as batched products of `BLOCK` queries with the keys they may see.

    Keeps the probabilities, half of s^2 values per head. Flash kernels do not need that memory, but
    on a CPU short sequences run faster this way (see `select.auto_attention`).
    """
    assert documents is None, "documents are packed before this kernel"
    return _Plain.apply(q, k, v, q.dtype)


def upcast_plain_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """`plain_attention` of bf16 tensors with products in fp32. Keeps the same bf16 tensors."""
    assert documents is None, "documents are packed before this kernel"
    return _Plain.apply(q, k, v, torch.float32)


PLAIN_PRODUCTS: dict[Attention, torch.dtype | None] = {
    plain_attention: None,
    upcast_plain_attention: torch.float32,
}
"""Kernels that are `plain_forward`, with the dtype of their products; None: that of the tensors."""


def by_length_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """`plain_attention` up to `PLAIN_DOCUMENTS_UP_TO` positions, `sdpa_attention` above.

    Of packed documents each is computed by the kernel for its length.
    """
    short = q.shape[2] <= PLAIN_DOCUMENTS_UP_TO.get(q.dtype, 0)
    return (plain_attention if short else sdpa_attention)(q, k, v, documents)
