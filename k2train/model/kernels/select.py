"""Kernel selection: which implementation computes attention, norms and products.

- Chosen once when the model is built, printed and recorded.
- Every choice is tested equal to a plain torch reference where it can run.
- `auto` takes the known fastest for the device, precision and sequence length.
- Asking for an unavailable kernel is an error at build, never a silent fallback. The one-line
  message says what to install or to choose instead.
- With `compile` the written-out norm, rotary split and SwiGLU are compiled, each once for all
  layers, and replace the fused ones.

Alternatives considered:
- Compiling whole layers: their products communicate and accumulate weight gradients as side
  effects. A compiled graph would break at them or repeat them.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from k2train.errors import ConfigError
from k2train.model.kernels.attention import (
    Attention,
    cudnn_attention,
    document_mask,
    flash_attention,
    plain_attention,
    reference_attention,
    sdpa_attention,
)
from k2train.model.kernels.elementwise import (
    Norm,
    fused_norm,
    fused_split,
    fused_swiglu,
    reference_norm,
    reference_split,
    reference_swiglu,
    torch_norm,
)
from k2train.model.kernels.fp8 import fp8_product
from k2train.model.kernels.onednn import onednn_product
from k2train.model.kernels.onednn import preferred as onednn_preferred
from k2train.model.kernels.optional import INSTALL, OPTIONAL_ATTENTION, OPTIONAL_NORM, version_of
from k2train.parallel.collective_matmul import Product

__all__ = [
    "ATTENTION",
    "NORM",
    "Attention",
    "DeviceTraits",
    "Kernels",
    "Norm",
    "choose_kernels",
    "document_mask",
]

Split = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
SwiGlu = Callable[[Tensor], Tensor]

ATTENTION: dict[str, Attention] = {
    "sdpa": sdpa_attention,
    "plain": plain_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
    "reference": reference_attention,
}
NORM: dict[str, Norm] = {"fused": fused_norm, "torch": torch_norm, "reference": reference_norm}
SPLIT: dict[str, Split] = {"fused": fused_split, "reference": reference_split}
SWIGLU: dict[str, SwiGlu] = {"fused": fused_swiglu, "reference": reference_swiglu}
PRODUCT: dict[str, Callable[[torch.device, torch.dtype], Product | None]] = {
    "torch": lambda device, dtype: None,
    "onednn": onednn_product,
    "fp8": lambda device, dtype: fp8_product(device),
}

TAKE_MASKS = ("sdpa", "plain", "reference")
"""Attention kernels that can stop at document borders."""

PLAIN_UP_TO = {torch.float32: 512, torch.bfloat16: 1024}
"""Sequence length up to which `auto` takes `plain` on a CPU.

Milliseconds forward and backward of 1024 tokens (at 2048: of 2048), 8 heads of 32, one core, flash
/ plain:

    length    128          256          512          1024         2048
    fp32      8.3 / 7.2    13.6 / 10.8  27 / 21      40 / 35      132 / 137
    bf16      21 / 4.7     18.3 / 6.1   30 / 12      35 / 24      115 / 79

The limit is memory: `plain` keeps length / 2 probabilities per head and token. At a length of 32
head_dim that equals the layer's other activations together.
"""


@dataclass(frozen=True)
class DeviceTraits:
    """What decides which kernels can run and which is fastest: device, dtype and shapes."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    sequence_length: int | None = None
    head_dim: int | None = None
    block: bool = False
    """Whether attention stops at document borders, which needs a mask."""


@dataclass(frozen=True)
class Kernels:
    """Kernels of one run: their names, and the functions they resolve to."""

    attention_name: str
    norm_name: str
    elementwise: str
    loss: str
    matmul: str
    optimizer: str
    compile: bool
    recompute: str
    recompute_layers: int | None
    """Number of layers per stage that recompute, counted from the first; None: all of them."""
    attention: Attention
    norm: Norm
    split: Split
    swiglu: SwiGlu
    product: Product | None = None
    """Products of the layers' matrices; None: torch's."""
    versions: tuple[str, ...] = ()
    """Versions of the optional packages in use."""

    def recompute_of(self, num_layers: int) -> list[str]:
        """Return the recompute policy of each layer of a stage with `num_layers`."""
        count = (
            num_layers if self.recompute_layers is None else min(self.recompute_layers, num_layers)
        )
        return [self.recompute] * count + ["none"] * (num_layers - count)

    def __str__(self) -> str:
        parts = [
            f"attention {self.attention_name}",
            f"norm {self.norm_name}",
            f"elementwise {self.elementwise}",
            f"loss {self.loss}",
            f"matmul {self.matmul}",
            f"optimizer {self.optimizer}",
            f"compile {'on' if self.compile else 'off'}",
            f"recompute {self.recompute}"
            + (
                ""
                if self.recompute_layers is None
                else f" in {self.recompute_layers} layers a stage"
            ),
            *self.versions,
        ]
        return ", ".join(parts)


