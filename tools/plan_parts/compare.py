"""Options and files of `tools/plan.py --compare RUN`.

- What is compared, and every text, are `k2train.planner`'s.
"""

import argparse
import json
from pathlib import Path

from k2train.errors import RunError
from k2train.files import write_synced
from k2train.plan.hardware import Cluster
from k2train.planner.cluster_file import load_cluster
from k2train.planner.compare_picture import picture
from k2train.planner.compare_run import Compared, RecordedRun, compare_run, read_run
from k2train.planner.compare_text import as_json, text
from k2train.record.action_trace import trace_text


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add what a comparison is asked; --cluster, --draw and --json are shared with the search."""
    group = parser.add_argument_group("a run beside its plan (with --cluster, --draw, --json)")
    group.add_argument(
        "--compare", metavar="RUN", help="measured steps of a run, by term, the most wrong first"
    )
    group.add_argument(
        "--trace", metavar="FILE.json", help="write the actions of all its ranks as one trace"
    )


def comparison(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Answer --compare, and write the files it is asked for. Raises UserError."""
    if options.config is not None:
        parser.error("--compare takes the run's own config: leave out CONFIG.yaml and overrides")
    for name in ("world", "gpus", "tokens", "svg", "explain", "why_not"):
        if getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --compare")

    run = read_run(Path(options.compare))
    cluster: Cluster | None = load_cluster(options.cluster) if options.cluster else None
    found = compare_run(run, cluster)
    for option, file in (("--draw", options.draw), ("--trace", options.trace)):
        if file:
            _write(option, file, run, found)
    return json.dumps(as_json(found), indent=1) if options.json else text(found)


def _write(option: str, file: str, run: RecordedRun, found: Compared) -> None:
    if not run.traces:
        raise RunError(
            f"{option} needs recorded actions, and {run.directory} has none: set "
            "profile.actions=[FIRST,LAST] for its next start"
        )
    content = picture(found) if option == "--draw" else trace_text(run.traces)
    try:
        write_synced(Path(file), content)
    except OSError as problem:
        raise RunError(f"{option} {file} cannot be written: {problem.strerror}") from None
