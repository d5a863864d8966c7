"""torchrun's end of a failed start: a look at the processes before it signals those that are left.

- Who ended first is the cause (`status.first_end`). A process that was killed writes no time.
- torchrun sees the dead process itself and signals the others at once. On a busy machine they may
  have ended before the supervisor looks.

Alternatives considered:
- pidfd_open on every process: the supervisor's thread may still come too late.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import PContext


@contextmanager
def looking_before_others_end(look: Callable[[], object]) -> Iterator[None]:
    """Call `look` whenever torchrun is about to end the rest of a failed start."""
    close = PContext.close

    def look_and_close(context: PContext, *given: Any, **named: Any) -> None:
        look()
        close(context, *given, **named)

    PContext.close = look_and_close
    try:
        yield
    finally:
        PContext.close = close
