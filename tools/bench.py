"""Speed benchmark: k2train beside its peers on the same work, as ratios within one run.

    python tools/bench.py cpu [--quick] [--precision fp32|bf16|both] [--json FILE]
                              [--against BASE.json]
    python tools/bench.py table RECORD.json ...       (Markdown of records that --json wrote)
    python tools/bench.py gpu [--help]                (has its own options)

- Every contender is a set of processes, started once, that take steps on command and in turns. So
  other load on the machine slows all of them alike.
- Ratios are shown, because absolute rates belong to a machine. Ratios belong to a kind of
  processor: the report names it, and `table` has one table for each kind.
- This driver imports no torch.
- Progress goes to stderr; the table comes last on stdout.

Exit codes: 0 done; 1 the reference did not run, or a loss of more than 8 % with --against;
2 a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command, positive

from benchmarks.cpu import against, page, table
from benchmarks.cpu.contenders import PRECISIONS, REFERENCE, Contender, choose, variant
from benchmarks.cpu.machine import commit_of, machine_facts
from benchmarks.cpu.results import Row, rows_of, verdicts_of
from benchmarks.cpu.rounds import Plan, run_group
from benchmarks.cpu.work import Work, parse_work
from k2train.errors import EXIT_DONE, EXIT_FAILED, RunError
from k2train.files import write_synced

ROOT = Path(__file__).resolve().parent.parent


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if list(arguments[:1]) == ["gpu"]:
        # This module imports torch, which the processes of `cpu` must not need.
        return int(importlib.import_module("benchmarks.gpu.main").main(arguments[1:]))
    options = _parser().parse_args(arguments)
    if options.kind == "table":
        print(page.pages(page.read_records(options.records)))
        return EXIT_DONE
    return _cpu(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bench", description="Speed as ratios side by side in one run.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="cpu|gpu|table")
    kinds.add_parser("gpu", help="one GPU: layers of K2 and whole models (options of its own)")
    of_records = kinds.add_parser(
        "table", help="Markdown of records, a table for each kind of processor"
    )
    of_records.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    _cpu_options(
        kinds.add_parser("cpu", help="the layouts of two to four CPU processes beside their peers")
    )
    return parser


def _cpu_options(cpu: argparse.ArgumentParser) -> None:
    cpu.add_argument(
        "--quick", action="store_true", help="under 2 minutes: a few contenders in one group, fp32"
    )
    cpu.add_argument(
        "--precision", choices=[*PRECISIONS, "both"], help="default: both; with --quick fp32"
    )
    cpu.add_argument(
        "--only", nargs="+", metavar="NAME", help="these contenders, and the reference"
    )
    cpu.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: CONTENDER key=value ...'",
        help="a k2train contender with other config keys beside the rest (again for more)",
    )
    cpu.add_argument(
        "--rounds", type=positive, metavar="N", default=Plan.rounds, help=f"default {Plan.rounds}"
    )
    cpu.add_argument(
        "--steps", type=positive, default=1, metavar="N", help="steps of a contender in a round"
    )
    cpu.add_argument(
        "--cores",
        type=positive,
        default=2,
        metavar="N",
        help="cores that all processes share, default 2",
    )
    cpu.add_argument(
        "--size", nargs="+", default=[], metavar="name=value", help="another size of the work"
    )
    cpu.add_argument(
        "--limit",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="longest step before it counts as hung",
    )
    cpu.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the numbers too; --against takes such a file",
    )
    cpu.add_argument(
        "--against",
        type=Path,
        metavar="BASE.json",
        help="run that record's commit beside this tree",
    )


def _cpu(options: argparse.Namespace) -> int:
    work = parse_work(options.size)
    precision = options.precision or ("fp32" if options.quick else "both")

    precisions = PRECISIONS if precision == "both" else (precision,)
    groups = choose(
        options.only, options.quick, precisions, [variant(text) for text in options.variant]
    )

    plan = Plan(
        rounds=options.rounds,
        steps=options.steps,
        measure=not options.against,
        cores=options.cores,
        limit_seconds=float(options.limit),
        start_limit_seconds=max(5.0 * options.limit, 60.0),
    )

    if options.json and not options.json.parent.is_dir():
        raise RunError(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.json and options.json.is_dir():
        raise RunError(f"--json {options.json}: that is a folder; name a file in it")

    began = time.monotonic()
    machine, commit = machine_facts(), commit_of(ROOT)

    if options.against:
        base = against.read_base(options.against)
        with against.checkout(ROOT, base["commit"]) as tree:
            # Both commits run in the same groups, so that their ratio is of the same minutes.
            rows = _measure(against.pairs(groups, tree), work, plan)
    else:
        base, rows = None, _measure(groups, work, plan)

    facts = table.to_json(work, plan, machine, commit, time.monotonic() - began)
    return _report(facts, rows, base, options.json)


def _measure(groups: Sequence[Sequence[Contender]], work: Work, plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for group in groups:
        began = time.monotonic()

        def log(text: str, name: str = group[0].group, began: float = began) -> None:
            print(f"{name}: {time.monotonic() - began:4.0f} s: {text}", file=sys.stderr, flush=True)

        rows += rows_of(run_group(group, work, plan, log), work)
    return rows


def _report(
    facts: dict[str, Any], rows: Sequence[Row], base: dict[str, Any] | None, path: Path | None
) -> int:
    verdicts = verdicts_of(rows)
    comparisons = against.compare(rows) if base else []
    facts |= table.rows_json(rows, verdicts)
    if base:
        facts["against"] = {
            "commit": base["commit"],
            "layouts": [dataclasses.asdict(c) for c in comparisons],
        }

    # Printed first: a disk that is full by now must not take what minutes of measurement found.
    print(table.report(facts, rows, verdicts), flush=True)
    if base:
        print(f"\n{against.report(comparisons, base, facts['machine'])}", flush=True)
    if path:
        _write(path, json.dumps(facts, indent=1) + "\n")

    if base:
        lost = [f"{c.name} ({c.precision})" for c in comparisons if c.lost]
        if lost:
            print(f"slower than the base, or no longer running: {', '.join(lost)}", file=sys.stderr)
        return EXIT_FAILED if lost else EXIT_DONE

    # Without the reference no ratio means anything.
    references = [row for row in rows if row.name == REFERENCE]
    return EXIT_DONE if all(row.problem is None for row in references) else EXIT_FAILED


def _write(path: Path, text: str) -> None:
    try:
        write_synced(path, text)
    except OSError as problem:
        raise RunError(f"--json {path} cannot be written: {problem.strerror}") from None


if __name__ == "__main__":
    # As with Ctrl-C, so that the started processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILED))
    sys.exit(main())
