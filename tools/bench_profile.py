"""Training step profile: time per kind of operation (products, attention, loss, ...) as Markdown.

    python tools/bench_profile.py                    the standard CPU work and a small one
    python tools/bench_profile.py --processes 2      the same with tensor and sequence parallelism
    python tools/bench_profile.py --hidden 512 --length 512 --precision bf16

- The profiler itself costs time, most where operations are small. So the table also shows a step
  without it; the share called rest includes the profiler's own cost.
- Each work runs in processes of its own, so this command needs no torch.

Exit codes: 0 done; 1 a process failed; 2 a usage error.
"""

import argparse
import json
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

LIMIT_SECONDS = 600.0
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
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args(list(arguments))

    unclear = [pair for pair in given.kernel if "=" not in pair]
    if unclear:
        parser.error(f"--kernel {unclear[0]}: must be KEY=VALUE, as in --kernel recompute=full")

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
    if any(found["busy_seconds"] is not None for found in good):
        lines.append(["GPU busy", *(share_of(found["busy_seconds"], found) for found in good)])
        for key in ("kernels", "synchronisations", "to_host"):
            lines.append([key.replace("_", " "), *(str(found[key]) for found in good)])
    return markdown(["", *titles], lines)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    given = read_arguments(arguments)

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
