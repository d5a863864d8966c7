"""Library of a CPU's fp32 matrix products by its processor: what `kernels.matmul: auto` means.

- Intel: torch, which multiplies by MKL.
- Others with AVX-512 (AMD since Zen 4): oneDNN. MKL uses AVX-512 on Intel's processors only: on
  Zen 4, one thread, 1024 x 256 by 256 x 768, it takes 5.2 ms and oneDNN 2.0 to 2.7.
- Others with AVX2 alone (AMD Zen 3): OpenBLAS, where numpy has it, else torch. On Zen 3 a step of
  two threads had 1.18 of the speed of a hand-written reference by OpenBLAS, 1.09 by MKL and 1.02 by
  oneDNN; with one thread 1.09, 1.03 and 1.04 (`docs/kernels.md`). Products alone, again and
  again, show none of that: there MKL is as fast as OpenBLAS.
- Older and unknown processors: torch.

Alternatives considered:
- A measurement: two fresh runs of one config could differ in their bits. `measured` does that, and
  keeps to its record.
"""

from functools import cache
from pathlib import Path

from k2train.model.kernels.onednn import available as has_onednn
from k2train.model.kernels.openblas import find_openblas


@cache
def fp32_library_of_processor() -> str:
    """Return the library that `auto` means for fp32 here: `torch`, `onednn` or `openblas`."""
    try:
        facts = _cpu_facts()
    except OSError:
        return "torch"
    vendors, flags = (_values(facts, key) for key in ("vendor_id", "flags"))
    # Other architectures have no vendor_id: unknown.
    if not vendors or "GenuineIntel" in vendors:
        return "torch"
    if "avx2" in flags and "avx512f" not in flags:
        return "openblas" if find_openblas() is not None else "torch"
    return "onednn" if "avx512f" in flags and has_onednn() else "torch"


def _values(facts: list[str], key: str) -> set[str]:
    """Return the words that any processor has under a key."""
    lines = (line.partition(":") for line in facts)
    return {word for name, _, text in lines if name.strip() == key for word in text.split()}


def _cpu_facts() -> list[str]:
    return Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
