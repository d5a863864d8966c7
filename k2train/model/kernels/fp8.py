"""fp8 matrix products (`kernels.matmul: fp8`) for the transformer blocks, by Transformer Engine.

- Factors are rounded on use, each tensor scaled by its largest value (current scaling): weights and
  activations to e4m3, gradients, which need range, to e5m2.
- Products accumulate in fp32, weight gradients straight into the fp32 sums.
- Weights, activations and communication keep the run's dtype. No state outlives a product, so a
  checkpoint needs none.
- The embedding and the head's product are not affected.

Alternatives considered:
- Delayed scaling: a history of maxima that a resumed run would have to restore, and that a schedule
  must not reorder.
- Transformer Engine's own modules: they own weights, gradients and communication.

Sources: Micikevicius et al. 2022 (arXiv:2209.05433);
transformer_engine.pytorch.cpp_extensions.general_gemm.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2train.errors import ConfigError
from k2train.parallel.collective_matmul import Product
from k2train.parallel.grad_accumulation import IN_PLACE

MULTIPLE = 16
"""Divisor of every dimension of a product: the tensor cores' rule for 8-bit factors."""
WORKSPACE_BYTES = 32 * 2**20
CAPABILITY = (8, 9)


class Fp8Product(Product):
    """Products of factors rounded to 8 bits.

    `gemm`, `quantizer` and `types` are Transformer Engine's.
    """

    exact = False

    def __init__(
        self,
        gemm: Callable[..., Any],
        quantizer: Callable[..., Any],
        types: Any,
        device: torch.device,
    ):
        self._gemm = gemm

        # A factor is read by rows in y and (a gradient) in dx, by columns in a weight gradient and
        # (a weight) in dx.
        self._quantizers = {
            (gradient, by_columns): quantizer(
                types.kFloat8E5M2 if gradient else types.kFloat8E4M3, device, columnwise=by_columns
            )
            for gradient in (False, True)
            for by_columns in (False, True)
        }

        takes_workspace = "workspace" in inspect.signature(self._gemm).parameters
        self._workspace = (
            {"workspace": torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)}
            if takes_workspace
            else {}
        )

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        # A weight [out, in] is passed unchanged for dx, transposed for y. The memory is the same.
        transposed = not matrix.is_contiguous()
        weight = matrix.t() if transposed else matrix
        return self._gemm(
            self._quantizers[False, not transposed](weight),
            self._quantizers[gradient, False](a),
            out_dtype=a.dtype,
            layout="TN" if transposed else "NN",
            out=out,
            grad=gradient,
            use_split_accumulator=gradient,
            **self._workspace,
        )[0]

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        self._gemm(
            self._quantizers[False, True](x),
            self._quantizers[True, True](dy),
            out_dtype=into.dtype,
            layout="NT",
            out=into,
            accumulate=True,
            grad=True,
            use_split_accumulator=True,
            **self._workspace,
        )

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        # The head's product is torch's.
        head = super().gradient_sums(device, dtype)
        return head if head == IN_PLACE else f"{IN_PLACE}, those of the head {head}"

    def check(self, name: str, rows: int, columns: int) -> None:
        if rows % MULTIPLE or columns % MULTIPLE:
            raise ConfigError(
                f"kernels.matmul (fp8) needs dimensions divisible by {MULTIPLE}, {name} is {rows} "
                f"x {columns} on a rank; lower parallel.tensor or take torch"
            )


def fp8_product(device: torch.device) -> Fp8Product:
    """Return the products of `kernels.matmul: fp8` on a device.

    Raises ConfigError, naming what is missing, when they are not available.
    """
    needs = "kernels.matmul (fp8) needs"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        have = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise ConfigError(
            f"{needs} a CUDA device of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, "
            f"this is {have}; take torch"
        )

    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
        from transformer_engine_torch import DType
    except ImportError as error:
        raise ConfigError(
            f"{needs} transformer_engine 2.3 or newer (pip "
            f"install 'transformer_engine[pytorch]'): {error}"
        ) from None

    return Fp8Product(general_gemm, Float8CurrentScalingQuantizer, DType, device)
