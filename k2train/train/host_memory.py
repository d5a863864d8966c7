"""Host memory: tell glibc's malloc to keep freed memory between steps (CPU training only).

- A step frees its activations, and the next one allocates the same sizes again. By default glibc
  maps large blocks one by one and returns the free top of its heap. The kernel then clears all
  pages again in every step (7 % of a step of 10 million parameters on two cores, before its kernels
  were fused).
- With the settings made here, malloc serves these blocks from its heap and keeps it. The price: a
  process stays as large as it once was.
- With an accelerator host memory is left alone. What is large there is the copy for a checkpoint,
  which should be returned.
- If the user set malloc's own variables, these stay in force.

Alternatives considered:
- Environment variables set by a launcher: they act on every child process, and are missing where a
  run is started by hand.
- Another allocator: one more package to install.
"""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3)."""
NEVER_TRIM = -1
TOP_PAD_BYTES = 64 * 1024**2
"""Smallest growth of the heap: fewer system calls while the first step finds its size."""


def malloc_settings(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the environment variables with which a user configured glibc's malloc."""
    tuned = ["GLIBC_TUNABLES"] if "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") else []
    return sorted(name for name in environment if name.startswith("MALLOC_")) + tuned


def keep_freed_memory(device_type: str) -> str:
    """Make malloc keep freed memory if the process computes on the CPU.

    Returns a few words for the log on what was set.
    """
    if device_type != "cpu":
        return "malloc: default settings"

    found = malloc_settings(os.environ)
    if found:
        return f"malloc: set by {', '.join(found)}"

    # These parameter numbers mean something else to other C libraries.
    if platform.libc_ver()[0] != "glibc":
        return "malloc: default settings (not glibc)"
    return (
        "malloc: freed memory is kept"
        if _set_mallopt()
        else "malloc: default settings (mallopt failed)"
    )


@contextmanager
def startup_objects_frozen() -> Iterator[None]:
    """Take what a start has made out of Python's garbage collection while the context lasts.

    A full collection stops all threads while it looks at every object: 0.1 s for what imports and
    building leave, in the middle of a step, and a save sets it off.

    Objects that a program froze before it forked its runs stay so, and none is added.
    """
    if gc.get_freeze_count():
        yield
        return

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _set_mallopt() -> bool:
    """Use the heap, not mappings; never trim it; grow it in large pieces. True if all worked."""
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
