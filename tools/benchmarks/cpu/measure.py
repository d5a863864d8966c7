"""What one process uses: resident memory as the kernel counts it, and the bytes a step allocates as torch counts them.

CPU torch keeps no peak counter, but its profiler sees every allocation and release: their running sum over one step, from
what stands between two steps, has the peak that activations, temporaries and gradients made anew cause. The alternative
refused is the growth of resident memory, which malloc's own caching hides.
"""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_resident_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_step_bytes(step: Callable[[], object]) -> int:
    """The most bytes one step holds at a time beyond those it began with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
