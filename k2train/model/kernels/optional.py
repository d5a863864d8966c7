"""Optional kernel packages: attention and norms of other projects, imported only on request.

- Each `load_*` returns a function with this project's arguments.
- A missing package raises a one-line ConfigError that says how to install it.
- Attention takes `deterministic`: its backward then adds in a fixed order. A version that cannot is
  refused. With `block` it stops at document borders.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from k2train.errors import ConfigError
from k2train.model.kernels.attention import Attention, flash_attention
from k2train.model.kernels.documents import Documents
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


def adapt_flash_attn(
    name: str, function: Callable[..., Any], varlen: Callable[..., Any] | None, deterministic: bool
) -> Attention:
    """Adapt flash-attn: `function` in the layout [b, s, n, d], `varlen` for documents.

    `varlen` takes the tokens of all rows [b s, n, d] and where documents begin (None: documents are
    never given). Some versions also return the log-sums. Raises ConfigError where a deterministic
    backward is asked of a version without one.
    """
    choices = {"causal": True}
    if deterministic:
        for each in (function, varlen):
            if each is not None and not _takes(each, "deterministic"):
                distribution, install = INSTALL[name]
                raise ConfigError(
                    f"kernels.attention ({name}): the installed {distribution} "
                    f"{version_of(distribution)} has no deterministic backward; update it "
                    f"({install}), choose auto, or set kernels.deterministic: false"
                )
        choices["deterministic"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is None:
            out = function(*(t.transpose(1, 2) for t in (q, k, v)), **choices)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        assert varlen is not None, f"{name} was not built for documents"
        borders, longest = documents.borders, documents.longest
        out = varlen(
            *(_rows_in_turn(t) for t in (q, k, v)),
            cu_seqlens_q=borders,
            cu_seqlens_k=borders,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **choices,
        )
        return _rows_of(out[0] if isinstance(out, tuple) else out, q)

    return attend


def adapt_package(name: str, package: Any, deterministic: bool, block: bool) -> Attention:
    """Adapt the functions of an installed flash-attn. Raises ConfigError where one is missing."""
    wanted = ["flash_attn_func", *(["flash_attn_varlen_func"] if block else [])]
    found = {each: getattr(package, each) for each in wanted if hasattr(package, each)}
    lacking = [each for each in wanted if each not in found]
    if lacking:
        distribution, install = INSTALL[name]
        raise ConfigError(
            f"kernels.attention ({name}): the installed {distribution} {version_of(distribution)} "
            f"has no {lacking[0]}; update it ({install}), or choose auto"
        )
    return adapt_flash_attn(
        name, found["flash_attn_func"], found.get("flash_attn_varlen_func"), deterministic
    )


def _rows_in_turn(x: Tensor) -> Tensor:
    """[b, n, s, d] -> the tokens of one row after another, [b s, n, d]."""
    b, n, s, d = x.shape
    return x.transpose(1, 2).reshape(b * s, n, d)


def _rows_of(tokens: Tensor, like: Tensor) -> Tensor:
    """[b s, n, d] -> [b, n, s, d], the shape of `like`."""
    b, n, s, d = like.shape
    return tokens.reshape(b, s, n, d).transpose(1, 2)


def load_torch_varlen() -> Attention | None:
    """Load torch's own attention within documents, which is its flash kernel; None before 2.10.

    Its backward is deterministic in torch's strict mode only, like that kernel's. Versions after
    2.14 take cuDNN's instead on Hopper and Blackwell, which never is, unless they may not.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    # Torch 2.10 had a flag, later versions have a window that ends at the query.
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if _takes(varlen_attn, "window_size") else {"is_causal": True}
    )
    flagged = _takes(varlen_attn, "enable_gqa")

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is None:
            return flash_attention(q, k, v)
        borders, longest = documents.borders, documents.longest
        grouped = {"enable_gqa": True} if flagged and q.shape[1] != k.shape[1] else {}
        tokens = (_rows_in_turn(t) for t in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = varlen_attn(*tokens, borders, borders, longest, longest, **causal, **grouped)
        return _rows_of(out, q)

    return attend


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def load_flash_attn_2(deterministic: bool = False, block: bool = False) -> Attention:
    """Load FlashAttention-2 (arXiv:2307.08691), for Ampere and later."""
    try:
        import flash_attn as package
    except ImportError as error:
        raise missing("attention", "flash_attn_2", error) from error
    return adapt_package("flash_attn_2", package, deterministic, block)


def load_flash_attn_3(deterministic: bool = False, block: bool = False) -> Attention:
    """Load FlashAttention-3 (arXiv:2407.08608), for Hopper."""
    try:
        import flash_attn_interface as package
    except ImportError as error:
        raise missing("attention", "flash_attn_3", error) from error
    return adapt_package("flash_attn_3", package, deterministic, block)


def load_flash_attn_4(deterministic: bool = False, block: bool = False) -> Attention:
    """Load FlashAttention-4, for Hopper and Blackwell."""
    try:
        import flash_attn.cute as package
    except ImportError as error:
        raise missing("attention", "flash_attn_4", error) from error
    return adapt_package("flash_attn_4", package, deterministic, block)


def load_engine_attention(deterministic: bool = False, block: bool = False) -> Attention:
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

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        assert documents is None, "Transformer Engine's attention is only used without documents"
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


OPTIONAL_ATTENTION: dict[str, Callable[[bool, bool], Attention]] = {
    "flash_attn_2": load_flash_attn_2,
    "flash_attn_3": load_flash_attn_3,
    "flash_attn_4": load_flash_attn_4,
    "transformer_engine": load_engine_attention,
}
"""By name: loaders that take `deterministic` and `block`."""
OPTIONAL_NORM: dict[str, Callable[[], Norm]] = {
    "apex": load_apex_norm,
    "transformer_engine": load_engine_norm,
}


def installed_flash_attn(generation: int, block: bool = False) -> str | None:
    """Name of the fastest flash-attn here with a deterministic backward for a device; None: none.

    With `block` one that stops at document borders. `generation` is the device's major compute
    capability: FlashAttention-3 is for Hopper (9), FlashAttention-4 for Hopper and Blackwell (10
    and 11).
    """
    for name, generations in (("flash_attn_3", (9,)), ("flash_attn_4", (9, 10, 11))):
        if generation in generations:
            # Nobody asked for it by name, so one that is missing, too old or broken is passed over:
            # a package that does not fit its own dependencies raises anything.
            with suppress(Exception):
                OPTIONAL_ATTENTION[name](True, block)
                return name
    return None
