"""Optional kernel packages: attention and norms of other projects, imported only on request.

- Each `load_*` returns a function with this project's arguments.
- A missing package raises a one-line ConfigError that says how to install it.
- Attention takes `deterministic`: its backward then adds in a fixed order. A version that cannot is
  refused.
- None of them is a requirement.

Alternatives considered:
- Copying kernels into this project.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
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


def adapt_bshd(name: str, function: Callable[..., Any], deterministic: bool) -> Attention:
    """Adapt flash-attn's layout [b, s, n, d].

    It takes no mask, and some versions also return the log-sums. Raises ConfigError where a
    deterministic backward is asked of a version without one.
    """
    choices = {"causal": True}
    if deterministic:
        if not _takes(function, "deterministic"):
            distribution, install = INSTALL[name]
            raise ConfigError(
                f"kernels.attention ({name}): the installed {distribution} "
                f"{version_of(distribution)} has no deterministic backward; update it "
                f"({install}), choose auto, or set kernels.deterministic: false"
            )
        choices["deterministic"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None, "flash-attn takes no mask"
        out = function(*(t.transpose(1, 2) for t in (q, k, v)), **choices)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def load_flash_attn_2(deterministic: bool = False) -> Attention:
    """Load FlashAttention-2 (arXiv:2307.08691), for Ampere and later."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_2", error) from error
    return adapt_bshd("flash_attn_2", flash_attn_func, deterministic)


def load_flash_attn_3(deterministic: bool = False) -> Attention:
    """Load FlashAttention-3 (arXiv:2407.08608), for Hopper."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_3", error) from error
    return adapt_bshd("flash_attn_3", flash_attn_func, deterministic)


def load_flash_attn_4(deterministic: bool = False) -> Attention:
    """Load FlashAttention-4, for Hopper and Blackwell."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise missing("attention", "flash_attn_4", error) from error
    return adapt_bshd("flash_attn_4", flash_attn_func, deterministic)


def load_engine_attention(deterministic: bool = False) -> Attention:
    """Load Transformer Engine's attention, which chooses its own backend; no parameters.

    It looks at torch's strict mode when its module is made, at the first call, and then takes
    deterministic backends only. `deterministic` asserts that this mode is on.
    """
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise missing("attention", "transformer_engine", error) from error

    @cache
    def module(heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        assert not deterministic or torch.are_deterministic_algorithms_enabled(), (
            "Transformer Engine's attention was asked to be deterministic outside strict mode"
        )
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


OPTIONAL_ATTENTION: dict[str, Callable[[bool], Attention]] = {
    "flash_attn_2": load_flash_attn_2,
    "flash_attn_3": load_flash_attn_3,
    "flash_attn_4": load_flash_attn_4,
    "transformer_engine": load_engine_attention,
}
"""By name: loaders that take `deterministic`."""
OPTIONAL_NORM: dict[str, Callable[[], Norm]] = {
    "apex": load_apex_norm,
    "transformer_engine": load_engine_norm,
}


def installed_flash_attn(generation: int) -> str | None:
    """Name of the fastest flash-attn here with a deterministic backward for a device; None: none.

    `generation` is the device's major compute capability: FlashAttention-3 is for Hopper (9),
    FlashAttention-4 for Hopper and Blackwell (10 and 11).
    """
    for name, generations in (("flash_attn_3", (9,)), ("flash_attn_4", (9, 10, 11))):
        if generation in generations:
            # Nobody asked for it by name, so one that is missing, too old or broken is passed over:
            # a package that does not fit its own dependencies raises anything.
            with suppress(Exception):
                OPTIONAL_ATTENTION[name](True)
                return name
    return None
