"""Strict mode: on a GPU torch computes deterministically or refuses, while an engine computes.

- `kernels.deterministic` chooses kernels that can repeat to the bit. Some of torch's do so only in
  this mode: flash and memory-efficient attention, sums and copies by index.
- An operation without a deterministic form raises. `tests/train/test_strict_mode.py` compares the
  operations of a step with torch's own list of them.
- The mode is on during a step or a forward pass of an engine, and then what it was before. Peers in
  the same process keep theirs.
- On a CPU it stays off: kernels there add in a fixed order anyway.

Alternatives considered:
- Once for the process: benches compare engines of both kinds with other libraries in one process.
- `torch.backends.cudnn.deterministic`: it covers convolutions, not attention.

Source: PyTorch, notes on reproducibility, and `torch.use_deterministic_algorithms`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from k2train.launch.environment_defaults import require_deterministic_environment


def prepare_strict_mode(device: torch.device, deterministic: bool, world_size: int) -> bool:
    """Return whether engines compute in strict mode on a device, and make sure that it can work.

    Must be called before the first product. Raises ConfigError where a variable of the user's
    forbids it.
    """
    strict = deterministic and device.type == "cuda"
    if strict:
        require_deterministic_environment(world_size)
    return strict


@contextmanager
def strict_mode(wanted: bool) -> Iterator[None]:
    """Compute in torch's strict mode inside this context, if `wanted`; else as the process does.

    Memory that is allocated stays unfilled: filling costs a kernel for every tensor, and every
    value that is read here was written before.
    """
    if not wanted:
        yield
        return

    fill = torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill
