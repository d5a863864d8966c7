"""torchrun that ends with the exit code of its processes: python -m k2train.launch [torchrun options] -m k2train.train ...

torchrun's own exit code is 1, under two screens of traceback, also when all processes stopped on request and saved (75)
or refused a config (2, told already): a batch script could not tell them apart. Where there are CUDA devices, processes get
CUDA_DEVICE_MAX_CONNECTIONS=1 (see `environment.order_kernels`). Everything else is torchrun's.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE
from k2train.parallel.environment import offer_verdicts, order_kernels, read_verdicts

ENDED_BY_TORCHRUN = -15
"""A process that torchrun ended because another one had."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code that its processes agree on, else 1."""
    logging.disable(logging.ERROR)
    with TemporaryDirectory(prefix="k2train-launch-") as folder:
        offer_verdicts(Path(folder))
        if torch.cuda.is_available():
            order_kernels()
        try:
            torchrun(list(sys.argv[1:] if arguments is None else arguments))
        except ChildFailedError as failed:
            return verdict({rank: failure.exitcode for rank, failure in sorted(failed.failures.items())})
        except SignalException:
            return signalled(read_verdicts(Path(folder)))
    return EXIT_DONE


def signalled(codes: dict[int, int | None]) -> int:
    """The exit code after torchrun was asked to stop: 75 only if every process that started has saved, or was done."""
    unsaved = [rank for rank, code in codes.items() if code not in (EXIT_STOPPED, EXIT_DONE)]
    if codes and not unsaved:
        return EXIT_STOPPED if EXIT_STOPPED in codes.values() else EXIT_DONE
    who = f"process {unsaved[0]} of {len(codes)}" if unsaved else "every process"
    print(f"asked to stop, and {who} ended before it had saved", file=sys.stderr)
    return EXIT_FAILED


def verdict(codes: dict[int, int]) -> int:
    """The exit code of a job from those of its failed processes; says on stderr what is not a clean one."""
    own = {rank: code for rank, code in codes.items() if code != ENDED_BY_TORCHRUN} or codes
    if set(own.values()) <= {EXIT_USAGE, EXIT_STOPPED}:
        # A mistake outweighs a stop: starting again would not help.
        return min(own.values())
    for rank, code in own.items():
        if code not in (EXIT_USAGE, EXIT_STOPPED):
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            print(f"process {rank} ended with {how}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
