"""Device traits: what decides which kernels can run and which is fastest."""

from dataclasses import dataclass

import torch

from k2train.errors import ConfigError


@dataclass(frozen=True)
class DeviceTraits:
    """Device, dtype and shapes of a run, as far as they matter for the choice of kernels."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    sequence_length: int | None = None
    head_dim: int | None = None
    block: bool = False
    """Whether attention stops at document borders."""
    emulates_bf16: bool = False
    """Whether the CPU is known to have no bf16 instructions."""


def needs_cuda(where: str, traits: DeviceTraits) -> None:
    """Raise ConfigError anywhere but on a CUDA device."""
    if traits.device.type != "cuda":
        raise ConfigError(
            f"{where} needs a CUDA device, and this is {traits.device.type}: choose auto"
        )
