"""Library of fp32 products that `auto` takes: by the processor, and by nothing else."""

from collections.abc import Iterator

import pytest
import torch

from k2train.model.kernels import processor_library, select
from k2train.model.kernels.onednn import OneDnnProduct
from k2train.model.kernels.openblas import OpenBlasProduct, find_openblas
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.model.kernels.upcast import UpcastProduct
from k2train.parallel.collective_matmul import Product

CPU = torch.device("cpu")
ZEN_3, ZEN_4 = "fpu avx avx2 fma", "fpu avx avx2 avx512f avx512_bf16"
PRODUCTS: dict[str, type[Product] | None] = {
    "torch": None,
    "onednn": OneDnnProduct,
    "openblas": OpenBlasProduct,
}


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    fp32_library_of_processor.cache_clear()
    yield
    fp32_library_of_processor.cache_clear()


def is_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str) -> None:
    lines = [f"vendor_id\t: {vendor}", f"flags\t\t: {flags}"] if vendor else ["processor\t: 0"]
    monkeypatch.setattr(processor_library, "_cpu_facts", lambda: lines * 2)


@pytest.mark.parametrize(
    ("vendor", "flags", "chosen"),
    [
        ("AuthenticAMD", ZEN_4, "onednn"),
        ("AuthenticAMD", ZEN_3, "openblas"),
        ("AuthenticAMD", "fpu avx", "torch"),
        ("GenuineIntel", ZEN_3, "torch"),
        ("GenuineIntel", ZEN_4, "torch"),
        ("", "", "torch"),
    ],
)
def test_auto_is_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, chosen: str
) -> None:
    """Catches a choice by anything that changes between two starts, a library where it is slow, and
    a name beside other products."""
    is_processor(monkeypatch, vendor, flags)
    kernels = choose_kernels(traits=DeviceTraits(CPU))
    assert (kernels.matmul, type(kernels.product)) == (chosen, PRODUCTS[chosen] or type(None))
    assert (str(find_openblas()) in str(kernels)) == (chosen == "openblas")
    assert choose_kernels(matmul="torch").product is None
    assert choose_kernels(traits=DeviceTraits(CPU, torch.bfloat16)).matmul == "torch"

    upcast = choose_kernels(traits=DeviceTraits(CPU, torch.bfloat16, emulates_bf16=True))
    assert isinstance(upcast.product, UpcastProduct)
    assert type(upcast.product.wide) is (PRODUCTS[chosen] or Product)
    # Which OpenBLAS it is decides over bits.
    assert (str(find_openblas()) in str(upcast)) == (chosen == "openblas")


def test_without_openblas_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that ends because numpy was built with another library."""
    is_processor(monkeypatch, "AuthenticAMD", ZEN_3)
    for module in (processor_library, select):
        monkeypatch.setattr(module, "find_openblas", lambda: None)
    assert choose_kernels(traits=DeviceTraits(CPU)).matmul == "torch"
