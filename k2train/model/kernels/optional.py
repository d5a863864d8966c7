"""Optional kernel packages: attention and norms of other projects, imported only on request.

- Each `load_*` returns a function with this project's arguments.
- A missing package raises a one-line ConfigError that says how to install it.
- None of them is a requirement.

Alternatives considered:
- Copying kernels into this project.
"""

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from k2train.errors import ConfigError
from k2train.model.kernels.attention import Attention
from k2train.model.kernels.elementwise import Norm

INSTALL = {
    "flash_attn_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": (
        "flash_attn_3",
        "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attn_4": ("flash-attn-4", "pip install flash-attn-4"),
    "transformer_engine": (
        "transformer_engine",
        "pip install transformer-engine[pytorch] --no-build-isolation",
    ),
    "apex": ("apex", "build it from github.com/NVIDIA/apex with its CUDA extensions"),
}
"""Optional packages: distribution name, and how to install it."""


def version_of(distribution: str) -> str:
    """Installed version of a distribution, for the record."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def missing(key: str, name: str, error: ImportError) -> ConfigError:
    """Build the one-line error for a package that cannot be imported."""
    distribution, install = INSTALL[name]
    return ConfigError(
        f"kernels.{key} ({name}) needs the package {distribution}: {install} ({error})"
    )


def adapt_bshd(function: Callable[..., Any]) -> Attention:
    """Adapt flash-attn's layout [b, s, n, d].

    It takes no mask, and some versions also return the log-sums.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None, "flash-attn takes no mask"
        out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def load_flash_attn_2() -> Attention:
    """Load FlashAttention-2 (arXiv:2307.08691), for Ampere and later."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_2", error) from error
    return adapt_bshd(flash_attn_func)


def load_flash_attn_3() -> Attention:
    """Load FlashAttention-3 (arXiv:2407.08608), for Hopper."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_3", error) from error
    return adapt_bshd(flash_attn_func)


def load_flash_attn_4() -> Attention:
    """Load FlashAttention-4, for Hopper and Blackwell."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_4", error) from error
    return adapt_bshd(flash_attn_func)


def load_engine_attention() -> Attention:
    """Load Transformer Engine's attention, which chooses its own backend; no parameters."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise missing("attention", "transformer_engine", error) from error

    @cache
    def module(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        return DotProductAttention(
            heads,
            head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None, "Transformer Engine's attention is only used without a mask"
        b, heads, s, head_dim = q.shape
        out = module(heads, k.shape[1], head_dim)(*(t.permute(2, 0, 1, 3) for t in (q, k, v)))
        return out.view(s, b, heads, head_dim).permute(1, 2, 0, 3)

    return attend


def load_apex_norm() -> Norm:
    """Load apex's fused RMSNorm."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError as error:
        raise missing("norm", "apex", error) from error

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused_rms_norm_affine(x, weight, (x.shape[-1],), eps)

    return norm


def load_engine_norm() -> Norm:
    """Load Transformer Engine's RMSNorm, called with our weight instead of its own."""
    try:
        from transformer_engine.pytorch import RMSNorm
    except ImportError as error:
        raise missing("norm", "transformer_engine", error) from error

    @cache
    def module(features: int, eps: float, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return RMSNorm(features, eps=eps, dtype=dtype, device=device)

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.func.functional_call(
            module(x.shape[-1], eps, x.dtype, x.device), {"weight": weight}, (x,)
        )

    return norm


OPTIONAL_ATTENTION: dict[str, Callable[[], Attention]] = {
    "flash_attn_2": load_flash_attn_2,
    "flash_attn_3": load_flash_attn_3,
    "flash_attn_4": load_flash_attn_4,
    "transformer_engine": load_engine_attention,
}
OPTIONAL_NORM: dict[str, Callable[[], Norm]] = {
    "apex": load_apex_norm,
    "transformer_engine": load_engine_norm,
}
