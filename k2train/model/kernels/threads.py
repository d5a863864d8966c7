"""Number of torch's threads on a CPU, for a part of a program.

- Bits, and the speed of small models, depend on it: `run.exact` and text from a small model take
  one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute with one thread inside this context, if `wanted`; else as the process does."""
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return

    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
