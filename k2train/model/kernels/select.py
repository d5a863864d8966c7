"""Kernel selection: which implementation computes attention, norms and products.

- Chosen once when the model is built, printed and recorded.
- Every choice is tested equal to a plain torch reference where it can run.
- `auto` takes the known fastest for the device, precision and sequence length.
- Asking for an unavailable kernel is an error at build, never a silent fallback. The one-line
  message says what to install or to choose instead.
- With `deterministic`, on a GPU, a kernel that does not repeat to the bit is refused (see
  `determinism`), and `auto` takes the fastest of the others.
- With `compile` the written-out norm, rotary split and SwiGLU are compiled, each once for all
  layers, and replace the fused ones. So are their formulas (see `formulas`).
- `triton` names this project's (`k2train.triton_kernels`). By count of bytes the loss gains most (6
  a bf16 logit, torch's operators need 28), then rotary split and SwiGLU without `compile`. `auto`
  takes none of them before a device has run and measured them (`scripts/gpu_check.sh`).

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
from k2train.model.kernels.attention import PLAIN_UP_TO, Attention
from k2train.model.kernels.choose_attention import (
    ATTENTION,
    auto_attention,
    choose_attention,
)
from k2train.model.kernels.determinism import require_deterministic
from k2train.model.kernels.device_traits import DeviceTraits, needs_cuda
from k2train.model.kernels.documents import Documents
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
from k2train.model.kernels.formulas import COMPILED_VERSION, FUSED, Formulas, compiled_formulas
from k2train.model.kernels.fp8 import fp8_product
from k2train.model.kernels.onednn import onednn_product
from k2train.model.kernels.openblas import find_openblas, openblas_product
from k2train.model.kernels.optional import (
    INSTALL,
    OPTIONAL_ATTENTION,
    OPTIONAL_NORM,
    version_of,
)
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.model.kernels.product_choice import Choice
from k2train.model.kernels.upcast import upcast_product
from k2train.parallel.collective_matmul import Product
from k2train.plan.documents import method_of
from k2train.triton_kernels.load import (
    AddNorm,
    Softmax,
    load_norm,
    load_softmax,
    load_split,
    load_swiglu,
    triton_version,
)

__all__ = [
    "ATTENTION",
    "NORM",
    "PLAIN_UP_TO",
    "Attention",
    "DeviceTraits",
    "Documents",
    "Kernels",
    "Norm",
    "choose_kernels",
]

Split = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
SwiGlu = Callable[[Tensor], Tensor]

NORM: dict[str, Norm] = {"fused": fused_norm, "torch": torch_norm, "reference": reference_norm}
SPLIT: dict[str, Split] = {"fused": fused_split, "reference": reference_split}
SWIGLU: dict[str, SwiGlu] = {"fused": fused_swiglu, "reference": reference_swiglu}
PRODUCT: dict[str, Callable[[torch.device, torch.dtype], Product | None]] = {
    "torch": lambda device, dtype: None,
    "onednn": onednn_product,
    "openblas": openblas_product,
    "upcast": upcast_product,
    "fp8": lambda device, dtype: fp8_product(device),
}


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
    deterministic: bool
    """Whether the same work gives the same bits: asked for, or computed on a CPU."""
    attention: Attention
    norm: Norm
    split: Split
    swiglu: SwiGlu
    product: Product | None = None
    """Products of the layers' matrices; None: torch's."""
    gradients: str = ""
    """How weight gradients get into their fp32 sums, once the device was asked; "" before."""
    formulas: Formulas | None = None
    """Norm, split and SwiGLU without autograd, on a CPU; None where one of them has no formula."""
    add_norm: AddNorm | None = None
    """Residual sum and its norm in one pass, where the kernel has it."""
    softmax: Softmax | None = None
    """Softmax of the fused loss; None: by torch's operators."""
    documents: str = ""
    """How attention stops at document borders (see `k2train.plan.documents`); "" where it does
    not."""
    choice: Choice | None = None
    """Libraries of the products by their shapes, where they were measured."""
    versions: tuple[str, ...] = ()
    """Versions of the optional packages and of the compiled code in use."""

    def recompute_of(self, num_layers: int) -> list[str]:
        """Return the recompute policy of each layer of a stage with `num_layers`."""
        count = (
            num_layers if self.recompute_layers is None else min(self.recompute_layers, num_layers)
        )
        return [self.recompute] * count + ["none"] * (num_layers - count)

    @property
    def largest_matmul(self) -> str:
        """Matrix products in use that need the most memory."""
        added = self.matmul in ("torch", "openblas")
        onednn = added and self.choice and "onednn" in self.choice.libraries
        return "onednn" if onednn else self.matmul

    def names(self) -> dict[str, str]:
        """Return the implementation of each operation, by its key of `kernels`."""
        return {
            "attention": self.attention_name,
            "norm": self.norm_name,
            "elementwise": self.elementwise,
            "loss": self.loss,
            "matmul": self.matmul,
            "optimizer": self.optimizer,
        }

    def __str__(self) -> str:
        parts = [
            *(f"{key} {name}" for key, name in self.names().items()),
            *([str(self.choice)] if self.choice and self.choice.others else []),
            *([f"documents {self.documents}"] if self.documents else []),
            f"compile {'on' if self.compile else 'off'}",
            f"recompute {self.recompute}"
            + (
                ""
                if self.recompute_layers is None
                else f" in {self.recompute_layers} layers a stage"
            ),
            *([f"gradients {self.gradients}"] if self.gradients else []),
            f"deterministic {'on' if self.deterministic else 'off'}",
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
    deterministic: bool = True,
    traits: DeviceTraits | None = None,
) -> Kernels:
    """Resolve the `kernels` section for a device (None: a CPU, fp32, unknown sequence length).

    Raises ConfigError for an unknown name, a missing package, or a kernel that cannot run there or
    cannot be `deterministic`.
    """
    traits = traits or DeviceTraits(torch.device("cpu"))
    ordered = deterministic and traits.device.type != "cpu"
    compiled = choose_compile(compile, traits)
    attention_name = pick(
        "attention", attention, (*ATTENTION, *OPTIONAL_ATTENTION), auto_attention(traits, ordered)
    )
    norm_name = pick("norm", norm, (*NORM, *OPTIONAL_NORM, "triton"), "fused")
    elementwise = pick("elementwise", elementwise, (*SPLIT, "triton"), "fused")
    loss = pick("loss", loss, ("fused", "triton", "reference"), "fused")
    optimizer = pick("optimizer", optimizer, ("fused", "triton", "reference"), "fused")
    matmul = pick("matmul", matmul, tuple(PRODUCT), auto_matmul(traits))
    versions = code_versions(attention_name, norm_name, matmul, compiled, traits)
    names = {"norm": norm_name, "elementwise": elementwise, "loss": loss, "optimizer": optimizer}
    versions += triton_version(names, traits.device.type)
    split, swiglu = choose_elementwise(elementwise, compiled)
    chosen = Kernels(
        attention_name=attention_name,
        norm_name=norm_name,
        elementwise=elementwise,
        loss=loss,
        matmul=matmul,
        optimizer=optimizer,
        compile=compiled,
        recompute=pick("recompute", recompute, ("none", "selective", "full"), "none"),
        recompute_layers=recompute_layers,
        deterministic=deterministic or traits.device.type == "cpu",
        attention=choose_attention(attention_name, traits, ordered, matmul == "upcast"),
        norm=compiled_once(reference_norm)
        if compiled and norm_name == "fused"
        else choose_norm(norm_name, traits),
        split=split,
        swiglu=swiglu,
        product=PRODUCT[matmul](traits.device, traits.dtype),
        formulas=choose_formulas(norm_name, elementwise, compiled, traits),
        add_norm=load_norm()[1] if norm_name == "triton" else None,
        softmax=load_softmax() if loss == "triton" else None,
        documents=(method_of(attention_name, traits.device.type) or "") if traits.block else "",
        versions=tuple(versions),
    )
    if ordered:
        require_deterministic(chosen.names())
    return chosen


