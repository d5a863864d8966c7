"""oneDNN fp32 matrix products on a CPU (`kernels.matmul: onednn`).

- torch includes oneDNN but does not use it for fp32.
- torch gives fp32 products to MKL, whose paths for AVX-512 need an Intel processor. Both are plain
  IEEE fp32 (largest error against float64, relative to the largest value: 3.8e-7 and 6.2e-7).
- bf16 products use oneDNN already.
- Which processors `auto` takes it for: `processor_library`.
- The op is the one that torch's compiler emits for a linear layer. It has no derivative, and needs
  none here.
"""

from typing import Any

import torch
from torch import Tensor

from k2train.errors import ConfigError
from k2train.parallel.collective_matmul import Product


class OneDnnProduct(Product):
    """fp32 products by oneDNN. Other dtypes and empty products go to torch."""

    writes_out = False

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        if a.dtype != torch.float32 or not a.numel() or not matrix.numel():
            return super().multiply(a, matrix, gradient, out)
        y = _linear(a, matrix.t())
        return y if out is None else out.copy_(y)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        if x.dtype != torch.float32 or not dy.numel() or not x.numel():
            super().add_weight_gradient(into, dy, x)
        else:
            into.add_(_linear(dy.t(), x.t()))

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        return "fp32 in two steps"


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, k], weight [m, k], each with any strides -> x weight^T [n, m]."""
    y: Any = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def available() -> bool:
    """Whether this torch has the op."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(device: torch.device, dtype: torch.dtype) -> OneDnnProduct:
    """Return the products of `kernels.matmul: onednn`.

    Raises ConfigError when they are not available, or would change nothing.
    """
    if device.type != "cpu":
        raise ConfigError(
            f"kernels.matmul (onednn) is for a CPU, and this is {device.type}: choose auto"
        )

    if dtype != torch.float32:
        raise ConfigError(
            "kernels.matmul (onednn) is for precision fp32, "
            "in bf16 torch already uses oneDNN: choose auto"
        )

    if not available():
        raise ConfigError(
            "kernels.matmul (onednn) needs a torch that was built with oneDNN: choose torch"
        )

    return OneDnnProduct()
