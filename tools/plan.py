"""Training plan of a config on N processes: grid, memory, schedule program, bubble and picture.

    python tools/plan.py CONFIG.yaml [--world N] [dotted.key=value ...]
    python tools/plan.py CONFIG.yaml --cluster a100-80gb --gpus 480 [--tokens 1.4e12]
    python tools/plan.py --predict rows.csv --out predicted.csv
    python tools/plan.py --calibration-report rows.csv [--judge other_rows.csv ...]
    python tools/plan.py STAGE1.yaml STAGE2.yaml --before-you-burn --cluster a100-80gb --gpus 480
    python tools/plan.py --compare RUN [--cluster NAME] [--draw FILE.svg]

- With a cluster it searches all layouts, and predicts seconds, days and energy.
- Needs no device and no torch, so a mistake costs a second and not a queue.
- It shows what the trainer would do by calling the same functions.

Exit codes: 0 done; 1 something does not hold (--before-you-burn); 2 an error in config or usage,
one line each on stderr.

Alternatives considered:
- A second set of formulas in this tool: it would drift.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.config.load import load_config
from k2train.errors import EXIT_DONE, RunError
from k2train.files import write_synced
from k2train.plan.draw import svg
from k2train.planner.predict import calibration_report, predict_file
from plan_parts.compare import add_compare_options, comparison
from plan_parts.on_cluster import add_cluster_options, cluster_plan
from plan_parts.on_processes import UNIT, plan

PART = Path(__file__).parent / "plan_parts" / "two_stages.py"


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.predict or options.calibration_report:
        return _rows(parser, options)
    if options.compare:
        print(comparison(parser, options))
        return EXIT_DONE
    if options.judge:
        parser.error("--judge needs --calibration-report")
    if options.config is None:
        parser.error("the following arguments are required: CONFIG.yaml")
    if options.before_you_burn or options.cluster:
        return _on_cluster(parser, options)
    for name in ("gpus", "explain", "why_not", "json", "draw", "tokens", "out", "trace"):
        if getattr(options, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} needs --cluster")

    config = load_config(options.config, options.overrides)
    world_size = options.world or config.parallel.tensor * config.parallel.pipeline
    text, spans = plan(config, world_size, options.width, options.full)
    if options.svg:
        try:
            write_synced(Path(options.svg), svg(spans, unit=UNIT))
        except OSError as problem:
            raise RunError(f"--svg {options.svg} cannot be written: {problem.strerror}") from None
    print(text)
    return EXIT_DONE


def _parser() -> Parser:
    parser = Parser(
        prog="plan",
        description="Show the training plan of a config on N processes. Needs no device.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="dotted.key=value",
        help="values that replace the file's",
    )
    parser.add_argument(
        "--world", type=positive, metavar="N", help="processes (default: tensor x pipeline)"
    )
    parser.add_argument("--svg", metavar="FILE", help="write the picture as SVG, too")
    parser.add_argument(
        "--full", action="store_true", help="every rank and every action, however many"
    )
    terminal = shutil.get_terminal_size((100, 24)).columns
    parser.add_argument(
        "--width", type=positive, default=terminal, metavar="COLUMNS", help="width of the picture"
    )
    add_cluster_options(parser)
    add_compare_options(parser)
    return parser


def _rows(parser: Parser, options: argparse.Namespace) -> int:
    """Predict the rows of a CSV, or report the errors on them."""
    if options.calibration_report:
        print("\n".join(calibration_report(options.calibration_report, options.judge or ())))
        return EXIT_DONE
    if not options.out:
        parser.error("--predict needs --out FILE.csv")
    print(predict_file(options.predict, options.out))
    return EXIT_DONE


def _on_cluster(parser: Parser, options: argparse.Namespace) -> int:
    """Search layouts on a cluster, or check two stages before they are paid for."""
    if not options.cluster or not options.gpus:
        parser.error("a plan on a cluster needs --cluster NAME and --gpus N")
    for name, instead in (("world", "--gpus"), ("svg", "--draw"), ("full", "--explain")):
        if getattr(options, name):
            parser.error(f"--{name} does not go with --cluster; it has {instead}")
    if options.before_you_burn:
        if len(options.overrides) != 1:
            parser.error("--before-you-burn needs STAGE1.yaml and STAGE2.yaml")
        for name in ("explain", "why_not", "json", "draw", "tokens"):
            if getattr(options, name) not in (None, False):
                parser.error(f"--{name.replace('_', '-')} does not go with --before-you-burn")
        # A process of its own: reading chunks needs NumPy, which no other plan does.
        stages = [options.config, options.overrides[0]]
        on = ["--cluster", options.cluster, "--gpus", str(options.gpus)]
        return subprocess.run([sys.executable, str(PART), *stages, *on], check=False).returncode
    print(cluster_plan(options))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
