"""Kernels of a setup: the config's `kernels` section, resolved for the device a rank has.

- Here the device is asked how it adds weight gradients, so that every choice that decides over bits
  is in the kernels line and in the forward check's signature.
"""

from dataclasses import replace

import torch

from k2train.model.kernels.select import DeviceTraits, Kernels, choose_kernels
from k2train.parallel.collective_matmul import Product
from k2train.train.setup import Setup

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kernels_of(setup: Setup, device: torch.device | None = None) -> Kernels:
    """Return the kernels of a setup, resolved for a device (None: a CPU)."""
    k, device = setup.config.kernels, device or torch.device("cpu")
    dtype = DTYPES[setup.config.precision]
    chosen = choose_kernels(
        attention=k.attention,
        norm=k.norm,
        elementwise=k.elementwise,
        loss=k.loss,
        matmul=k.matmul,
        optimizer=k.optimizer,
        compile=k.compile,
        recompute=k.recompute,
        recompute_layers=k.recompute_layers,
        deterministic=k.deterministic,
        traits=DeviceTraits(
            device=device,
            dtype=dtype,
            sequence_length=setup.config.data.sequence_length,
            head_dim=setup.architecture.head_dim,
            block=setup.block,
        ),
    )
    product = chosen.product or Product()
    return replace(chosen, gradients=product.gradient_sums(device, dtype))
