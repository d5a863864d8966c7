"""Calibrate the present machine: a cluster file of its own speed, and predicted beside real steps.

    python tools/calibrate.py --out machine.yaml [--quick]
    python tools/plan.py CONFIG.yaml --cluster machine.yaml --gpus N
    python tools/calibrate.py --cluster machine.yaml --check CONFIG.yaml [dotted.key=value ...]
    python tools/calibrate.py --saved CHECK.json --draw FILE.svg

- Times the kernels of a training step, collectives between real processes, and what layers and
  steps cost beside them: on the GPU where there is one, else on the CPU with gloo.
- The file says when, on what processor, with what torch, and how much repeated times differ.
- `--check` runs short trainings in several layouts, and prints predicted beside measured steps.
  With `--out` it measures the machine first.
- `--json FILE` keeps a check, `--saved FILE` shows it again; `--draw FILE` makes a picture of it.
- This driver imports no torch.

Exit codes: 0 done; 1 a process failed; 2 a mistake in usage.
"""

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from command_line import Parser, command, positive

from k2train.calibrate.check import LAYOUTS, check, check_lines
from k2train.calibrate.check_file import CheckFacts, SavedCheck, check_text, read_check
from k2train.calibrate.check_picture import picture
from k2train.calibrate.clock_names import CLOCKS
from k2train.calibrate.cluster_text import cluster_text
from k2train.calibrate.machine import (
    QUICK_ROUNDS,
    ROUNDS,
    Request,
    checked_ranks,
    cores_of_machine,
    device_of_machine,
    measure,
)
from k2train.errors import EXIT_DONE, EXIT_FAILED, RunError
from k2train.files import write_synced
from k2train.plan.hardware import Cluster
from k2train.planner.cluster_file import load_cluster
from k2train.retry import is_folder_retried, reason
from k2train.text import bytes_text

PRECISIONS = ("fp32", "bf16")
LEAST_STEPS = 3
STEPS = 8


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    _refuse(parser, given)
    # Minutes of measurement must not end at a file that cannot be written.
    for option in ("out", "json", "draw"):
        if getattr(given, option):
            _check_writable(f"--{option}", Path(getattr(given, option)))

    if given.saved:
        _show(read_check(given.saved), given)
        return EXIT_DONE
    cluster = load_cluster(given.cluster) if given.cluster else _measured(given)
    if given.check:
        _show(_checked(cluster, given), given)
    return EXIT_DONE


def _refuse(parser: Parser, given: argparse.Namespace) -> None:
    """End with a mistake in usage where options do not go together."""
    if given.saved:
        for name in ("out", "cluster", "check", "json"):
            if getattr(given, name):
                parser.error(f"--saved measures nothing: leave out --{name}")
    elif not given.out and not given.cluster:
        parser.error("give --out FILE.yaml to measure, or --cluster FILE.yaml to check one")
    if given.out and given.cluster:
        parser.error("--out measures this machine, --cluster takes a measurement: one of the two")
    if given.overrides and not given.check:
        parser.error(f"{given.overrides[0]}: values of a config need --check CONFIG.yaml")
    for name in ("cluster", "layouts", "steps", "rounds", "json"):
        if getattr(given, name) is not None and not given.check:
            parser.error(f"--{name} needs --check CONFIG.yaml")
    if given.draw and not given.check and not given.saved:
        parser.error("--draw needs --check CONFIG.yaml, or --saved FILE.json of an earlier check")


def _parser() -> Parser:
    parser = Parser(
        prog="calibrate", description="Measure this machine for plans, and check plans against it."
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value")
    parser.add_argument("--out", metavar="FILE.yaml", help="measure, and write the cluster file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about a minute")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="most ranks whose collectives are timed"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: both"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default=CLOCKS[0],
        help="processor: processor time of kernels, where other programs run beside",
    )
    parser.add_argument("--links", metavar="CLUSTER", help="take the links of that cluster")
    parser.add_argument(
        "--watts", type=_watts, default=100.0, metavar="W", help="power of a device, default 100"
    )
    parser.add_argument("--check", metavar="CONFIG.yaml", help="predicted beside measured steps")
    parser.add_argument("--cluster", metavar="FILE.yaml", help="an earlier measurement, to check")
    parser.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="such as data=2 or tensor=2,pipeline=2"
    )
    parser.add_argument(
        "--steps", type=_steps, metavar="N", help=f"measured steps of each, default {STEPS}"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="runs of each layout, in turns, default 1"
    )
    parser.add_argument("--json", metavar="FILE.json", help="keep the check in a file")
    parser.add_argument("--saved", metavar="FILE.json", help="show a check that was kept")
    parser.add_argument("--draw", metavar="FILE.svg", help="write a picture of the check")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


