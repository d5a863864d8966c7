"""Attention selection: the fastest kernel by device, precision, length, documents, determinism.

- `auto` never takes a kernel that cannot run, or that is not deterministic where that is asked for.
- A kernel asked for by name that cannot is one line at build.
- Where attention stops at document borders, a kernel does it in one of the ways of
  `k2train.plan.documents`, which is decided here too.

Alternatives considered:
- Timing the candidates at the start: a resumed run could take another kernel, and other bits.
"""

import torch

from k2train.errors import ConfigError
from k2train.model.kernels.attention import (
    PLAIN_UP_TO,
    Attention,
    by_length_attention,
    cudnn_attention,
    deterministic_sdpa_attention,
    flash_attention,
    plain_attention,
    reference_attention,
    sdpa_attention,
)
from k2train.model.kernels.determinism import require_deterministic_flash_attn
from k2train.model.kernels.device_traits import DeviceTraits, needs_cuda
from k2train.model.kernels.documents import packed
from k2train.model.kernels.optional import (
    OPTIONAL_ATTENTION,
    installed_flash_attn,
    load_torch_varlen,
)
from k2train.model.kernels.upcast import UPCAST_ATTENTION
from k2train.plan.documents import method_of

ATTENTION: dict[str, Attention] = {
    "sdpa": sdpa_attention,
    "plain": plain_attention,
    "by_length": by_length_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
    "reference": reference_attention,
}

ANY_PRECISION = ("sdpa", "plain", "by_length", "reference")
"""Attention kernels that compute in fp32 on a GPU too."""
WIDEST_FLASH = 256
"""Largest head dimension of torch's flash kernel."""


def auto_attention(traits: DeviceTraits, deterministic: bool) -> str:
    """Attention kernel that `auto` means on a device.

    `deterministic`: the fastest one known whose backward repeats to the bit.
    """
    if traits.device.type == "cpu" and traits.block:
        return "by_length"
    if traits.device.type != "cuda":
        known = traits.sequence_length is not None and traits.sequence_length <= PLAIN_UP_TO.get(
            traits.dtype, 0
        )
        return "plain" if known else "sdpa"

    if traits.dtype.itemsize != 2:
        return "sdpa"

    generation = torch.cuda.get_device_capability(traits.device)[0]
    narrow = traits.head_dim is not None and traits.head_dim % 8 == 0 and traits.head_dim <= 128
    if traits.block:
        return _auto_within_documents(traits, generation, narrow)
    if narrow and not deterministic and generation >= 9:
        return "cudnn"
    if narrow and deterministic and (name := installed_flash_attn(generation)):
        return name
    return "flash" if generation >= 8 else "sdpa"


def _auto_within_documents(traits: DeviceTraits, generation: int, narrow: bool) -> str:
    """The same where attention stops at document borders: a dense mask only where nothing else is.

    cuDNN's kernel is no choice here, so a flash-attn that is installed is the fastest one also
    where no order of sums is asked for.
    """
    if narrow and (name := installed_flash_attn(generation, block=True)):
        return name
    fits = traits.head_dim is not None and _fits_varlen(traits.head_dim)
    return "flash" if generation >= 8 and fits and load_torch_varlen() else "sdpa"


def _fits_varlen(head_dim: int) -> bool:
    """Whether torch's flash kernel takes such heads within documents, where nothing pads them."""
    return head_dim % 8 == 0 and head_dim <= WIDEST_FLASH


def choose_attention(
    name: str, traits: DeviceTraits, deterministic: bool, upcast: bool = False
) -> Attention:
    """Return the attention kernel of that name; `upcast`: with products of bf16 in fp32.

    Raises ConfigError when it is missing, cannot run, or cannot be `deterministic`.
    """
    optional = name in OPTIONAL_ATTENTION
    where = f"kernels.attention ({name})"
    # A GPU's kernel answers by its device first: what it does with documents is said for a GPU.
    method = method_of(name, "cuda" if optional else traits.device.type)
    if traits.block and method is None:
        raise ConfigError(
            f"{where} cannot stop at document borders, which data.cross_documents (block) asks "
            "for: choose auto, sdpa or plain, or attend"
        )

    if optional:
        function = OPTIONAL_ATTENTION[name](deterministic, traits.block)
    else:
        function = UPCAST_ATTENTION.get(name, ATTENTION[name]) if upcast else ATTENTION[name]
    if name == "sdpa" and deterministic:
        function = deterministic_sdpa_attention
    if traits.block and not optional:
        function = _within_documents(where, function, method, traits.head_dim)

    if name == "cudnn" or optional:
        needs_cuda(where, traits)
    if traits.dtype.itemsize != 2 and traits.device.type == "cuda" and name not in ANY_PRECISION:
        raise ConfigError(
            f"{where} computes in bf16 only, precision is fp32: "
            "set precision to bf16, or choose sdpa"
        )

    if deterministic and optional:
        generation = torch.cuda.get_device_capability(traits.device)[0]
        require_deterministic_flash_attn(name, generation, traits.head_dim)
    return function


def _within_documents(
    where: str, function: Attention, method: str | None, head_dim: int | None
) -> Attention:
    """Make a kernel of torch's or of this project stop at document borders.

    Raises ConfigError where this torch has no function for that, or none for such heads.
    """
    if method == "packed":
        return packed(function)
    if method == "masked":
        return function
    if head_dim is not None and not _fits_varlen(head_dim):
        raise ConfigError(
            f"{where} takes heads of a multiple of 8 up to {WIDEST_FLASH} for "
            f"data.cross_documents (block), these have {head_dim}: choose sdpa, or attend"
        )
    found = load_torch_varlen()
    if found is None:
        raise ConfigError(
            f"{where} needs torch 2.10 for data.cross_documents (block), and this is "
            f"{torch.__version__}: update torch, choose sdpa, or attend"
        )
    return found
