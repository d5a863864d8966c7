"""Spikes of a run: what happened, on which data, with which text, in which layers, and why.

    python tools/spike.py RUN                      a line for each spike with a bundle
    python tools/spike.py RUN 1                    its report: loss by sequence, text, tensors
    python tools/spike.py RUN 1 --bisect           its batch again with an older state
    python tools/spike.py RUN 1 --bisect --data DATA    if the data has moved

- Reads the bundle that the run has left in `RUN/spikes/spike_001`.
- `--bisect` loads a checkpoint of at least 20 steps before the onset on one process, whatever
  layout the run had. Still bad: the data alone. Good: the data with the state of then. It needs
  memory for the whole model on a CPU, and the time of nine steps.

Exit codes: 0 done; 2 there is no such spike, or no checkpoint before it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, RunError
from k2train.train.bundle_read import bundles_of, find_bundle, report, summary

PART = Path(__file__).parent / "spike_parts" / "batch_again.py"


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="spike.py", description="Show the spikes of a run, and what caused them.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("event", nargs="?", metavar="EVENT", help="a spike by number or folder")
    parser.add_argument("--bisect", action="store_true", help="its batch with an older state")
    parser.add_argument("--data", type=Path, metavar="DATA", help="the data, if it has moved")
    parser.add_argument("--json", action="store_true", help="the answer as one JSON object")
    given = parser.parse_args(arguments)
    if given.bisect and given.event is None:
        parser.error("--bisect needs an EVENT")
    if not given.run.is_dir():
        raise RunError(f"{given.run} is not a directory; give that of a run")

    if given.event is None:
        bundles = bundles_of(given.run)
        print("\n".join(map(summary, bundles)) or "no spike has left a bundle")
        return EXIT_DONE

    bundle = find_bundle(given.run, given.event)
    if given.bisect:
        return _bisect(given)
    print(json.dumps(bundle.event, ensure_ascii=False) if given.json else "\n".join(report(bundle)))
    return EXIT_DONE


def _bisect(given: argparse.Namespace) -> int:
    """Run the part that needs torch, which takes seconds to load, in a process of its own."""
    options = [*(["--json"] if given.json else [])]
    options += ["--data", str(given.data)] if given.data else []
    part = [sys.executable, str(PART), str(given.run), given.event, *options]
    return subprocess.run(part, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