def code_versions(
    attention: str, norm: str, matmul: str, compiled: bool, traits: DeviceTraits
) -> list[str]:
    """Name and version of the optional packages, libraries and compiled code of these kernels."""
    used = (attention, norm, "transformer_engine" if matmul == "fp8" else "")
    packages = sorted({INSTALL[name][0] for name in used if name in INSTALL})
    multiplies = fp32_library_of_processor() if matmul == "upcast" else matmul
    library = [str(find_openblas())] if multiplies == "openblas" else []
    on_cpu = compiled and traits.device.type == "cpu"
    code = [f"compiled code {COMPILED_VERSION}"] if on_cpu else []
    return code + library + [f"{name} {version_of(name)}" for name in packages]


def pick(key: str, value: str, legal: tuple[str, ...], automatic: str) -> str:
    """Return `value`, or `automatic` for auto. Raises ConfigError for a name outside `legal`."""
    if value == "auto":
        return automatic
    if value not in legal:
        raise ConfigError(f"kernels.{key} ({value}) is not one of auto, {', '.join(legal)}")
    return value


def auto_matmul(traits: DeviceTraits) -> str:
    """Matrix product that `auto` means on a device."""
    if traits.device.type != "cpu":
        return "torch"
    if traits.dtype == torch.float32:
        return fp32_library_of_processor()
    return "upcast" if traits.emulates_bf16 else "torch"


def choose_norm(name: str, traits: DeviceTraits) -> Norm:
    """Return the norm of that name. Raises ConfigError when it is missing or cannot run."""
    if name == "triton":
        return load_norm()[0]
    if name not in OPTIONAL_NORM:
        return NORM[name]
    function = OPTIONAL_NORM[name]()
    needs_cuda(f"kernels.norm ({name})", traits)
    return function


def choose_elementwise(name: str, compiled: bool) -> tuple[Split, SwiGlu]:
    """Return the rotary split and the SwiGLU of that name, `compiled` in place of fused ones."""
    if name == "triton":
        return load_split(), load_swiglu()
    if name == "fused" and compiled:
        return compiled_once(reference_split), compiled_once(reference_swiglu)
    return SPLIT[name], SWIGLU[name]


def choose_formulas(
    norm: str, elementwise: str, compiled: bool, traits: DeviceTraits
) -> Formulas | None:
    """Return the formulas of fused kernels on a CPU, `compiled` in place of fused ones."""
    if traits.device.type != "cpu" or (norm, elementwise) != ("fused", "fused"):
        return None
    return compiled_formulas(compiled_once) if compiled else FUSED


def choose_compile(value: str, traits: DeviceTraits) -> bool:
    """Whether regions are compiled; `auto` means with a GPU and Triton.

    On a CPU the fused kernels are about as fast in fp32 (`docs/where_time_goes.md`), and no start
    has to compile.

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


RECOMPILE_LIMIT = 4096
"""Graphs that one compiled function may have in a process; each shape of a batch needs two."""


@cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for all layers and stages: one graph for each shape it meets.

    torch gives up at 8 graphs a function and 256 in all, for the whole process. Here each is one
    of fixed shapes, with and without gradients, so a sweep over lengths needs more of them.
    Raises torch's error, which names the limit, above `RECOMPILE_LIMIT` graphs.
    """
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, fullgraph=True, dynamic=False)