def choose_kernels(
    attention: str = "auto",
    norm: str = "auto",
    elementwise: str = "auto",
    loss: str = "auto",
    matmul: str = "auto",
    optimizer: str = "auto",
    compile: str = "auto",
    recompute: str = "none",
    recompute_layers: int | None = None,
    traits: DeviceTraits | None = None,
) -> Kernels:
    """Resolve the `kernels` section for a device (None: a CPU, fp32, unknown sequence length).

    Raises ConfigError for an unknown name, a missing package, or a kernel that cannot run there.
    """
    traits = traits or DeviceTraits(torch.device("cpu"))
    compiled = choose_compile(compile, traits)
    attention_name = pick(
        "attention", attention, (*ATTENTION, *OPTIONAL_ATTENTION), auto_attention(traits)
    )
    norm_name = pick("norm", norm, (*NORM, *OPTIONAL_NORM), "fused")
    elementwise = pick("elementwise", elementwise, tuple(SPLIT), "fused")
    matmul = pick("matmul", matmul, tuple(PRODUCT), auto_matmul(traits))

    used = (attention_name, norm_name, "transformer_engine" if matmul == "fp8" else "")
    packages = sorted({INSTALL[name][0] for name in used if name in INSTALL})
    fused = elementwise == "fused" and compiled
    return Kernels(
        attention_name=attention_name,
        norm_name=norm_name,
        elementwise=elementwise,
        loss=pick("loss", loss, ("fused", "reference"), "fused"),
        matmul=matmul,
        optimizer=pick("optimizer", optimizer, ("fused", "reference"), "fused"),
        compile=compiled,
        recompute=pick("recompute", recompute, ("none", "selective", "full"), "none"),
        recompute_layers=recompute_layers,
        attention=choose_attention(attention_name, traits),
        norm=compiled_once(reference_norm)
        if compiled and norm_name == "fused"
        else choose_norm(norm_name, traits),
        split=compiled_once(reference_split) if fused else SPLIT[elementwise],
        swiglu=compiled_once(reference_swiglu) if fused else SWIGLU[elementwise],
        product=PRODUCT[matmul](traits.device, traits.dtype),
        versions=tuple(f"{name} {version_of(name)}" for name in packages),
    )


def pick(key: str, value: str, legal: tuple[str, ...], automatic: str) -> str:
    """Return `value`, or `automatic` for auto. Raises ConfigError for a name outside `legal`."""
    if value == "auto":
        return automatic
    if value not in legal:
        raise ConfigError(f"kernels.{key} ({value}) is not one of auto, {', '.join(legal)}")
    return value


def auto_attention(traits: DeviceTraits) -> str:
    """Attention kernel that `auto` means on a device."""
    if traits.device.type != "cuda":
        known = traits.sequence_length is not None and traits.sequence_length <= PLAIN_UP_TO.get(
            traits.dtype, 0
        )
        return "plain" if known else "sdpa"

    if traits.block or traits.dtype.itemsize != 2:
        return "sdpa"

    generation = torch.cuda.get_device_capability(traits.device)[0]
    narrow = traits.head_dim is not None and traits.head_dim % 8 == 0 and traits.head_dim <= 128
    if generation >= 9 and narrow:
        return "cudnn"
    return "flash" if generation >= 8 else "sdpa"


def auto_matmul(traits: DeviceTraits) -> str:
    """Matrix product that `auto` means on a device."""
    return (
        "onednn"
        if traits.device.type == "cpu" and traits.dtype == torch.float32 and onednn_preferred()
        else "torch"
    )


def choose_attention(name: str, traits: DeviceTraits) -> Attention:
    """Return the attention kernel of that name.

    Raises ConfigError when it is missing or cannot run.
    """
    optional = name in OPTIONAL_ATTENTION
    function = OPTIONAL_ATTENTION[name]() if optional else ATTENTION[name]

    where = f"kernels.attention ({name})"
    if traits.block and name not in TAKE_MASKS:
        raise ConfigError(
            f"{where} takes no mask, which data.cross_documents (block) needs: choose one of "
            f"{', '.join(TAKE_MASKS)}, or attend"
        )

    if name == "cudnn" or optional:
        needs_cuda(where, traits)
    if traits.dtype.itemsize != 2 and traits.device.type == "cuda" and name not in TAKE_MASKS:
        raise ConfigError(
            f"{where} computes in bf16 only, precision is fp32: "
            "set precision to bf16, or choose sdpa"
        )

    return function


def choose_norm(name: str, traits: DeviceTraits) -> Norm:
    """Return the norm of that name. Raises ConfigError when it is missing or cannot run."""
    if name not in OPTIONAL_NORM:
        return NORM[name]
    function = OPTIONAL_NORM[name]()
    needs_cuda(f"kernels.norm ({name})", traits)
    return function


def needs_cuda(where: str, traits: DeviceTraits) -> None:
    """Raise ConfigError anywhere but on a CUDA device."""
    if traits.device.type != "cuda":
        raise ConfigError(
            f"{where} needs a CUDA device, and this is {traits.device.type}: choose auto"
        )


def choose_compile(value: str, traits: DeviceTraits) -> bool:
    """Whether regions are compiled; `auto` means with a GPU and Triton.

    Raises ConfigError without a compiler.
    """
    cuda = traits.device.type == "cuda"
    value = pick("compile", value, ("on", "off"), "on" if cuda and has_triton() else "off")
    if value == "on" and cuda and not has_triton():
        raise ConfigError(
            "kernels.compile (on) needs the package triton "
            "on a CUDA device: pip install triton, or off"
        )

    if value == "on" and not cuda and not any(shutil.which(name) for name in ("g++", "clang++")):
        raise ConfigError(
            "kernels.compile (on) needs a C++ compiler on a CPU: "
            "install g++ or clang++, or choose off"
        )

    return value == "on"


@cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for all layers and stages: one graph, fixed shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)
