"""Attention as functions of query, key and value: torch's own kernels, products written out, and the reference.

All take q [b, n, s, d], k and v [b, n_kv, s, d] in any order of memory and give [b, n, s, d]: causal, or where `mask` is
given (bool [b, 1, s, s], True where a key may be seen) by that alone. The model hands them tensors that lie in memory as
[s, b, n, d]: products over all heads read that as fast as any order, and what comes out needs no copy before the output
product. Refused: an order of its own for each kernel, which would put the copies into the model.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from k2train.model.kernels.elementwise import wide_dtype

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

BLOCK = 64
"""Queries a product of `plain_attention`: what lies in the future beyond a block is never computed."""


def document_mask(documents: Tensor) -> Tensor:
    """Who may see whom when attention stops at document borders: documents [b, s] -> bool [b, 1, s, s].

    True where the key is of the query's document and not after it. Built once a micro-batch and stage: at s = 8192 it is
    64 MiB a sequence, kept until the backward of that micro-batch.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril_()


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out, softmax in fp32 (Vaswani et al. 2017, arXiv:1706.03762, equation 1)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(wide_dtype(q.dtype)) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's scaled-dot-product kernel of its own choice.

    With a mask torch takes a kernel that looks at every pair, since the one that skips the future (flash) takes none.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same by torch's flash kernel and no other; it takes no mask."""
    assert mask is None, "the flash kernel takes no mask"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same by cuDNN's kernel and no other; with a mask too."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q, k, v, mask)


def _rows(x: Tensor, kv_heads: int, start: int, stop: int) -> Tensor:
    """Positions start..stop of [b, n, s, d] as [b n_kv, (n / n_kv) (stop - start), d]: the heads of a group in one product."""
    b, n, _, d = x.shape
    return x[:, :, start:stop].reshape(b * kv_heads, n // kv_heads * (stop - start), d)


def _flat(x: Tensor) -> Tensor:
    """[b, n_kv, s, d] -> [b n_kv, s, d]. What a product reads transposed must be contiguous in bf16, or it is copied."""
    flat = x.flatten(0, 1)
    return flat if x.dtype.itemsize >= 4 else flat.contiguous()


class _Plain(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v in blocks of queries. Keeps q, k, v and of each block its probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        b, n, s, d = q.shape
        kv_heads, scale = k.shape[1], d**-0.5
        keys, values = _flat(k), v.flatten(0, 1)
        out = q.new_empty((s, b, n, d)).permute(1, 2, 0, 3)
        kept = []
        for start in range(0, s, BLOCK):
            stop = min(start + BLOCK, s)
            rows = _rows(q, kv_heads, start, stop)
            hidden = _future(stop - start, stop, rows).repeat(n // kv_heads, 1)
            scores = torch.baddbmm(hidden, rows, keys[:, :stop].transpose(1, 2), alpha=scale)
            if mask is not None:
                scores.view(b, n, -1, stop).masked_fill_(
                    ~mask[:, :, start:stop, :stop], float("-inf")
                )
            probabilities = torch.softmax(scores, dim=-1)
            out[:, :, start:stop] = torch.bmm(probabilities, values[:, :stop]).view(
                b, n, stop - start, d
            )
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        b, n, s, d = q.shape
        kv_heads, scale = k.shape[1], d**-0.5
        keys, values = k.flatten(0, 1), _flat(v)
        dq = q.new_empty((s, b, n, d)).permute(1, 2, 0, 3)
        # Sums over blocks, therefore wide.
        dk, dv = (torch.zeros_like(keys, dtype=wide_dtype(q.dtype)) for _ in range(2))
        for start, probabilities in zip(range(0, s, BLOCK), kept, strict=True):
            stop = min(start + BLOCK, s)
            gradient = _rows(dout, kv_heads, start, stop)
            dv[:, :stop] += torch.bmm(probabilities.transpose(1, 2), gradient)
            dscores = torch.bmm(gradient, values[:, :stop].transpose(1, 2))
            dscores = torch._softmax_backward_data(dscores, probabilities, -1, q.dtype)
            torch.mul(
                torch.bmm(dscores, keys[:, :stop]).view(b, n, -1, d),
                scale,
                out=dq[:, :, start:stop],
            )
            dk[:, :stop] += torch.bmm(dscores.transpose(1, 2), _rows(q, kv_heads, start, stop))
        return dq, dk.mul_(scale).to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v), None


def _future(rows: int, keys: int, like: Tensor) -> Tensor:
    """[rows, keys]: -inf where a key comes after the row, else 0. The last row sees the last key."""
    return like.new_full((rows, keys), float("-inf")).triu_(1 + keys - rows)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as batched products of `BLOCK` queries with the keys they may see, with its own backward.

    It keeps the probabilities, half of s^2 values a head: memory that flash kernels do not need, for which on a CPU the
    short sequences run faster (see `kernels.automatic_attention`).
    """
    return _Plain.apply(q, k, v, mask)
