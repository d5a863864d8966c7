"""Peaks of devices: by name and precision, and never a guess."""

import pytest

from k2train.plan.device_peak import PEAK_FLOPS, peak_flops, peak_precision


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H800", 989.4e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A30", 165e12),
        ("NVIDIA B100", 1750e12),
        ("NVIDIA B300", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", 147.1e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("Quadro RTX 6000", None),
        ("AMD Instinct MI325X", 1307.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
        ("NVIDIA Brand New 9000", None),
        ("Intel(R) Xeon(R) Platinum 8480C", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_of_a_device_by_its_name(name: str, peak: float | None) -> None:
    """Catches a guess for an unknown part (563% utilisation), a sparse peak, and H20 taken for
    H200.
    """
    assert peak_flops(name) == peak


def test_every_peak_can_be_reached_and_has_a_source() -> None:
    """Catches an entry hidden behind a more general one above it, and a slip of three zeros."""
    for peak in PEAK_FLOPS:
        for precision in ("bf16", "fp8", "fp32"):
            assert peak_flops(" ".join(peak.words), precision) == getattr(peak, precision)
        assert peak.source and 50e12 < peak.bf16 < 5e15
        # fp8 units are twice as fast, plain fp32 ones slower, wherever there are any.
        assert peak.fp8 is None or peak.fp8 == pytest.approx(2 * peak.bf16, rel=0.02)
        assert peak.fp32 is None or 5e12 < peak.fp32 < peak.bf16


@pytest.mark.parametrize(
    ("precision", "matmul", "peak", "name"),
    (
        ("bf16", "auto", 989.4e12, "bf16"),
        ("bf16", "torch", 989.4e12, "bf16"),
        ("bf16", "fp8", 1978.9e12, "fp8"),
        ("fp32", "auto", 66.9e12, "fp32"),
    ),
)
def test_the_peak_is_that_of_the_products(
    precision: str, matmul: str, peak: float, name: str
) -> None:
    """Catches fp8 against the bf16 peak, which then exceeds 1, and fp32 that looks 15 times worse
    than it is.
    """
    assert peak_precision(precision, matmul) == name
    assert peak_flops("NVIDIA H100 80GB HBM3", peak_precision(precision, matmul)) == peak
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
