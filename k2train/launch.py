"""torchrun that ends with the exit code of its processes: python -m k2train.launch [torchrun options] -m k2train.train ...

torchrun's own exit code is 1, under two screens of traceback, also when all processes stopped on request and saved (75)
or refused a config (2, told already): a batch script could not tell them apart. Everything else is torchrun's.
"""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE

ENDED_BY_TORCHRUN = -15
"""A process that torchrun ended because another one had."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code that its processes agree on, else 1."""
    logging.disable(logging.ERROR)
    try:
        torchrun(list(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
        return verdict(codes)
    except SignalException:
        return EXIT_STOPPED
    return EXIT_DONE


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
