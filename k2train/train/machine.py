"""What this machine is: bf16 instructions of the CPU, an accelerator's device file, free memory.

- Read from /proc, /sys and /dev: needs no torch, so `--explain` and the plan tool know it, too.
- What cannot be read is unknown, and then nothing is said or refused.
- Free memory is the least of what the system has available, what the cgroups of this process still
  allow, and its own limit of address space (`ulimit -v`).

Alternatives considered:
- Trying to allocate: the kernel promises memory that it does not have.
- The limit of the cgroup alone: others in it have used a part.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx10", "bf16"})
"""Names of bf16 arithmetic in /proc/cpuinfo, of x86 and of ARM."""
ACCELERATORS = ("nvidiactl", "kfd", "dxg", "accel/accel0")
"""Device files of GPUs: NVIDIA's driver, AMD's, and the one of Windows' Linux."""


class FreeMemory(NamedTuple):
    """Bytes that a process may still use, and what limits them."""

    free_bytes: int
    total_bytes: int
    """All that there is, whoever uses it now."""
    limit: str
    shared: bool
    """Whether all processes of the machine or the job share them."""


def cpu_has_bf16(path: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Return whether the CPU multiplies bf16 numbers; None where that is unknown."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return bool(BF16_FLAGS & set(value.split()))
    return None


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Return whether a GPU's driver shows itself; a process may still not be allowed to use it."""
    return any(os.access(devices / name, os.F_OK) for name in ACCELERATORS)


def free_memory(root: Path = Path("/")) -> list[FreeMemory]:
    """Return each limit of host memory that can be read. `root` holds /proc and /sys."""
    found = [_available(root), *_cgroups(root), _address_space(root)]
    return [one for one in found if one is not None]


def _available(root: Path) -> FreeMemory | None:
    try:
        lines = (root / "proc/meminfo").read_text("utf-8").splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        # Swap is memory, too, if slow.
        free = int(fields["MemAvailable"][0]) + int(fields.get("SwapFree", ["0"])[0])
        total = int(fields["MemTotal"][0]) + int(fields.get("SwapTotal", ["0"])[0])
    except (OSError, KeyError, ValueError, IndexError):
        return None
    where = "available on this machine (MemAvailable)"
    return FreeMemory(free * 1024, total * 1024, where, True)


def _cgroups(root: Path) -> Iterator[FreeMemory]:
    """Yield the memory limits of this process's cgroup and those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        caches: tuple[str, ...]
        if not controllers:
            base = root / "sys/fs/cgroup"
            names, caches = ("memory.max", "memory.current"), ("file", "slab_reclaimable")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names, caches = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("total_cache",)
        else:
            continue
        folder = base / path.lstrip("/")
        for one in (folder, *folder.parents):
            free = _free_in_group(one, *names, caches)
            if free is not None:
                yield FreeMemory(*free, "left in this job's cgroup", True)
            if one == base:
                break


def _free_in_group(
    folder: Path, limit: str, usage: str, caches: Sequence[str]
) -> tuple[int, int] | None:
    """Return what a cgroup may still take, and its limit; what the kernel can drop is free."""
    try:
        text = (folder / limit).read_text("utf-8").strip()
        used = int((folder / usage).read_text("utf-8"))
        facts = dict(
            line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines()
        )
        most = int(text)
    except (OSError, ValueError):
        return None
    # The first version writes a number near 2**63 for "no limit".
    free = max(0, most - used + sum(int(facts.get(cache, 0)) for cache in caches))
    return None if most > 2**60 else (min(free, most), most)


def _address_space(root: Path) -> FreeMemory | None:
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        pages = int((root / "proc/self/statm").read_text("utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    free = max(0, most - pages * os.sysconf("SC_PAGE_SIZE"))
    return FreeMemory(free, most, "left of this process's address space (ulimit -v)", False)
