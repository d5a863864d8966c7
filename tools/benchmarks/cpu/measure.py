"""Memory of one process: resident peak from the kernel, and bytes allocated by a step from torch.

- CPU torch has no peak counter, but its profiler sees every allocation and release. Their running
  sum over one step has the peak that activations, temporaries and new gradients cause.

Alternatives considered:
- The growth of resident memory: malloc's caching hides it.
"""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_resident_bytes() -> int:
    """Peak resident memory of this process (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_step_bytes(step: Callable[[], object]) -> int:
    """Peak bytes that one step allocates above what it started with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
