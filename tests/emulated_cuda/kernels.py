"""CPU twins of the kernels that only a GPU has: attention, RMS norm, products with an fp32 result.

Each takes and returns what the operation's schema says, with CPU tensors, and refuses what the GPU
kernel refuses. Attention is softmax(q k^T scale) v in fp32 (Vaswani et al. 2017), its gradient
dS = P (dP - rowsum(dO O)) (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)


def _probabilities(
    q: Tensor, k: Tensor, causal: bool, scale: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return softmax [b, n, s, s] and log-sum-exp [b, n, s] of the scaled scores, in fp32."""
    scores = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        scores = scores + bias.float()
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1)).exp(), total


def _grouped(q: Tensor, x: Tensor) -> Tensor:
    """Repeat the key or value heads [b, n_kv, s, d] for the queries they serve."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    p, total = _probabilities(q, _grouped(q, k), causal, scale, bias)
    out = (p @ _grouped(q, v).float()).to(q.dtype)
    # As the GPU kernels lay it out: positions before heads.
    return out.transpose(1, 2).contiguous().transpose(1, 2), total


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _grouped(q, k).float(), _grouped(q, v).float()
    p, _ = _probabilities(q, keys, causal, scale, bias)
    do = dout.float()
    ds = p * (do @ values.transpose(-1, -2) - (do * out.float()).sum(-1, keepdim=True))
    ds = ds * (scale or q.shape[-1] ** -0.5)
    dq, dk, dv = ds @ keys, ds.transpose(-1, -2) @ q.float(), p.transpose(-1, -2) @ do

    groups = (k.shape[0], k.shape[1], -1, *k.shape[2:])
    dk, dv = dk.view(groups).sum(2), dv.view(groups).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _seeds() -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _need_halves(name: str, q: Tensor) -> None:
    if q.dtype not in HALVES or q.shape[-1] % 8:
        raise RuntimeError(f"{name} attention takes no {q.dtype} with heads of {q.shape[-1]}")


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _need_halves("flash", q)
    out, total = _forward(q, k, v, causal, scale, None)
    return out, total, None, None, q.shape[2], k.shape[2], *_seeds(), torch.empty(0)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, cum_q: Any,
    cum_k: Any, max_q: int, max_k: int, dropout: float, causal: bool, seed: Tensor,
    offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _backward(dout, q, k, v, out, causal, scale, None)


def _documents(
    q: Tensor, k: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, longest: int, causal: bool,
    window: tuple[int | None, int | None],
) -> list[slice]:  # fmt: skip
    """Return the tokens of each document of [tokens, n, d]; refuse what the kernel does.

    It starts blocks of queries for `longest` positions of a document, so of a longer one the rest
    would never be written. That is refused here.
    """
    _need_halves("flash", q)
    if cum_q is None or cum_k is None:
        raise NotImplementedError("flash attention without documents has a twin of its own")
    for cum in (cum_q, cum_k):
        if cum.dtype != torch.int32 or not cum.is_contiguous():
            raise RuntimeError(f"cumulative lengths are contiguous int32, not {cum.dtype}")
    borders = cum_q.tolist()
    lengths = [stop - start for start, stop in pairwise(borders)]
    if borders != cum_k.tolist() or borders[0] != 0 or borders[-1] != len(q) or len(q) != len(k):
        raise RuntimeError(f"documents of {borders} are not those of {len(q)} tokens")
    if min(lengths) < 1 or max(lengths) > longest:
        raise RuntimeError(f"documents of {lengths} tokens, said to have {longest} at most")
    if not causal or window not in ((-1, 0), (None, None), (-1, -1)):
        raise NotImplementedError(f"a window of {window} has no twin")
    return [slice(start, stop) for start, stop in pairwise(borders)]


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, n, d] -> [1, n, tokens, d]."""
    return x.transpose(0, 1).unsqueeze(0)


def _tokens_first(parts: Iterable[Tensor]) -> Tensor:
    """[1, n, length, d] of each document -> [tokens, n, d]."""
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def _flash_within(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, max_q: int,
    max_k: int, dropout: float, causal: bool, debug: bool = False, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: None = None, alibi_slopes: None = None, block_table: None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    window = window_size_left, window_size_right
    found = [
        _forward(*(_heads_first(x[part]) for x in (q, k, v)), causal, scale, None)
        for part in _documents(q, k, cum_q, cum_k, min(max_q, max_k), causal, window)
    ]
    total = torch.cat([total[0] for _, total in found], dim=-1)
    state = torch.zeros(2, dtype=torch.uint64)
    return _tokens_first(out for out, _ in found), total, state, _seeds()[0], torch.empty(0)


def _flash_within_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, cum_q: Tensor,
    cum_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor,
    unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    window = window_size_left, window_size_right
    found = [
        _backward(*(_heads_first(x[part]) for x in (dout, q, k, v, out)), causal, scale, None)
        for part in _documents(q, k, cum_q, cum_k, min(max_q, max_k), causal, window)
    ]
    return tuple(_tokens_first(parts) for parts in zip(*found, strict=True))


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_total: bool, dropout: float = 0.0,
    causal: bool = False, debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _need_halves("cuDNN", q)
    out, total = _forward(q, k, v, causal, scale, bias)
    total = total.unsqueeze(-1)
    return out, total, None, None, q.shape[2], k.shape[2], *_seeds(), torch.empty(0)


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, seed: Tensor,
    offset: Tensor, bias: Tensor | None, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
    dropout: float, causal: bool, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _backward(dout, q, k, v, out, causal, scale, bias)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_total: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return *_forward(q, k, v, causal, scale, bias), *_seeds()


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor,
    total: Tensor, seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool],
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return *_backward(dout, q, k, v, out, causal, scale, bias), None


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = x.float() * scale
    return (y if weight is None else y * weight.float()).to(x.dtype), scale


def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    scale: Tensor,
    weight: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None]:
    normal = x.float() * scale
    g = dy.float() if weight is None else dy.float() * weight.float()
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    dw = None if weight is None else (dy.float() * normal).flatten(0, -2).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dw


def _addmm_into(
    total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1,
    alpha: float = 1, out: Tensor,
) -> Tensor:  # fmt: skip
    """out = beta total + alpha a b, in the wider dtype of the result."""
    if not (a.dtype == b.dtype and out.dtype == total.dtype == out_dtype):
        raise RuntimeError(f"addmm of {a.dtype} and {b.dtype} into {out.dtype}, not {out_dtype}")
    return out.copy_(beta * total + alpha * (a.to(out_dtype) @ b.to(out_dtype)))


TWINS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._flash_attention_forward.default: _flash_within,
    aten._flash_attention_backward.default: _flash_within_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten.addmm.dtype_out: _addmm_into,
}
"""Operation -> what computes it on the CPU."""
