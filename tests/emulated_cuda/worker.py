"""A worker of the pool, under emulated CUDA."""

from collections.abc import Sequence

from tests.emulated_cuda import mode
from tests.support import gloo_pool


def serve(arguments: Sequence[str]) -> int:
    """Emulate in this process, then take jobs."""
    mode.install()
    return gloo_pool.serve(arguments)
