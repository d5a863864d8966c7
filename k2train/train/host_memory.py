"""Memory that stays with the process: glibc's malloc asked not to give it back after every step.

A step frees its activations and the next one asks for the same sizes again. By default glibc maps large blocks one by one
and gives the top of its heap back when it is free, so every step has all its pages cleared by the kernel again (7 % of a
step of 10 million parameters on two cores, before its kernels were fused). Asked once, at the start of a process that computes on the CPU, it serves them from its heap
and keeps that. The price is that the process stays as large as it once was. Where an accelerator computes, host memory is
left alone: what is large there is the copy for a checkpoint, which should go back.

Refused: environment variables set by a launcher (they act on every child process, and not where a run is started by hand)
and another allocator (a package to install). A user who set malloc's own variables has decided already, and keeps that.
"""

import ctypes
import os
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3)."""
NEVER_TRIM = -1
TOP_PAD_BYTES = 64 * 1024**2
"""By how much the heap grows at the least: fewer calls while the first step finds its size."""


def malloc_settings(environment: Mapping[str, str]) -> list[str]:
    """The variables by which a user set glibc's malloc, by name."""
    tuned = ["GLIBC_TUNABLES"] if "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") else []
    return sorted(name for name in environment if name.startswith("MALLOC_")) + tuned


def keep_freed_memory(device_type: str) -> str:
    """Tell malloc to keep what the process frees, if it computes on the CPU; says in a few words what was done."""
    if device_type != "cpu":
        return "malloc: default settings"
    found = malloc_settings(os.environ)
    if found:
        return f"malloc: set by {', '.join(found)}"
    if platform.libc_ver()[0] != "glibc":
        return "malloc: default settings (not glibc)"
    return (
        "malloc: freed memory is kept"
        if _set_mallopt()
        else "malloc: default settings (mallopt failed)"
    )


def _set_mallopt() -> bool:
    """Whether glibc took all three: heap instead of mappings, never trimmed, grown in large pieces."""
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
