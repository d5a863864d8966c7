"""Memory of one process: peak of the bytes that a step allocates, from torch.

- CPU torch has no peak counter, but its profiler sees every allocation and release. Their running
  sum over one step has the peak that activations, temporaries and new gradients cause.

Alternatives considered:
- The growth of resident memory: malloc's caching hides it.
"""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


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
