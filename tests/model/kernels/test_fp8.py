"""fp8 products: the calls to Transformer Engine, checked with stand-ins that do not round."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from k2train.errors import ConfigError
from k2train.model.kernels.fp8 import Fp8Product, fp8_product
from k2train.parallel.grad_accumulation import GradAccumulator, attach
from k2train.parallel.grid import SINGLE
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear


class Types:
    kFloat8E4M3, kFloat8E5M2 = "e4m3", "e5m2"


@dataclass(frozen=True)
class Rounded:
    values: Tensor
    kind: str
    columnwise: bool


def quantizer(kind: str, device: torch.device, *, columnwise: bool = True) -> Any:
    return lambda values: Rounded(values, kind, columnwise)


def gemm_of(calls: list[str], **options: Any) -> Any:
    """general_gemm as documented: A and B by columns, so that TN is B A^T, NN is B A and NT is B^T
    A.
    """

    def gemm(
        a: Rounded,
        b: Rounded,
        out_dtype: torch.dtype | None = None,
        layout: str = "TN",
        out: Tensor | None = None,
        accumulate: bool = False,
        grad: bool = False,
        use_split_accumulator: bool = False,
    ) -> tuple[Tensor, None]:
        # A transposed or a summed-over first dimension is read by columns on devices with one
        # layout only.
        assert a.columnwise == (layout[0] == "N"), "A must be readable as the layout wants it"
        assert b.columnwise == (layout[1] == "T"), "B must be readable as the layout wants it"
        assert a.values.is_contiguous(), "a view that is turned"
        calls.append(f"{layout} {a.kind} {b.kind} {out_dtype} {grad}")
        left = b.values.t() if layout[1] == "T" else b.values
        right = a.values.t() if layout[0] == "T" else a.values
        y = left.to(out_dtype) @ right.to(out_dtype)
        if out is None:
            return y, None
        out.copy_(out + y if accumulate else y)

        return out, None

    def gemm_with_workspace(a: Rounded, b: Rounded, workspace: Tensor, **given: Any) -> Any:
        assert workspace.dtype == torch.uint8
        return gemm(a, b, **given)

    return gemm_with_workspace if options.get("workspace") else gemm


@pytest.mark.parametrize("workspace", (False, True))
def test_layers_multiply_through_it(workspace: bool) -> None:
    """Catches factors in the wrong order or layout, a gradient in the format of values, a sum that
    replaces.
    """
    calls: list[str] = []
    product = Fp8Product(gemm_of(calls, workspace=workspace), quantizer, Types, torch.device("cpu"))
    column = ColumnLinear(16, {"a": 32}, SINGLE["tp"], 1.0, product=product)
    row = RowLinear("b", 32, 16, SINGLE["tp"], 1.0, product=product)
    weights = []

    for layer in (column, row):
        torch.nn.init.normal_(layer.weight)
        attach(layer.weight, GradAccumulator(torch.ones(layer.weight.shape)))
        weights.append(layer.weight.detach().clone().requires_grad_())

    x = torch.randn(4, 2, 16, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    y = row(torch.tanh(column(x)))
    y.square().sum().backward()
    expected = torch.tanh(plain @ weights[0].t()) @ weights[1].t()
    expected.square().sum().backward()
    assert torch.allclose(y, expected, atol=1e-4)
    assert torch.allclose(x.grad, plain.grad, rtol=1e-4, atol=1e-3)
    for layer, weight in zip((column, row), weights, strict=True):
        assert torch.allclose(layer.weight.accumulator.total, weight.grad + 1, rtol=1e-4, atol=1e-3)

    assert calls == [
        *["TN e4m3 e4m3 torch.float32 False"] * 2,
        *["NN e4m3 e5m2 torch.float32 True", "NT e4m3 e5m2 torch.float32 True"] * 2,
    ]


def test_a_dimension_that_does_not_fit_is_refused() -> None:
    """Catches a shape that the tensor cores refuse in the first product, after minutes of
    starting.
    """
    product = Fp8Product(gemm_of([]), quantizer, Types, torch.device("cpu"))
    ColumnLinear(16, {"a": 32, "b": 16}, SINGLE["tp"], 1.0, product=product)
    with pytest.raises(
        ConfigError, match="divisible by 16, a is 24 x 16 on a rank; lower parallel"
    ):
        ColumnLinear(16, {"a": 24}, SINGLE["tp"], 1.0, product=product)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent fall back to other products, and a refusal that does not say what to
    install.
    """
    with pytest.raises(
        ConfigError, match=r"kernels.matmul \(fp8\) needs a CUDA device .* 8.9 or more, this is cpu"
    ):
        fp8_product(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="this is A100"):
        fp8_product(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"needs transformer_engine 2.3 or newer \(pip install"):
        fp8_product(torch.device("cuda", 0))
