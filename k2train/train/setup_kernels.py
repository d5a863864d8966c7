"""Kernels of a setup: the config's `kernels` section, resolved for the device a rank has.

- Here the device is asked how it adds weight gradients, so that every choice that decides over bits
  is in the kernels line and in the forward check's signature.
- `auto` is decided on each rank, by its device and packages. Where that is not the same on all, the
  record says so: its kernels line is rank 0's.

Alternatives considered:
- Refusing it: replicas on devices of several kinds differ by rounding, which a run allows.
"""

from dataclasses import replace

import torch

from k2train.model.kernels.select import DeviceTraits, Kernels, choose_kernels
from k2train.parallel.agreement import Agreement
from k2train.parallel.collective_matmul import Product
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
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


def other_kernels(grid: ProcessGrid, kernels: Kernels) -> str:
    """Say which rank has other kernels than rank 0, and which; "" if none has. Collective."""
    agreement = Agreement(grid)
    mine = str(kernels).split(", ")
    first = agreement.from_first(mine, TEXTS, "comparison of kernels")
    # A version that is in use on rank 0 alone is missing here.
    other = [part for part in mine if part not in first] or [
        f"no {part}" for part in first if part not in mine
    ]
    found = agreement.first(", ".join(other), "comparison of kernels")
    if found is None:
        return ""
    return (
        f"rank {found[0]} has other kernels than rank 0 ({found[1]}): bits depend on which machine "
        "has which rank; install the same packages everywhere, or name them in the config"
    )