def _steps(text: str) -> int:
    number = positive(text)
    if number < LEAST_STEPS:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_STEPS}, not {text}")
    return number


def _watts(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_writable(option: str, out: Path) -> None:
    """Raise RunError for a file that cannot be written."""
    if not is_folder_retried(out.parent):
        raise RunError(f"{option} {out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise RunError(f"{option} {out}: the folder {out.parent} may not be written by this user")
    if is_folder_retried(out):
        raise RunError(f"{option} {out}: that is a folder; name a file in it")
    try:
        # Not every folder that may be written can be: a file in it shows which.
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as problem:
        raise RunError(f"{option} {out}: cannot be written: {reason(problem, out)}") from None


def _write(option: str, out: Path, text: str) -> None:
    try:
        write_synced(out, text)
    except OSError as problem:
        raise RunError(f"{option} {out}: cannot be written: {reason(problem, out)}") from None


def _checked(cluster: Cluster, given: argparse.Namespace) -> SavedCheck:
    """Predict and run every layout. Raises UserError."""
    steps, rounds = given.steps or STEPS, given.rounds or 1
    how = (cluster, steps, _log, rounds, given.tiny)
    when = _now()
    found = check(given.check, given.overrides, given.layouts or LAYOUTS, *how)
    assert cluster.measured is not None, "what was not measured cannot be checked"
    facts = CheckFacts(
        config=given.check,
        overrides=tuple(given.overrides),
        when=when,
        processor=cluster.measured.processor,
        torch=cluster.measured.torch,
        steps=steps,
        rounds=rounds,
    )
    return SavedCheck(facts, tuple(found))


def _show(shown: SavedCheck, given: argparse.Namespace) -> None:
    """Print a check, and write the files that are asked for."""
    # Kept first: what took minutes must not be lost to a closed pipe.
    if given.json:
        _write("--json", Path(given.json), check_text(shown))
    if given.draw:
        _write("--draw", Path(given.draw), picture(shown))
    print("\n".join(check_lines(shown.checked)))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _measured(given: argparse.Namespace) -> Cluster:
    """Measure this machine, write its file, and say what came out. Raises UserError."""
    out = Path(given.out)
    links = load_cluster(given.links, "--links").links if given.links else ()

    began = time.monotonic()
    cores = cores_of_machine()
    device, devices = device_of_machine(given.device)
    request = Request(
        device,
        checked_ranks(given.ranks, device, devices, cores),
        cores,
        tuple(dict.fromkeys(given.precision)),
        QUICK_ROUNDS if given.quick else ROUNDS,
        given.clock,
        given.tiny,
    )
    cluster = measure(request, _now(), links, given.watts, _log)
    _write("--out", out, cluster_text(cluster))
    print("\n".join(_summary(cluster, out, time.monotonic() - began)))
    return cluster


def _summary(cluster: Cluster, out: Path, seconds: float) -> list[str]:
    """What was measured, in lines for people."""
    device, measured = cluster.device, cluster.measured
    assert measured is not None, "just measured"
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in device.peak_flops.items())
    lines = [
        f"{out}: {measured.processor}, torch {measured.torch}, in {seconds:.0f} s",
        f"large products: {peaks} GFLOP/s; memory {bytes_text(device.memory_bytes_per_second)}/s",
        f"repeated times differ by {measured.spread:.0%}, times from their lines by "
        f"{measured.error:.0%}",
    ]
    lines += [
        f"{link.name}: {bytes_text(link.bytes_per_second)}/s, {link.latency_seconds * 1e6:.0f} us"
        for link in cluster.links
    ]
    if measured.noisy:
        lines.append(
            "NOISY: other programs ran beside; intervals are wider. Measure again when it is quiet"
        )
    return lines


if __name__ == "__main__":
    # As with Ctrl-C, so that the started processes and their folder go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILED))
    sys.exit(main())
