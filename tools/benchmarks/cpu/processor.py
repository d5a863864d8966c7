"""Processor of a benchmark: vendor, family, model, instruction sets, caches; its kind as one name.

- Two records are of one kind of processor if vendor, family, model and instruction limits agree.
  A model name is not enough: clouds call several generations "Intel(R) Xeon(R) Processor".
- Limits of instruction sets (`ONEDNN_MAX_CPU_ISA` and the like) make another kind, because the
  libraries then run other code. It is named emulated: clock, caches and memory stay those it has.
- Read from /proc and /sys. What cannot be read is null, and nothing is guessed.
- Standard library only: the driver imports no torch.

Alternatives considered:
- py-cpuinfo: another dependency, and it starts a process to ask the processor itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INSTRUCTIONS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512F",
    "avx512_bf16": "AVX-512-BF16",
    "avx512_vnni": "AVX-512-VNNI",
    "amx_tile": "AMX-TILE",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "sve2": "SVE2",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
"""Flags of /proc/cpuinfo, of x86 and of ARM, that decide which products a library can run."""
LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Variables with which torch, MKL and oneDNN leave instruction sets out."""
INTEL_FAMILY_6 = {
    85: "Skylake or Cascade Lake",
    106: "Ice Lake",
    143: "Sapphire Rapids",
    207: "Emerald Rapids",
    173: "Granite Rapids",
}
"""Server processors by model, from Linux's arch/x86/include/asm/intel-family.h."""
AMD_GENERATIONS = (
    ("Zen 1", 0x17, ((0x00, 0x2F), (0x50, 0x5F))),
    ("Zen 2", 0x17, ((0x30, 0x4F), (0x60, 0x7F), (0x90, 0x91), (0xA0, 0xAF))),
    ("Zen 3", 0x19, ((0x00, 0x0F), (0x20, 0x5F))),
    ("Zen 4", 0x19, ((0x10, 0x1F), (0x60, 0xAF))),
    ("Zen 5", 0x1A, ((0x00, 0x2F), (0x40, 0x4F), (0x70, 0x7F))),
)
"""(name, family, ranges of models), from Linux's arch/x86/kernel/cpu/amd.c."""
VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "0x41": "ARM"}
NAMES = {
    "vendor": ("vendor_id", "CPU implementer"),
    "family": ("cpu family", "CPU architecture"),
    "model": ("model", "CPU part"),
    "name": ("model name",),
    "cores_a_socket": ("cpu cores",),
    "threads_a_socket": ("siblings",),
}
"""Field of a processor: its lines in /proc/cpuinfo, of x86 and of ARM."""

Processor = Mapping[str, Any]


def processor_facts(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Read what identifies the processor; `root` holds /proc and /sys.

    Keys: those of NAMES, `instructions` (of INSTRUCTIONS, in their order), `caches` (size by level,
    of core 0) and `limits` (variables of LIMITS that are set).
    """
    lines = _first_processor(root)
    facts: dict[str, Any] = {
        name: next((lines[key] for key in keys if lines.get(key)), None)
        for name, keys in NAMES.items()
    }
    flags = set((lines.get("flags") or lines.get("Features") or "").split())

    return facts | {
        "instructions": [text for flag, text in INSTRUCTIONS.items() if flag in flags],
        "caches": _caches(root),
        "limits": {name: environment[name] for name in LIMITS if environment.get(name)},
    }


def kind_of(processor: Processor | None) -> tuple[Any, ...] | None:
    """What two records of one kind of processor have in common; None if that is not known."""
    if not processor or not processor.get("model"):
        return None
    identity = (processor["vendor"], processor["family"], processor["model"])
    return (*identity, *sorted(processor["limits"].items()))


def kind_text(processor: Processor | None) -> str:
    """Name of a kind, as `Intel family 6 model 207 (Emerald Rapids)`; with its limits if any."""
    if not processor or not processor.get("model"):
        return "a processor that is not known by family and model"

    vendor, family, model = (processor[key] for key in ("vendor", "family", "model"))
    generation = _generation(vendor, family, model)
    named = f" ({generation})" if generation else ""
    limits = ", ".join(f"{name}={value}" for name, value in processor["limits"].items())
    emulated = f", emulated: instructions limited by {limits}" if limits else ""
    return f"{VENDORS.get(vendor, vendor)} family {family} model {model}{named}{emulated}"


def details_text(processor: Processor) -> str:
    """Name, instruction sets and caches on one line."""
    has = ", ".join(processor["instructions"]) or "none known"
    caches = ", ".join(f"{level} {size}" for level, size in processor["caches"].items())
    name = processor.get("name") or "without a model name"
    return f"{name}; has {has}; caches of a core: {caches or 'not known'}"


def _first_processor(root: Path) -> dict[str, str]:
    """Lines of the first processor; those that stand once for all (ARM, old kernels) included."""
    try:
        text = (root / "proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return {}

    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _caches(root: Path) -> dict[str, str]:
    found = {}
    for index in range(8):
        folder = root / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        # L1d and L1i; the larger ones hold both.
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{letter}"] = size
    return found


def _generation(vendor: str, family: str, model: str) -> str | None:
    try:
        numbers = int(family), int(model)
    except ValueError:
        return None

    if vendor == "GenuineIntel":
        return INTEL_FAMILY_6.get(numbers[1]) if numbers[0] == 6 else None
    if vendor != "AuthenticAMD":
        return None
    return next(
        (
            name
            for name, of_family, ranges in AMD_GENERATIONS
            if of_family == numbers[0] and any(low <= numbers[1] <= high for low, high in ranges)
        ),
        None,
    )
