"""Attention selection: the fastest kernel by device, precision, length, mask and determinism.

- `auto` never takes a kernel that cannot run, or that is not deterministic where that is asked for.
- A kernel asked for by name that cannot is one line at build.

Alternatives considered:
- Timing the candidates at the start: a resumed run could take another kernel, and other bits.
"""

import torch

from k2train.errors import ConfigError
from k2train.model.kernels.attention import (
    Attention,
    cudnn_attention,
    deterministic_sdpa_attention,
    flash_attention,
    plain_attention,
    reference_attention,
    sdpa_attention,
)
from k2train.model.kernels.determinism import require_deterministic_flash_attn
from k2train.model.kernels.device_traits import DeviceTraits, needs_cuda
from k2train.model.kernels.optional import OPTIONAL_ATTENTION, installed_flash_attn

ATTENTION: dict[str, Attention] = {
    "sdpa": sdpa_attention,
    "plain": plain_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
    "reference": reference_attention,
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


def auto_attention(traits: DeviceTraits, deterministic: bool) -> str:
    """Attention kernel that `auto` means on a device.

    `deterministic`: the fastest one known whose backward repeats to the bit.
    """
    if traits.device.type != "cuda":
        known = traits.sequence_length is not None and traits.sequence_length <= PLAIN_UP_TO.get(
            traits.dtype, 0
        )
        return "plain" if known else "sdpa"

    if traits.block or traits.dtype.itemsize != 2:
        return "sdpa"

    generation = torch.cuda.get_device_capability(traits.device)[0]
    narrow = traits.head_dim is not None and traits.head_dim % 8 == 0 and traits.head_dim <= 128
    if narrow and not deterministic and generation >= 9:
        return "cudnn"
    if narrow and deterministic and (name := installed_flash_attn(generation)):
        return name
    return "flash" if generation >= 8 else "sdpa"


def choose_attention(name: str, traits: DeviceTraits, deterministic: bool) -> Attention:
    """Return the attention kernel of that name.

    Raises ConfigError when it is missing, cannot run, or cannot be `deterministic`.
    """
    optional = name in OPTIONAL_ATTENTION
    function = OPTIONAL_ATTENTION[name](deterministic) if optional else ATTENTION[name]
    if name == "sdpa" and deterministic:
        function = deterministic_sdpa_attention

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

    if deterministic and optional:
        generation = torch.cuda.get_device_capability(traits.device)[0]
        require_deterministic_flash_attn(name, generation, traits.head_dim)
    return function
