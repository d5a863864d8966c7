"""Fitted constants of the cost model: how near real programs come to a data sheet's numbers.

- Few, and each has a meaning that can be measured alone. `tools/plan.py --calibration-report` fits
  them to published step times, and shows the error on sources that a fit has not seen.
- Two constants belong to a generation of devices, the others to all of them.
- Every one has a prior from what is known without the rows, and how sure that is. A fit moves a
  constant only as far as the rows are surer (ridge regression of the logarithms).

Alternatives considered:
- One efficiency for each model size: fits rows, and ranks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

LOW = ("fp8", "mxfp8", "nvfp4")
"""Precisions of products with a constant of their own; all others run at `matmul`."""
CALIBRATED: Mapping[str, tuple[str, ...]] = {
    "ampere": ("bf16", "fp16", "fp32"),
    "hopper": ("bf16", "fp16", "fp32", "fp8"),
    "blackwell": LOW,
    "blackwell-ultra": LOW,
}
"""Generations and precisions with published rows behind their constants."""


@dataclass(frozen=True)
class Constants:
    """Constants of the cost model; shares are of a data sheet's number, 0 to 1."""

    matmul: float
    """Peak FLOP/s that an endless matrix product reaches."""
    attention: float
    """Peak FLOP/s of a fused attention's products, forward; the backward has 0.8 of it."""
    fp8: float = 0.824
    """Of that share, what is left in fp8: casts and scales take the rest."""
    mxfp8: float = 0.745
    """The same in mxfp8, which scales every 32 elements."""
    nvfp4: float = 0.498
    """The same in nvfp4, which scales every 16 elements, rotates and rounds at random."""
    memory: float = 0.830
    """Memory rate that element-wise kernels reach."""
    eager: float = 1.92
    """Passes over memory of kernels that are not fused, for those of fused ones."""
    inner_link: float = 0.798
    """Rate of the links inside a node that a ring reaches."""
    network: float = 0.954
    """Rate of the network that a ring reaches."""
    exposed: float = 0.218
    """Share of overlapped traffic that computation still waits for."""
    host_seconds: float = 2.53e-3
    """Host time to start the kernels of a layer's pass, of plain operators (see `FUSED_STARTS`)."""
    step_seconds: float = 0.0187
    """What every step takes besides: logging, data, the clip's synchronisation."""


SHARED = (
    "fp8",
    "memory",
    "eager",
    "inner_link",
    "network",
    "exposed",
    "host_seconds",
    "step_seconds",
)
"""Constants that all generations share."""

PRIOR: Mapping[str, tuple[float, float]] = {
    "matmul": (0.75, 0.10),
    "attention": (0.50, 0.20),
    "fp8": (0.75, 0.10),
    "mxfp8": (0.75, 0.10),
    "nvfp4": (0.60, 0.20),
    "memory": (0.75, 0.10),
    "eager": (1.60, 0.20),
    "inner_link": (0.75, 0.10),
    "network": (0.70, 0.20),
    "exposed": (0.25, 0.40),
    "host_seconds": (1.5e-3, 0.70),
    "step_seconds": (0.02, 0.70),
}
"""Each constant before any row was seen, and the standard deviation of its logarithm."""

FUSED_STARTS = 1 / 3
"""Host time of a layer whose attention and element-wise kernels are fused, for that of one of plain
operators: about 15 kernels instead of 45, counted in the layers of Transformer Engine and of
Megatron-LM with dropout and its random states."""

FUSED_ATTENTION: Mapping[str, Mapping[str, float]] = {
    "flash1": {"ampere": 0.6, "hopper": 0.6, "blackwell": 0.6, "blackwell-ultra": 0.6},
    "flash2": {},
    "newest": {"hopper": 1.6, "blackwell": 1.6, "blackwell-ultra": 1.6},
}
"""Rate of a fused attention for that of FlashAttention-2, by generation; 1 where not named.

FlashAttention-2 reached twice its predecessor's rate on an A100 (Dao 2023, arXiv:2307.08691), and
FlashAttention-3 and cuDNN 1.5 to 2 times that on an H100 (Shah et al. 2024, arXiv:2407.08608).
"""

GENERATIONS: Mapping[str, Constants] = {
    "ampere": Constants(matmul=0.798, attention=0.538),
    "hopper": Constants(matmul=0.699, attention=0.361),
    "blackwell": Constants(matmul=0.699, attention=0.361),
    "blackwell-ultra": Constants(matmul=0.864, attention=0.361),
    "cpu": Constants(matmul=0.70, attention=0.40),
}

NEWEST = "blackwell"
"""Generation whose constants one without any takes."""


def constants_of(generation: str) -> Constants:
    """Constants of a generation; the newest one's for a name without any."""
    return GENERATIONS.get(generation, GENERATIONS[NEWEST])


def changed(constants: Constants, **values: float) -> Constants:
    """Return constants with other values."""
    return replace(constants, **values)
