"""Command line of tools that draw text from a checkpoint: options, layout, one line for a mistake.

- `tools/generate.py` and `tools/chat.py` take the same options for drawing, precision and layout.
- Every rank finds the same mistake. Rank 0 says it, before the launcher ends the others.
- Nothing here imports torch.
"""

import argparse
import sys
import time
from collections.abc import Callable

from k2train.command_line import Parser, positive
from k2train.errors import ConfigError, UnavailableError, UserError
from k2train.inference.options import Sampling
from k2train.launch.environment import Launch

OTHER_RANKS_DELAY_SECONDS = 5.0
"""Other ranks report a mistake this late, so that the launcher can end them first."""


def add_options(parser: Parser, max_tokens: int, item: str) -> None:
    """Add the options of drawing, precision and layout; `item` is what `--json` describes."""
    parser.add_argument(
        "--max-tokens", type=positive, default=max_tokens, help=f"longest answer ({max_tokens})"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest P")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--fp32", action="store_true", help="the fp32 master weights")
    parser.add_argument("--json", action="store_true", help=f"an object for each {item}")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel processes")
    parser.add_argument("--pipeline", type=positive, default=1, help="pipeline-parallel processes")


def check_ranks(options: argparse.Namespace, launch: Launch) -> None:
    """Raise ConfigError when the layout asked for is not that of the processes."""
    ranks = options.tensor * options.pipeline
    if launch.world_size != ranks:
        raise ConfigError(
            f"--tensor ({options.tensor}) x --pipeline ({options.pipeline}) = {ranks} processes, "
            f"and {launch.world_size} were started: torchrun --nproc-per-node {ranks}"
        )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return how tokens are drawn. Raises ConfigError for values outside of their range."""
    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


def with_one_voice(run: Callable[[], int], launch: Launch) -> int:
    """Run a command on this rank; of a mistake that all ranks find, rank 0 speaks first."""
    try:
        return run()
    except (UserError, UnavailableError):
        # Rank 0 finds the same mistake and says it; the launcher then ends the others.
        time.sleep(OTHER_RANKS_DELAY_SECONDS if launch.rank else 0)
        raise


def note(launch: Launch) -> Callable[[str], None]:
    """Return what shows a line on stderr, on rank 0 alone."""

    def say(text: str) -> None:
        if launch.rank == 0:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    return say
