"""Kernels of a setup: the config's `kernels` section, resolved for the device a rank has.

- Here the device is asked how it adds weight gradients, so that every choice that decides over bits
  is in the kernels line and in the forward check's signature.
- `measured` is `auto`, and each product by the library that was measured as the fastest, where a
  measurement is on record (see `matmul_choice`).
- `auto` is decided on each rank, by its device and packages. Where that is not the same on all, the
  record says so: its kernels line is rank 0's.

Alternatives considered:
- Refusing it: replicas on devices of several kinds differ by rounding, which a run allows.
"""

from dataclasses import replace

import torch

from k2train.errors import ConfigError
from k2train.model.kernels.openblas import find_openblas
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.model.kernels.product_choice import LIBRARIES, Choice, ChosenProduct
from k2train.model.kernels.select import DeviceTraits, Kernels, choose_kernels
from k2train.model.kernels.upcast import UpcastProduct
from k2train.parallel.agreement import Agreement
from k2train.parallel.collective_matmul import Product
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.train.machine import cpu_has_bf16
from k2train.train.setup import Setup

MEASURED = "measured"
"""Value of `kernels.matmul`."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kernels_of(
    setup: Setup, device: torch.device | None = None, choice: Choice | None = None
) -> Kernels:
    """Return the kernels of a setup, resolved for a device (None: a CPU).

    `choice` is what `kernels.matmul: measured` takes of a measurement. Raises ConfigError when a
    kernel cannot run there.
    """
    k, device = setup.config.kernels, device or torch.device("cpu")
    dtype = DTYPES[setup.config.precision]
    if k.matmul == MEASURED and device.type != "cpu":
        raise ConfigError(
            f"kernels.matmul (measured) is for a CPU, and this is {device.type}: choose auto"
        )
    chosen = choose_kernels(
        attention=k.attention,
        norm=k.norm,
        elementwise=k.elementwise,
        loss=k.loss,
        matmul="auto" if k.matmul == MEASURED else k.matmul,
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
            emulates_bf16=cpu_has_bf16() is False,
        ),
    )
    if choice is not None:
        chosen = _with_choice(chosen, choice)
    product = chosen.product or Product()
    return replace(chosen, gradients=product.gradient_sums(device, dtype))


def fp32_library(kernels: Kernels) -> str:
    """Return the library of a CPU's fp32 products; "" where the products are not fp32's."""
    if kernels.matmul == "upcast":
        return fp32_library_of_processor()
    fp32 = kernels.matmul in LIBRARIES and "rounded" not in kernels.gradients
    return kernels.matmul if fp32 else ""


def _with_choice(kernels: Kernels, choice: Choice) -> Kernels:
    """Return the kernels with each product by the library that was chosen for its shape."""
    product: Product = ChosenProduct(choice)
    if kernels.matmul == "upcast":
        product = UpcastProduct(product)
    versions, openblas = kernels.versions, str(find_openblas())
    if "openblas" in choice.libraries and openblas not in versions:
        versions = (*versions, openblas)
    return replace(kernels, choice=choice, product=product, versions=versions)


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
