"""Make a checkpoint again from the one before it and its data, and compare it with the record.

    python tools/replay.py RUN --chunk N [--data MANIFEST]
    python tools/replay.py RUN --steps A:B
    python tools/replay.py RUN --resume-drill N
    python tools/replay.py RUN --probe K [--seed S]
    python tools/replay.py RUN --spot step|micro-batch|layer --chunk N [--layer L]
    python -m k2train.launch --nproc-per-node 8 tools/replay.py RUN --chunk N

- One process replays a run of any layout. As many processes as the run had replay its layout, and
  then every bit is compared.
- `--spot` checks less on a small machine: the first step of chunk N; the recorded logits of one
  micro-batch, layer by layer; or one layer's files, digests and movement.
- Exit codes: 0 verified; 1 something differs; 2 a usage error or a damaged file.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.errors import RunError
from k2train.launch.environment import Launch, read_launch
from k2train.launch.environment_defaults import set_environment_defaults
from k2train.replay.begin import Place
from k2train.replay.recorded_run import RecordedRun
from k2train.replay.request import Request


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step, or two like 940:950")
    return int(match[1]), int(match[2] or match[1])


def request_of(arguments: Sequence[str]) -> tuple[Path, Request, Path | None]:
    """Parse the command line: run, what to replay, and the data if it has moved."""
    parser = Parser(
        prog="replay.py", description="Do recorded steps again and compare them with the record."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--chunk", type=positive, metavar="N", help="the steps of checkpoint N")
    what.add_argument("--steps", type=_steps, metavar="A:B", help="these steps")
    what.add_argument(
        "--resume-drill", type=int, metavar="N", help="the two recorded steps after checkpoint N"
    )
    what.add_argument("--probe", type=positive, metavar="K", help="K chunks drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --probe")
    parser.add_argument(
        "--data", type=Path, metavar="MANIFEST", help="the data's manifest.json, if it has moved"
    )
    parser.add_argument(
        "--spot", choices=("step", "micro-batch", "layer"), help="check less, on a small machine"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="L", help="of --spot layer")
    given = parser.parse_args(arguments)
    if given.spot and given.chunk is None:
        parser.error("--spot needs --chunk N")
    return given.run, _request(given), given.data


def _request(given: argparse.Namespace) -> Request:
    if given.spot == "layer":
        return Request(chunk=given.chunk, layer=given.layer)
    if given.spot == "micro-batch":
        return Request(prompt=given.chunk)
    return Request(
        given.chunk,
        given.steps,
        given.resume_drill,
        given.probe,
        given.seed,
        first_only=given.spot == "step",
    )


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    directory, request, data = request_of(arguments)
    launch: Launch = read_launch()
    run = RecordedRun.read(directory)
    if not run.checkpoints:
        raise RunError(f"{directory} has no checkpoint to begin from")
    place = Place(launch.world_size, data, same_layout=launch.world_size > 1)

    # Before torch, which reads them once.
    set_environment_defaults(launch.world_size, deterministic=True)
    program = importlib.import_module("k2train.replay.program")
    return int(program.replay(launch, run, request, place))


if __name__ == "__main__":
    sys.exit(main())
