"""State of some steps in a process of its own that compiles every kernel itself, for comparison.

    python -m gpu_checks.compiled_anew DEVICE full|dry

- A start on another machine has no compiled kernels. Compilers measure variants and keep the
  fastest, so two processes may hold different code for the same source.
- The caller gives it empty folders for what compilers keep. The last line is the state's hash.

Alternatives considered:
- Emptying caches within one process: compiled code stays in memory.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.bench import Bench, OutOfTimeError
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.processes import command_of, last_line, run_to_end
from benchmarks.gpu.runner import SCRATCH
from gpu_checks.numerics import DifferentError, small, trace

MODULE = "gpu_checks.compiled_anew"


def root_compiled_anew(bench: Bench) -> str:
    """Hash of the state after the steps of `trace`, with the kernels of `auto`, by a new process.

    Raises DifferentError when that process fails, OutOfTimeError when no time is left for it.
    """
    scratch = bench.folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="anew-", dir=scratch) as name:
        folder = Path(name)
        variables = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        command = command_of(MODULE, [str(bench.device), "dry" if bench.dry else "full"], variables)
        log = bench.folder / "log_compiled_anew.txt"
        code = run_to_end(command, log, max(bench.left_seconds, 1.0))
    if code is None:
        raise OutOfTimeError("another process that compiles anew took too long")
    if code != 0:
        raise DifferentError(f"another process ended with {code}: {last_line(log)}")
    return last_line(log)


def main(arguments: Sequence[str]) -> int:
    """Print the hash of the state."""
    device, size = torch.device(arguments[0]), arguments[1]
    dry = size == "dry"
    if dry:
        torch.set_num_threads(1)
    bench = Bench("determinism", device, dry, time.monotonic() + 600.0, sys.stdout)
    with world_of_one(bench):
        print(trace(device, small(dry), "bf16").root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
