"""Options and text of `tools/plan.py CONFIG --cluster NAME --gpus N`.

- The search itself, and every text, are `k2train.planner`'s. Here is what is asked, and in what
  order it is shown.

Alternatives considered:
- A tool of its own: a plan on processes and a plan on a cluster answer one question.
"""

import argparse
import json
import math
from pathlib import Path

from k2train.config.load import Config, load_config
from k2train.data.manifest import read_manifest
from k2train.errors import DataError, RunError
from k2train.files import write_synced
from k2train.plan.draw import svg
from k2train.plan.efficiency import constants_of
from k2train.plan.measured_time import time_of
from k2train.plan.program_graph import programs_of
from k2train.plan.search import Ranked, search
from k2train.plan.simulate import simulate
from k2train.plan.step_time import STEADY_ROUNDS, action_seconds, stage_passes
from k2train.planner.cluster_file import load_cluster
from k2train.planner.layout_text import (
    TOP,
    as_json,
    explain_lines,
    goodput_lines,
    table_lines,
    why_not_lines,
)
from k2train.planner.layouts import Question, checked, none_fits, parse_choice


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add what a search, a prediction and a check of two stages are asked."""
    group = parser.add_argument_group("on a cluster: which layout, how long, how much")
    group.add_argument("--cluster", metavar="NAME", help="of configs/clusters, or a YAML file")
    group.add_argument("--gpus", type=_positive, metavar="N", help="devices to use")
    group.add_argument(
        "--tokens", type=_tokens, metavar="N", help="tokens of the whole run, if no data says so"
    )
    group.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="LAYOUT",
        help="one step by term: the best, or tensor=8,pipeline=4,stages=1,micro=4,recompute=none",
    )
    group.add_argument(
        "--why-not", type=_layout, metavar="LAYOUT", help="compare a layout with the best one"
    )
    group.add_argument(
        "--json", action="store_true", help="the table for programs, and the layout that is named"
    )
    group.add_argument("--draw", metavar="FILE.svg", help="write the best layout's pipeline")
    group.add_argument(
        "--before-you-burn",
        action="store_true",
        help="check STAGE1.yaml and STAGE2.yaml together on one page; exit 1 if one does not hold",
    )
    rows = parser.add_argument_group("rows of a table")
    rows.add_argument("--predict", metavar="FILE.csv", help="predict each row's step and memory")
    rows.add_argument("--out", metavar="FILE.csv", help="where --predict writes")
    rows.add_argument(
        "--calibration-report",
        metavar="FILE.csv",
        help="fit the model's constants to measured rows, and report its errors by source",
    )
    rows.add_argument(
        "--judge",
        nargs="+",
        metavar="FILE.csv",
        help="rows that the fit does not see, to judge it by",
    )


def _positive(text: str) -> int:
    if not text.lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text}")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def _layout(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a layout, such as tensor=8,pipeline=4")
    return text


def _tokens(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def cluster_plan(options: argparse.Namespace) -> str:
    """Answer a plan on a cluster. Raises UserError."""
    config = load_config(options.config, options.overrides)
    cluster = load_cluster(options.cluster)
    question = Question(config, cluster, options.gpus, options.tokens or data_tokens(config))

    found = search(question.space)
    best = found.best(TOP)
    if not best:
        raise none_fits(found)
    if options.draw:
        _draw(question, best[0], options.draw)
    text = options.explain if options.why_not is None else options.why_not
    # A bare --explain names the best one.
    named = checked(question.space, parse_choice(text, question.configured)) if text else None
    if options.json:
        return json.dumps(as_json(question, found, best, named), indent=1)
    if options.why_not is not None:
        assert named is not None, "--why-not has a layout"
        return "\n".join(why_not_lines(question, best[0], named))
    if options.explain is not None:
        return "\n".join(explain_lines(question, named or best[0]))

    sections = [
        table_lines(question, found, best),
        explain_lines(question, best[0]),
        goodput_lines(question, best[0].seconds),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def data_tokens(config: Config) -> float | None:
    """Tokens of the config's data, if it is prepared here."""
    try:
        manifest = read_manifest(config.data.manifest)
    except DataError:
        return None
    return float(sum(chunk.tokens for chunk in manifest.chunks))


def _draw(question: Question, one: Ranked, file: str) -> None:
    """Write the pipeline of one layout, its first rounds, with planned seconds."""
    work = question.space.workload(one.candidate.choice)
    time = time_of(work, question.cluster, constants_of(question.cluster.device.generation))
    durations = action_seconds(work, time, stage_passes(work, time))
    p, count = work.pipeline, work.num_microbatches
    shown = count if count <= STEADY_ROUNDS * p else STEADY_ROUNDS * p
    programs = programs_of(work.kind, p, shown, work.layout.stages_per_rank)
    spans = simulate(programs, lambda action: durations(action.stage, action.op))
    part = f"all {count}" if shown == count else f"{shown} of {count}"
    scope = f"for {part} micro-batches of {one.candidate.choice.text()}"
    try:
        write_synced(Path(file), svg(spans, scope=scope))
    except OSError as problem:
        raise RunError(f"--draw {file} cannot be written: {problem.strerror}") from None
