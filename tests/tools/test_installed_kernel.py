"""Check of an installed kernel: wrong kernels that pass, right ones that do not, what is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_checks import installed_kernel
from gpu_checks.installed_kernel import check, errors_of_attention, main, usable_packages
from k2train.errors import ConfigError, RunError
from k2train.model.kernels.attention import sdpa_attention
from k2train.model.kernels.elementwise import torch_norm
from k2train.model.kernels.optional import INSTALL

CPU = torch.device("cpu")
Kernel = Callable[..., Tensor]


def offer(monkeypatch: pytest.MonkeyPatch, attention: Kernel, norm: Kernel = torch_norm) -> None:
    """Put kernels in the place of a package's."""
    name = "transformer_engine"
    monkeypatch.setitem(installed_kernel.OPTIONAL_ATTENTION, name, lambda ordered, block: attention)
    monkeypatch.setitem(installed_kernel.OPTIONAL_NORM, name, lambda: norm)


def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own kernels, in bf16 as a package's."""
    offer(monkeypatch, sdpa_attention)
    lines = list(check("transformer_engine", CPU))
    assert [line.split(":")[1].split()[0] for line in lines] == ["attention", "norm"]


def without_causality(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def with_another_scale(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return sdpa_attention(q * 1.2, k, v)


def with_heads_mixed_up(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return sdpa_attention(q, k.flip(1), v.flip(1))


def without_a_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return sdpa_attention(q, k.detach() + 0 * k, v)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return sdpa_attention(q, k, v) * float("nan")


@pytest.mark.parametrize(
    "kernel",
    [
        without_causality,
        with_another_scale,
        with_heads_mixed_up,
        without_a_gradient,
        not_a_number,
    ],
)
def test_wrong_attention_is_found(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, kernel)
    with pytest.raises(RunError, match="transformer_engine: attention is wrong: the "):
        list(check("transformer_engine", CPU))


def test_a_wrong_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, sdpa_attention, lambda x, weight, eps: torch_norm(x, weight.abs(), 0.1))
    with pytest.raises(RunError, match="norm is wrong"):
        list(check("transformer_engine", CPU))


def test_the_reference_is_not_torchs_kernel() -> None:
    """Catches a comparison of a kernel with itself: the errors of bf16 are small, and not zero."""
    errors = errors_of_attention(sdpa_attention, CPU)
    assert set(errors) == {"output", "gradient of q", "gradient of k", "gradient of v"}
    assert all(1e-4 < error < 1e-2 for error in errors.values()), errors


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="needs the package apex"):
        list(check("apex", CPU))


def test_packages_of_a_device() -> None:
    assert usable_packages(9) == list(INSTALL)
    assert "flash_attn_3" not in usable_packages(10) and "flash_attn_4" in usable_packages(10)
    assert "flash_attn_2" not in usable_packages(7)
    assert set(installed_kernel.GENERATIONS) == set(INSTALL)


def test_without_a_device_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert main(["apex"]) == 2
    assert capsys.readouterr().err == "this torch sees no CUDA device\n"
