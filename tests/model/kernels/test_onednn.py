"""oneDNN products: the same numbers, only where requested or known to be faster."""

import pytest
import torch

from k2train.errors import ConfigError
from k2train.model.kernels import onednn as kernels_onednn
from k2train.model.kernels.onednn import OneDnnProduct, available, onednn_product
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.parallel.collective_matmul import Product

CPU = torch.device("cpu")


def test_this_torch_has_it() -> None:
    """Catches tests that pass because nothing was computed by oneDNN."""
    assert available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "m"), [(96, 64, 160), (1, 7, 3), (33, 1, 5), (0, 4, 3), (4, 3, 0)]
)
def test_products_equal_torchs(dtype: torch.dtype, n: int, k: int, m: int) -> None:
    """Catches a transposed factor, a lost `out`, an empty vocabulary, and fp32 rounded to less."""
    torch.manual_seed(0)
    a, weight = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
    ours, close = OneDnnProduct(), {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape
        scale = expected.double().abs().max().item() if expected.numel() else 1.0
        assert (
            (found.double() - expected.double()).abs().max().item() <= close * scale
            if expected.numel()
            else True
        )

    exact = a.double() @ weight.double().t()
    same(ours.multiply(a, weight.t(), gradient=False), exact)
    room = torch.full((n + 2, m), 7.0, dtype=dtype)
    assert ours.multiply(a, weight.t(), gradient=False, out=room[1 : n + 1]).shape == (n, m)
    same(room[1 : n + 1], exact)
    assert (room[0] == 7.0).all() and (room[-1] == 7.0).all()
    same(
        ours.multiply(a @ weight.t(), weight, gradient=True),
        (a @ weight.t()).double() @ weight.double(),
    )
    total = torch.ones(m, k)
    ours.add_weight_gradient(total, a @ weight.t(), a)
    same(total, 1.0 + (a @ weight.t()).double().t() @ a.double())


def test_the_op_itself_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice that is printed and not made."""
    calls = []
    real = kernels_onednn._linear
    monkeypatch.setattr(kernels_onednn, "_linear", lambda x, w: calls.append(x.shape) or real(x, w))
    OneDnnProduct().multiply(torch.ones(4, 3), torch.ones(3, 2), gradient=False)
    OneDnnProduct().add_weight_gradient(torch.zeros(2, 3), torch.ones(4, 2), torch.ones(4, 3))
    assert calls == [(4, 3), (2, 4)]


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent fallback."""
    with pytest.raises(
        ConfigError, match=r"kernels\.matmul \(onednn\) is for a CPU, and this is cuda: choose auto"
    ):
        onednn_product(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(kernels_onednn, "available", lambda: False)
    with pytest.raises(ConfigError, match="needs a torch that was built with oneDNN: choose torch"):
        onednn_product(CPU, torch.float32)
    with pytest.raises(ConfigError, match="is for precision fp32"):
        choose_kernels(matmul="onednn", traits=DeviceTraits(CPU, torch.bfloat16))
    assert Product.exact and OneDnnProduct.exact
