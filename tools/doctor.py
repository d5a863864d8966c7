"""Diagnosis of this machine: what works here, what does not, and what to install.

    python tools/doctor.py

- Python, packages, torch, devices, kernels, memory, disk, limits and network: a line each.
- What needs torch runs in a process of its own, so a torch that crashes is a line, too.
- `note` is for what some runs need, FAIL for what none can do without.

Exit codes: 0 nothing that every run needs is broken; 1 something is.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import Parser, command

import k2train
from doctor_parts import host
from doctor_parts.finding import Finding
from k2train.commands import program_text
from k2train.errors import EXIT_DONE, EXIT_FAILED

PART = Path(__file__).resolve().parent / "doctor_parts" / "device.py"
LIMIT_SECONDS = 300
"""A cold file system may take a minute to import torch."""


def torch_findings(part: Path = PART, limit_seconds: float = LIMIT_SECONDS) -> Iterator[Finding]:
    """Yield the findings of the part that needs torch; one that says why there are none."""
    try:
        done = subprocess.run(
            [sys.executable, str(part)],
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding("FAIL", "torch", f"no answer within {limit_seconds:g} s")
        return

    for line in done.stdout.splitlines():
        if line.startswith("["):
            yield Finding(*json.loads(line))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("FAIL", "torch", f"exit code {done.returncode}: {last}")


def findings(folder: Path) -> Iterator[Finding]:
    """Yield all findings; `folder` is where runs would be written."""
    yield host.python_finding()
    yield from host.package_findings()
    yield from torch_findings()
    yield host.bf16_finding()
    yield host.compiler_finding()
    yield host.memory_finding()
    yield host.disk_finding(folder)
    yield host.files_finding()
    yield host.shared_memory_finding()
    yield host.loopback_finding()


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="doctor", description="Say what works on this machine, and what is amiss.")
    parser.parse_args(arguments)
    print(f"k2train {k2train.__version__} on {platform.system()} {platform.machine()}", flush=True)

    broken = 0
    for finding in findings(Path.cwd()):
        broken += finding.state == "FAIL"
        print(finding.line(), flush=True)
    if broken:
        print(f"\n{broken} of them must be mended before anything trains")
        return EXIT_FAILED
    print(f"\ntraining works here; {program_text('init')} FOLDER writes configs to start from")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
