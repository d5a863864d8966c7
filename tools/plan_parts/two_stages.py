"""The part of tools/plan.py that reads chunks: two stages on one page, before they are paid for.

    python tools/plan_parts/two_stages.py STAGE1.yaml STAGE2.yaml --cluster NAME --gpus N

Exit codes: 0 all of it holds; 1 something does not; 2 an error in usage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command_line import Parser, command, positive

from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.planner.before_you_burn import before_you_burn


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="plan --before-you-burn", description="Check two stages together.")
    parser.add_argument("stages", nargs=2, metavar="STAGE.yaml")
    parser.add_argument("--cluster", required=True, metavar="NAME")
    parser.add_argument("--gpus", required=True, type=positive, metavar="N")
    given = parser.parse_args(arguments)
    holds, lines = before_you_burn(given.stages, given.cluster, given.gpus)
    print("\n".join(lines))
    return EXIT_DONE if holds else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
