"""Deterministic kernels: which implementations give the same bits every time they run on a GPU.

- A GPU adds in the order in which its blocks finish, unless a kernel fixes that order. Attention
  backward passes are where it matters: many blocks add to one gradient of the queries.
- With `kernels.deterministic` only the names in `DETERMINISTIC` may run, under torch's strict mode
  (`k2train.train.strict_mode`). Some of them fix the order in that mode only.
- A new kernel is refused until it is declared here. A CPU runs every kernel in a fixed order, so
  nothing is refused there.

Sources, read and not measured: torch's `attention_backward.cu` and `sdp_utils.cpp` (flash and
memory-efficient attention fix the order in strict mode, cuDNN's is then not used), PyTorch's
reproducibility notes, the interfaces of FlashAttention 2, 3 and 4 (github.com/Dao-AILab/
flash-attention at 0251105), Transformer Engine's `DotProductAttention`, apex's
`layer_norm_cuda_kernel.cu` (partial sums, no atomic additions).

Alternatives considered:
- A list of what is forbidden: a kernel that nobody examined would pass.
- torch's strict mode alone: it knows torch's operators, not those of other packages.
"""

from collections.abc import Mapping

from torch.nn.attention import SDPBackend

from k2train.errors import ConfigError

DETERMINISTIC: dict[str, frozenset[str]] = {
    "attention": frozenset(
        {
            "sdpa",
            "plain",
            "by_length",
            "flash",
            "flash_attn_2",
            "flash_attn_3",
            "flash_attn_4",
            "transformer_engine",
            "reference",
        }
    ),
    "norm": frozenset({"fused", "torch", "apex", "transformer_engine", "triton", "reference"}),
    "elementwise": frozenset({"fused", "triton", "reference"}),
    "loss": frozenset({"fused", "triton", "reference"}),
    # 8-bit products: scales are maxima, which no order changes, and sums are cuBLAS's.
    # What was measured is on record, and the same at every start.
    "matmul": frozenset({"torch", "onednn", "openblas", "measured", "upcast", "fp8"}),
    "optimizer": frozenset({"fused", "triton", "reference"}),
}
"""By key of `kernels`: implementations that are deterministic in strict mode."""
REASONS = {
    ("attention", "cudnn"): (
        "its backward adds gradients in any order, and torch cannot ask cuDNN for another"
    ),
}
"""By key and name: why an implementation is not."""
SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""What `kernels.attention: sdpa` may choose from: in strict mode each of them fixes the order."""

WIDEST_FLASH_ATTN_3 = 192
"""Largest head dimension whose deterministic backward FlashAttention-3 has."""
WITHOUT_FLASH_ATTN_4 = 12
"""Major compute capability where FlashAttention-4 has no deterministic backward."""


def require_deterministic(names: Mapping[str, str]) -> None:
    """Raise ConfigError unless all implementations (key of `kernels` -> name) are declared so."""
    for key, name in names.items():
        if name not in DETERMINISTIC[key]:
            reason = REASONS.get((key, name), "nobody has declared that it adds in a fixed order")
            raise _refusal(key, name, reason)


def require_deterministic_flash_attn(name: str, generation: int, head_dim: int | None) -> None:
    """Raise ConfigError where a FlashAttention package has no deterministic backward.

    `generation` is the device's major compute capability.
    """
    if name == "flash_attn_3" and (head_dim or 0) > WIDEST_FLASH_ATTN_3:
        raise _refusal(
            "attention",
            name,
            f"its backward is deterministic up to a head dimension of {WIDEST_FLASH_ATTN_3}, "
            f"this is {head_dim}",
        )
    if name == "flash_attn_4" and generation == WITHOUT_FLASH_ATTN_4:
        raise _refusal(
            "attention",
            name,
            f"it has no deterministic backward for compute capability {generation}",
        )


def _refusal(key: str, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"kernels.{key} ({name}) is not deterministic: {reason}; set kernels.{key}: auto, or "
        "kernels.deterministic: false, and no run will repeat to the bit"
    )
