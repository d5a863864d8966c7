"""Which implementation does the work: chosen once when the model is built, printed and recorded.

Every choice has a plain torch reference it is tested equal to. `auto` takes the fastest that is known good on the device;
asking for something that cannot be had is an error, never a silent fallback.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.errors import ConfigError

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Norm = Callable[[Tensor, Tensor, float], Tensor]


def document_mask(documents: Tensor) -> Tensor:
    """Who may see whom when attention stops at document borders: documents [b, s] -> bool [b, 1, s, s].

    True where the key is of the query's document and not after it. Built once a micro-batch and stage: at s = 8192 it is
    64 MiB a sequence, kept until the backward of that micro-batch.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril_()


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's scaled-dot-product kernel: q [b, n, s, d], k and v [b, n_kv, s, d] -> [b, n, s, d].

    Causal, or where `mask` is given by that alone: then torch takes a kernel that looks at every pair, since the one that
    skips the future (flash) takes no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same written out, softmax in fp32 (Vaswani et al. 2017, arXiv:1706.03762, equation 1)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm by torch's own op, accumulated in fp32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm written out: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


ATTENTION: dict[str, Attention] = {"sdpa": sdpa_attention, "reference": reference_attention}
NORM: dict[str, Norm] = {"torch": torch_norm, "reference": reference_norm}


@dataclass(frozen=True)
class Kernels:
    """The choices of one run, by name, with what they resolve to."""

    attention_name: str
    norm_name: str
    optimizer: str
    compile: bool
    recompute: str

    @property
    def attention(self) -> Attention:
        return ATTENTION[self.attention_name]

    @property
    def norm(self) -> Norm:
        return NORM[self.norm_name]

    def __str__(self) -> str:
        return (
            f"attention {self.attention_name}, norm {self.norm_name}, optimizer {self.optimizer}, "
            f"compile {'on' if self.compile else 'off'}, recompute {self.recompute}"
        )


def choose_kernels(
    attention: str = "auto", norm: str = "auto", optimizer: str = "auto", compile: str = "auto", recompute: str = "none"
) -> Kernels:
    """Resolve the `kernels` section. `auto` is torch's own kernels, uncompiled: the same on every device.

    Raises ConfigError for a name that is not built in.
    """

    def pick(key: str, value: str, legal: tuple[str, ...], automatic: str) -> str:
        if value == "auto":
            return automatic
        if value not in legal:
            raise ConfigError(f"kernels.{key} ({value}) is not one of auto, {', '.join(legal)}")
        return value

    return Kernels(
        attention_name=pick("attention", attention, tuple(ATTENTION), "sdpa"),
        norm_name=pick("norm", norm, tuple(NORM), "torch"),
        optimizer=pick("optimizer", optimizer, ("fused", "reference"), "fused"),
        compile=pick("compile", compile, ("on", "off"), "off") == "on",
        recompute=pick("recompute", recompute, ("none", "full"), "none"),
    )
