"""Training step profile: time per kind of operation (products, attention, loss, ...) as Markdown.

    python tools/bench_profile.py                    the standard CPU work and a small one
    python tools/bench_profile.py --processes 2      the same with tensor and sequence parallelism
    python tools/bench_profile.py --hidden 512 --length 512 --precision bf16
    python tools/bench_profile.py --documents        attention within documents, across them, masked
    python tools/bench_profile.py --products         products of a step by library, on a CPU in fp32

- The profiler itself costs time, most where operations are small. So the table also shows a step
  without it; the share called rest includes the profiler's own cost.
- On a CPU the rate of the layers' products stands beside the largest rate that a product of a
  sweep reaches with the same threads and precision.
- Each work runs in processes of its own, so this command needs no torch.
- `--products` also compares steps with and without the choice of `kernels.matmul: measured`, and
  with `--starts N` the choices of N first starts.
- `--documents` measures attention alone, `--steps` times: lengths 512 to 8192, or `--length`.

Exit codes: 0 done; 1 a process failed; 2 a usage error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command
from pydantic import ValidationError

from benchmarks.configs import config_tree
from benchmarks.gpu.processes import command_of, last_line, run_to_end
from benchmarks.gpu.report import share
from benchmarks.gpu.report import table as markdown
from k2train.config.load import Config
from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.record.system_info import processor_name
from k2train.text import counted, markdown_table

LIMIT_SECONDS = 600.0
DOCUMENT_LENGTHS = (512, 1024, 2048, 4096, 8192)
DOCUMENT_HEADINGS = (
    *("precision", "length", "documents", "attend ms", "mask ms", "block ms"),
    *("block / attend", "block / mask", "MiB kept: attend", "mask", "block"),
)
# The standard work of the CPU benchmark, and one small enough for Python's share to show.
STANDARD = {
    "hidden": 256,
    "ffn": 688,
    "layers": 8,
    "heads": 8,
    "vocab": 8192,
    "length": 256,
    "micro": 4,
    "sequences": 16,
}
SMALL = {
    "hidden": 64,
    "ffn": 172,
    "layers": 4,
    "heads": 4,
    "vocab": 512,
    "length": 32,
    "micro": 4,
    "sequences": 16,
}


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line; exits with one line on an error."""
    parser = Parser(prog="bench_profile.py", description="Where the time of a training step goes.")
    for name, value in STANDARD.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            help=f"{name} of the work (default {value}); any of these: that work alone",
        )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of each process (default 1)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: tensor and sequence parallelism",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the config's kernels",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps under the profiler (default 3)")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument(
        "--documents", action="store_true", help="attention within documents instead, on a CPU"
    )
    parser.add_argument(
        "--products", action="store_true", help="matrix products by library instead, on a CPU"
    )
    parser.add_argument(
        "--starts", type=int, default=1, help="with --products: first starts (default 1)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args(list(arguments))

    if given.json is not None and (given.json.is_dir() or not given.json.parent.is_dir()):
        parser.error(f"--json {given.json}: must be a file in a folder that exists")

    unclear = [pair for pair in given.kernel if "=" not in pair]
    if unclear:
        parser.error(f"--kernel {unclear[0]}: must be KEY=VALUE, as in --kernel recompute=full")

    if given.products and (given.precision, given.processes, given.cuda) != ("fp32", 1, False):
        parser.error("--products is for one process on a CPU in fp32: leave the others out")

    for sizes in works_of(given).values():
        mistake = mistake_in(config_of(sizes, given))
        if mistake is not None:
            parser.error(mistake)
    return given


def works_of(given: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Sizes of each requested work by title."""
    chosen = {name: value for name in STANDARD if (value := getattr(given, name)) is not None}
    works = {"asked for": STANDARD | chosen} if chosen else {"standard": STANDARD, "small": SMALL}
    return {
        f"{title}: hidden {w['hidden']}, {w['layers']} layers, {w['length']} x {w['micro']}": w
        for title, w in works.items()
    }


def config_of(sizes: Mapping[str, int], given: argparse.Namespace) -> dict[str, Any]:
    """Config of a work as a tree; its data is never opened."""
    model = {
        "num_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "ffn_hidden_size": sizes["ffn"],
        "num_heads": sizes["heads"],
        "vocab_size": sizes["vocab"],
    }
    return config_tree(
        model,
        sizes["length"],
        sizes["sequences"],
        sizes["micro"],
        1e-3,
        parallel={"tensor": given.processes},
        kernels=dict(pair.split("=", 1) for pair in given.kernel),
        precision=given.precision,
    )


def mistake_in(tree: dict[str, Any]) -> str | None:
    """Describe what is wrong with a config on one line, before any process starts."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where + ': ' if where else ''}{first['msg'].splitlines()[0]}"
    return None


def profile_of(sizes: Mapping[str, int], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Profile one work; returns its figures, or `why` there are none."""
    work = {
        "config": config_of(sizes, given),
        "threads": given.threads,
        "steps": given.steps,
        "cuda": given.cuda,
    }

    source, target, log = folder / "work.json", folder / "out.json", folder / "log.txt"
    source.write_text(json.dumps(work))
    # A result of an earlier work must not pass for this one's.
    target.unlink(missing_ok=True)
    command = command_of(
        "benchmarks.gpu.profile_work", [str(source), str(target)], processes=given.processes
    )

    code = run_to_end(command, log, LIMIT_SECONDS)
    if code != 0 or not target.exists():
        return {"why": f"exit code {code}: {last_line(log)}"}
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def products_table(sizes: Mapping[str, int], given: argparse.Namespace) -> int:
    """Measure the products of a work by library, and print their table."""
    work = {
        "config": config_of(sizes, given),
        "threads": given.threads,
        "steps": given.steps,
        "starts": given.starts,
    }
    with tempfile.TemporaryDirectory(prefix="k2train-products-") as folder:
        source, target = Path(folder) / "work.json", Path(folder) / "out.json"
        source.write_text(json.dumps(work))
        run = command_of("benchmarks.products", [str(source), str(target)])
        if subprocess.run(run, check=False).returncode:
            return EXIT_FAILED
        found = json.loads(target.read_text())
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(products_lines(found, given.threads)))
    return EXIT_DONE


def products_lines(found: Mapping[str, Any], threads: int) -> list[str]:
    """The table of products, and what the choice makes of a step, as lines of Markdown."""
    libraries = [*found["rows"][0][1]]
    rows = [
        [shape, *(f"{rates[name]:.0f}" for name in libraries), taken]
        for shape, rates, taken in found["rows"]
    ]
    lines = [
        f"{found['processor']}, {counted(threads, 'thread')}; GFLOP/s of the fastest round",
        "",
        *markdown_table(("product, n x k x m", *libraries, "taken"), rows),
        "",
        f"default {found['default']}; measured: {found['choice'] or 'the same for all products'}",
    ]
    for name, step, products in zip(
        ("default", "measured"), found["step_seconds"], found["product_seconds"], strict=True
    ):
        rate = found["flops"] / products / 1e9
        lines.append(
            f"a step with the {name} products: {1e3 * step:.0f} ms, products {products / step:.0%} "
            f"of it at {rate:.0f} GFLOP/s, {rate / found['peak']:.0%} of the measured peak "
            f"({found['peak']:.0f})"
        )
    starts = found["starts"]
    if starts["all"] > 1:
        moved = f"; not always: {', '.join(starts['moved'])}" if starts["moved"] else ""
        lines.append(f"{starts['same']} of {starts['all']} first starts chose alike{moved}")
    return lines


def table(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table with a column per work: milliseconds and share of a profiled step."""
    good = [found for found in profiles.values() if "why" not in found]
    titles = [title for title, found in profiles.items() if "why" not in found]

    def share_of(spent: float, found: Mapping[str, Any]) -> str:
        return f"{1e3 * spent:.1f} ms, {share(spent, found['profiled_seconds'])}"

    lines = [
        *(
            [name, *(share_of(found["seconds"][name], found) for found in good)]
            for name in (good[0]["seconds"] if good else ())
        ),
        ["Python, host, profiler", *(share_of(found["rest_seconds"], found) for found in good)],
        ["a profiled step", *(f"{1e3 * found['profiled_seconds']:.1f} ms" for found in good)],
        [
            "**a step without the profiler**",
            *(f"**{1e3 * found['plain_seconds']:.1f} ms**" for found in good),
        ],
        ["operations a step, nested ones too", *(str(found["operations"]) for found in good)],
    ]
    if any(found["peak_flops"] is not None for found in good):
        lines.append(
            ["largest measured rate of a product", *(rate_text(f["peak_flops"]) for f in good)]
        )
        lines.append(["products of the layers, share of it", *map(products_text, good)])
    if any(found["busy_seconds"] is not None for found in good):
        lines.append(["GPU busy", *(share_of(found["busy_seconds"], found) for found in good)])
        for key in ("kernels", "synchronisations", "to_host"):
            lines.append([key.replace("_", " "), *(str(found[key]) for found in good)])
    return markdown(["", *titles], lines)


def rate_text(flops: float | None) -> str:
    """FLOP/s as GFLOP/s."""
    return "-" if flops is None else f"{flops / 1e9:,.1f} GFLOP/s"


def products_text(found: Mapping[str, Any]) -> str:
    """Rate of the layers' products in their part of a profiled step, and its share of the peak."""
    spent = found["seconds"]["products"]
    rate = found["layer_flops"] / spent if found["layer_flops"] and spent else None
    return f"{rate_text(rate)}, {share(rate, found['peak_flops'])}"


def documents_table(given: argparse.Namespace) -> int:
    """Measure attention within documents, and print its table."""
    lengths = [given.length] if given.length else DOCUMENT_LENGTHS
    sizes = [str(number) for number in (given.steps, *lengths)]
    run = command_of("benchmarks.document_attention", sizes)
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return EXIT_FAILED
    print(f"{processor_name()}, one thread; processor time, medians of {given.steps}\n")
    print("\n".join(markdown_table(DOCUMENT_HEADINGS, json.loads(done.stdout))))
    return EXIT_DONE


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    given = read_arguments(arguments)
    if given.documents:
        return documents_table(given)
    if given.products:
        return products_table(next(iter(works_of(given).values())), given)

    with tempfile.TemporaryDirectory(prefix="k2train-profile-") as folder:
        profiles = {
            title: profile_of(sizes, given, Path(folder))
            for title, sizes in works_of(given).items()
        }

    if given.json is not None:
        given.json.write_text(json.dumps(profiles, indent=1) + "\n")

    bad = [f"{title}: {found['why']}" for title, found in profiles.items() if "why" in found]
    if len(bad) < len(profiles):
        where = "GPU" if given.cuda else f"CPU, {given.threads} threads a process"
        print(f"{given.precision}, {given.processes} process(es), {where}; rank 0\n")
        print(table(profiles), end="")
    for line in bad:
        print(f"bench_profile.py: {line}", file=sys.stderr)
    return EXIT_FAILED if bad else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
