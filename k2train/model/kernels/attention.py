"""Attention kernels: torch's own, one written as batched products, and the reference.

- All take q [b, n, s, d], k and v [b, n_kv, s, d] in any memory order and return [b, n, s, d].
- Causal, or masked by `mask` alone where given (bool [b, 1, s, s], True where a key may be seen).
- The model passes tensors with memory order [s, b, n, d]. Products over all heads read that as fast
  as any other order, and the result needs no copy before the output product.

Alternatives considered:
- A memory order per kernel: would move the copies into the model.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from k2train.model.kernels.determinism import SDPA_BACKENDS
from k2train.model.kernels.elementwise import wide_dtype

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

BLOCK = 64
"""Queries per product of `plain_attention`. Scores beyond a block's end are never computed."""


def document_mask(documents: Tensor) -> Tensor:
    """Causal mask that stops at document borders: documents [b, s] -> bool [b, 1, s, s].

    True where the key belongs to the query's document and is not after it. Built once per
    micro-batch and stage. At s = 8192 it is 64 MiB per sequence, kept until the backward of that
    micro-batch.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril_()


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out, softmax in fp32 (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""
    # Grouped heads: each key and value serves n / n_kv queries.
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(wide_dtype(q.dtype)) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's scaled-dot-product kernel, chosen by torch.

    With a mask torch uses a kernel that computes every pair. The one that skips the future (flash)
    takes no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def deterministic_sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`sdpa_attention` that leaves out cuDNN: the others fix the order of sums in strict mode."""
    with sdpa_kernel(list(SDPA_BACKENDS)):
        return sdpa_attention(q, k, v, mask)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's flash kernel and no other. It takes no mask.

    Its backward is deterministic in torch's strict mode only.
    """
    assert mask is None, "the flash kernel takes no mask"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by cuDNN's kernel and no other, with or without a mask. Never deterministic."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q, k, v, mask)


def _rows(x: Tensor, kv_heads: int, start: int, stop: int) -> Tensor:
    """Positions start..stop of [b, n, s, d] as [b n_kv, (n / n_kv) (stop - start), d].

    One product then serves all heads of a group.
    """
    b, n, _, d = x.shape
    return x[:, :, start:stop].reshape(b * kv_heads, n // kv_heads * (stop - start), d)


def _flat(x: Tensor) -> Tensor:
    """Reshape [b, n_kv, s, d] -> [b n_kv, s, d], contiguous in bf16.

    What a product reads transposed must be contiguous in bf16, or torch copies it.
    """
    flat = x.flatten(0, 1)
    return flat if x.dtype.itemsize >= 4 else flat.contiguous()


class _Plain(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v in blocks of queries.

    Keeps q, k, v and each block's probabilities.
    """

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
    """Additive causal mask [rows, keys]: -inf where a key comes after the row, else 0.

    The last row sees the last key.
    """
    return like.new_full((rows, keys), float("-inf")).triu_(1 + keys - rows)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as batched products of `BLOCK` queries with the keys they may see.

    Keeps the probabilities, half of s^2 values per head. Flash kernels do not need that memory, but
    on a CPU short sequences run faster this way (see `select.auto_attention`).
    """
    return _Plain.apply(q, k, v, mask)
