"""Peak FLOP/s of devices by driver name and precision, from the vendors' data sheets.

- Utilisation is measured against the peak of the precision that a run computes in, and is not
  reported where that is not known.
- Dense numbers: data sheets print twice as much "with sparsity". Products that add in fp32, as
  training does: of GeForce cards half of what is printed for fp16.
- fp32 is that of the plain units, since TF32 is not used.

Alternatives considered:
- The bf16 peak for everything: fp8 then exceeds 1, and fp32 looks fifteen times worse than it is.
- A guess for an unknown device: 563 % utilisation was once reported.
"""

import re
from typing import Literal, NamedTuple

PeakPrecision = Literal["bf16", "fp8", "fp32"]


class DevicePeak(NamedTuple):
    """Dense peaks of a device, in FLOP/s; None where it has no such unit, or the sheet no number.

    `words` must all be in the device's name.
    """

    words: tuple[str, ...]
    bf16: float
    source: str
    fp8: float | None = None
    fp32: float | None = None


# The first match counts, so special parts precede general ones.
PEAK_FLOPS: tuple[DevicePeak, ...] = (
    DevicePeak(("A100",), 312e12, "NVIDIA A100 data sheet, BFLOAT16 Tensor Core", None, 19.5e12),
    DevicePeak(("A800",), 312e12, "NVIDIA A800 data sheet, as A100", None, 19.5e12),
    DevicePeak(("A30",), 165e12, "NVIDIA A30 data sheet: 330 with sparsity", None, 10.3e12),
    DevicePeak(
        ("H100", "PCIE"),
        756e12,
        "NVIDIA H100 data sheet, PCIe: 1,513 with sparsity",
        1513e12,
        51e12,
    ),
    DevicePeak(
        ("H100", "NVL"),
        835.5e12,
        "NVIDIA H100 NVL data sheet: 1,671 with sparsity",
        1670.5e12,
        60e12,
    ),
    DevicePeak(("H100",), 989.4e12, "NVIDIA H100 architecture paper, SXM5", 1978.9e12, 66.9e12),
    DevicePeak(
        ("H800", "PCIE"),
        756e12,
        "NVIDIA H800 data sheet, PCIe, as H100: 1,513 with sparsity",
        1513e12,
        51e12,
    ),
    DevicePeak(("H800",), 989.4e12, "NVIDIA H800 data sheet, SXM, as H100", 1978.9e12, 66.9e12),
    DevicePeak(
        ("H200", "NVL"),
        835.5e12,
        "NVIDIA H200 data sheet, NVL: 1,671 with sparsity",
        1670.5e12,
        60e12,
    ),
    DevicePeak(
        ("H200",), 989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity", 1979e12, 67e12
    ),
    DevicePeak(
        ("GH200",), 989.4e12, "NVIDIA GH200 data sheet: 1,979 with sparsity", 1979e12, 67e12
    ),
    DevicePeak(("H20",), 148e12, "NVIDIA H20 data sheet", 296e12, 44e12),
    DevicePeak(
        ("GB300",),
        2500e12,
        "NVIDIA GB300 NVL72 data sheet: 5,000 with sparsity a GPU",
        5000e12,
        80e12,
    ),
    DevicePeak(
        ("GB200",),
        2500e12,
        "NVIDIA GB200 NVL72 data sheet: 5,000 with sparsity a GPU",
        5000e12,
        80e12,
    ),
    DevicePeak(
        ("B300",), 2250e12, "NVIDIA HGX B300 data sheet: 4,500 with sparsity a GPU", 4500e12, 75e12
    ),
    DevicePeak(
        ("B200",), 2250e12, "NVIDIA HGX B200 data sheet: 4,500 with sparsity a GPU", 4500e12, 75e12
    ),
    DevicePeak(
        ("B100",), 1750e12, "NVIDIA HGX B100 data sheet: 3,500 with sparsity a GPU", 3500e12, 60e12
    ),
    DevicePeak(("L40S",), 362.05e12, "NVIDIA L40S data sheet", 733e12, 91.6e12),
    DevicePeak(("L40",), 181.05e12, "NVIDIA L40 data sheet: 362.1 with sparsity", 362e12, 90.5e12),
    DevicePeak(("A40",), 149.7e12, "NVIDIA A40 data sheet", None, 37.4e12),
    DevicePeak(("L4",), 121e12, "NVIDIA L4 data sheet: 242 with sparsity", 242.5e12, 30.3e12),
    DevicePeak(("A10G",), 70e12, "NVIDIA A10G data sheet: 140 with sparsity", None, 35e12),
    DevicePeak(("A10",), 125e12, "NVIDIA A10 data sheet", None, 31.2e12),
    DevicePeak(
        ("RTX", "5090"),
        209.5e12,
        "NVIDIA RTX Blackwell architecture paper, BF16 with FP32 accumulate",
        419e12,
        104.8e12,
    ),
    DevicePeak(
        ("RTX", "4090", "D"),
        147.1e12,
        "NVIDIA Ada architecture paper, rate of a 4090 at its 14,592 cores",
        294.2e12,
        73.5e12,
    ),
    DevicePeak(
        ("RTX", "4090"),
        165.2e12,
        "NVIDIA Ada architecture paper, BF16 with FP32 accumulate",
        330.3e12,
        82.6e12,
    ),
    DevicePeak(
        ("RTX", "6000", "ADA"),
        364.2e12,
        "NVIDIA Ada architecture paper for professional cards",
        728.5e12,
        91.1e12,
    ),
    DevicePeak(
        ("RTX", "3090", "TI"),
        80e12,
        "NVIDIA GA102 architecture paper, rate of a 3090 at its cores and clock",
        None,
        40e12,
    ),
    DevicePeak(
        ("RTX", "3090"),
        71e12,
        "NVIDIA GA102 architecture paper, BF16 with FP32 accumulate",
        None,
        35.6e12,
    ),
    DevicePeak(
        ("RTX", "A6000"), 154.8e12, "NVIDIA GA102 architecture paper, RTX A6000", None, 38.7e12
    ),
    DevicePeak(
        ("MI250X",),
        191.5e12,
        "AMD Instinct MI250X data sheet: 383 for the two dies, of which each is a device",
    ),
    DevicePeak(("MI325X",), 1307.4e12, "AMD Instinct MI325X data sheet", 2614.9e12),
    DevicePeak(("MI300X",), 1307.4e12, "AMD Instinct MI300X data sheet", 2614.9e12),
)
SLOWER = {"MIG", "LAPTOP", "MAX"}
"""Words of parts that share the name of a faster one: slices, and mobile chips (Max-Q)."""


def peak_flops(device_name: str, precision: PeakPrecision = "bf16") -> float | None:
    """Dense peak of a device at a precision, in FLOP/s, by its driver name; None when unknown.

    Unknown devices, CPUs and MIG slices give None, never a guess: utilisation is then not reported.
    Names match word by word, so that an A10 is no A100 and an H20 no H200.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & SLOWER:
        return None
    found = next((peak for peak in PEAK_FLOPS if words.issuperset(peak.words)), None)
    if found is None:
        return None
    rate: float | None = getattr(found, precision)
    return rate


def peak_precision(precision: str, matmul: str) -> PeakPrecision:
    """Return the precision whose peak a run is measured against: that of its layers' products."""
    if matmul == "fp8":
        return "fp8"
    return "fp32" if precision == "fp32" else "bf16"
