"""Held-out loss of checkpoints: the sets that the run scores, with the weights of a checkpoint.

    python tools/score.py CKPT [CKPT ...]                        the held-out sets of its run
    python tools/score.py CKPT [CKPT ...] --manifest MANIFEST    of data that moved, or other data
    python tools/score.py CKPT [CKPT ...] --json                 a line of JSON for each set

- For what a run did not score itself: merged checkpoints, saves inside chunks, other text.
- Kernels and precision are those of the run, on one process; it takes the memory of a training.
- Of a data folder that holds nothing out, all chunks are scored.

Exit codes: 0 done; 2 a mistake, or a checkpoint or data that are not whole. One line.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command

from k2train.checkpoint.manifest import MANIFEST, read_manifest
from k2train.errors import EXIT_DONE, CheckpointError, RunError
from k2train.launch.environment import read_launch
from k2train.launch.environment_defaults import set_environment_defaults
from k2train.retry import is_file_retried
from k2train.text import counted


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="score.py", description="Held-out loss of checkpoints.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT")
    parser.add_argument("--manifest", type=Path, metavar="MANIFEST", help="manifest of the data")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each set")
    given = parser.parse_args(arguments)

    launch = read_launch()
    if launch.world_size != 1:
        raise RunError(f"a score takes one process, {launch.world_size} were started")
    for path in given.checkpoints:
        if not is_file_retried(path / MANIFEST):
            raise CheckpointError(
                f"{path} is no checkpoint (no {MANIFEST}); give RUN/checkpoints/ckpt_NNN"
            )
        read_manifest(path)

    # Before torch, which reads them once.
    set_environment_defaults(1, deterministic=True)
    scoring = importlib.import_module("k2train.replay.score")
    starts = [
        scoring.begin_score(path, read_manifest(path), given.manifest) for path in given.checkpoints
    ]
    for path, start in zip(given.checkpoints, starts, strict=True):
        for found in scoring.score(launch, path, start):
            print(_line(path, found, given.json), flush=True)
    return EXIT_DONE


def _line(path: Path, found: Any, as_json: bool) -> str:
    if as_json:
        return json.dumps({"checkpoint": str(path), **found.model_dump(mode="json")})
    parts = ", ".join(f"{part.name} {part.loss:.4f}" for part in found.subsets)
    by_subset = f"; by subset: {parts}" if len(found.subsets) > 1 else ""
    return f"{path}: {found.name} {found.loss:.6f} over {counted(found.rows, 'row')}{by_subset}"


if __name__ == "__main__":
    sys.exit(main())
