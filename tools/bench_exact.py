"""Price of `run.exact`: steps with and without it in turns, on one and on two processes.

    python tools/bench_exact.py [--steps N] [--processes 1,2] [dotted.key=value ...]
    python tools/bench_exact.py --layer [--steps N] [--tokens N]

- Every engine takes steps in turns, one thread a process. Seconds are those of the processor, of
  all processes, so other load does not count. The price is the median of exact / plain - 1.
- `plain` is the same config without `run.exact`. Unit and leaf are `batch.exact_unit` and
  `batch.exact_leaf`.
- `--layer` measures one layer's products in fixed blocks, which tensor-parallel degrees would need.
- Engines with the same unit and leaf must have the same losses on any number of processes, to the
  bit. The tool fails otherwise.

Exit codes: 0 done; 1 a process failed, or losses differ; 2 a usage error.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

from command_line import Parser, command, positive

from benchmarks.gpu.processes import command_of
from benchmarks.ranks import run_ranks
from k2train.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from k2train.record.system_info import processor_name
from k2train.text import markdown_table

LAYER_HEADINGS = ("precision", "blocks", "plain ms", "price", "degrees with the same bits")
LAYER = ("512", "1376")
"""Hidden size and inner size of the layer."""
HEADINGS = ("precision", "processes", "unit", "leaf", "CPU seconds a step", "price")
WORK = (
    "model.num_layers=8",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "model.num_heads=8",
    "model.num_kv_heads=8",
    "model.vocab_size=8192",
    "data.sequence_length=256",
    "batch.global_sequences=16",
    "batch.micro_sequences=4",
    "kernels.compile=off",
)
EXACT = ((1, 1), (1, 4), (4, 4))
"""(unit, leaf), in sequences."""


def _keys(precision: str, exact: tuple[int, int] | None) -> list[str]:
    chosen = [f"precision={precision}"]
    if exact is not None:
        unit, leaf = exact
        chosen += ["run.exact=true", f"batch.exact_unit={unit}", f"batch.exact_leaf={leaf}"]
    return chosen


def _processes(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of counts, such as 1,2")
    return found


def _measure(
    precision: str, processes: int, options: argparse.Namespace
) -> tuple[list[tuple[str, ...]], list[list[float]]] | None:
    """Return the rows of one table, and the losses of each exact engine; None if it failed."""
    kinds = (None, *EXACT)
    runs = [[*WORK, *options.overrides, *_keys(precision, kind)] for kind in kinds]
    ranks = run_ranks(runs, processes, options.steps, warmup=2, threads=1)
    if ranks is None:
        return None

    seconds = [
        [sum(rank[number][step]["cpu_seconds"] for rank in ranks) for step in range(options.steps)]
        for number in range(len(kinds))
    ]
    rows: list[tuple[str, ...]] = []
    for kind, own in zip(kinds, seconds, strict=True):
        ratio = statistics.median(a / b for a, b in zip(own, seconds[0], strict=True))
        unit, leaf = ("plain", "") if kind is None else kind
        price = "" if kind is None else f"{ratio - 1:+.0%}"
        rows.append(
            (
                precision,
                str(processes),
                str(unit),
                str(leaf),
                f"{statistics.median(own):.3f}",
                price,
            )
        )
    losses = [[step["loss"] for step in ranks[0][number]] for number in range(1, len(kinds))]
    return rows, losses


def _layer(options: argparse.Namespace) -> int:
    """Measure and print the table of one layer."""
    sizes = [*LAYER, str(options.tokens), str(options.steps)]
    run = command_of("benchmarks.blocked_products", sizes)
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return EXIT_FAILED
    print(f"{processor_name()}, one thread, hidden {sizes[0]}, ffn {sizes[1]}, {sizes[2]} tokens")
    print("\n".join(markdown_table(LAYER_HEADINGS, json.loads(done.stdout))))
    return EXIT_DONE


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="bench_exact.py", description="Price of run.exact, as a ratio.")
    parser.add_argument("--steps", type=positive, default=9)
    parser.add_argument("--processes", type=_processes, default=[1, 2])
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    wrong = [text for text in options.overrides if "=" not in text]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} must be dotted.key=value")
    if options.layer:
        return _layer(options)

    rows: list[tuple[str, ...]] = []
    differing = []
    for precision in options.precisions.split(","):
        first: list[list[float]] | None = None
        for processes in options.processes:
            found = _measure(precision, processes, options)
            if found is None:
                return EXIT_FAILED
            rows += found[0]
            first = first or found[1]
            if found[1] != first:
                differing.append(f"{precision} on {processes} processes")

    print(f"{processor_name()}, one thread a process, {options.steps} steps of each in turns")
    print("\n".join(markdown_table(HEADINGS, rows)))
    for what in differing:
        print(f"losses of {what} differ from those on {options.processes[0]}", file=sys.stderr)
    return EXIT_FAILED if differing else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
