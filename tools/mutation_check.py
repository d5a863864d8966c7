"""Mutation check: break the code on purpose, one fault at a time, and expect a named test to fail.

    python tools/mutation_check.py [--only TEXT] [--required] [--list]

- Each mutation replaces one text, which must occur exactly once in its file, in a copy of the
  repository. One named test must then fail there.
- The repository is copied once. Each mutation has hard links to that copy, and a new file where it
  breaks one.
- First all named tests must pass on an unbroken copy: a test that fails anyway proves nothing.
- A run that hangs, fails to collect or fails to start counts as not caught.
- Mutations are written by hand: faults that training code has shipped with, or could.
- Each run is forked from a process that has imported torch and nothing of the repository.
- A failing example of hypothesis is not made smaller: nobody reads it.
- Prints a Markdown table with seconds.

Exit codes: 0 every mutation is caught; 1 one is not, or its text does not occur once; 2 a usage
error.

Alternatives considered:
- Mutating operators at random: it takes hours and leaves a list that nobody reads.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import Parser, command

from fault_tests.processes import ForkServer
from k2train.text import markdown_row, markdown_table
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = (".venv", ".git", "wandb", "*.egg-info", ".*_cache", ".hypothesis", "*.pyc.*")
"""The last are compiled files that somebody is writing."""
PRODUCTS = ("data", "runs", "build")
"""Large folders beside the code at the root; below the root these names are code."""
LIMIT_SECONDS = 600.0
"""A test that takes longer hangs, however busy the machine is."""
WARM = (
    "torch",
    "torch._dynamo",
    "torch._inductor.utils",
    "safetensors.torch",
    "numpy.random",
    "numpy.fft",
    "pydantic",
    "pydantic.main",
    "pydantic.types",
    "yaml",
    "torch.distributed.run",
    "pytest",
)
OPTIONAL = ("hypothesis", "transformers.models.llama.modeling_llama")
"""What the server imports; the second where they are installed. Nothing that imports the
repository.
"""
UNUSED = ("cacheprovider", "xdist", "xdist.looponfail", "anyio", "platformdirs")
"""Plugins that pytest would load for each run: anyio takes a third of its start."""
PASSED, FAILED = 0, 1
CLUMSY = re.compile(r"\b(NameError|ImportError|ModuleNotFoundError|SyntaxError)\b")
"""A fault that breaks the program instead of its numbers proves nothing about a test."""


@dataclass(frozen=True)
class Outcome:
    """Result of one mutation."""

    mutation: Mutation
    caught: bool
    seconds: float
    detail: str


def apply(mutation: Mutation, root: Path) -> None:
    """Write the fault into the copy at `root`; a link becomes a file of its own.

    Raises ValueError unless its text occurs exactly once.
    """
    path = root / mutation.file
    source = path.read_text(encoding="utf-8")
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"{mutation.name}: its text occurs {count} times in {mutation.file}, must be once"
        )

    broken = source.replace(mutation.old, mutation.new)
    compile(broken, mutation.file, "exec")
    path.unlink()
    path.write_text(broken, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def copy_repository(root: Path, target: Path) -> Path:
    """Copy the files that tests need, including untracked ones of work in progress."""
    anywhere = shutil.ignore_patterns(*SKIPPED)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | {
            name for name in names if Path(folder) == root and name in PRODUCTS
        }

    shutil.copytree(root, target, ignore=ignored)
    return target


def linked_copy(clean: Path, target: Path) -> Path:
    """Copy a copy by hard links, or whole where there are none; milliseconds instead of a second.

    What is written into a file here is written into `clean`, too: see `apply`.
    """
    shutil.copytree(clean, target, copy_function=_link)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def warm_server(scratch: Path) -> ForkServer:
    """What runs the tests: a context manager."""
    return ForkServer(
        scratch,
        [*WARM, *(name for name in OPTIONAL if importlib.util.find_spec(name.split(".")[0]))],
    )


def run_pytest(
    server: ForkServer, root: Path, tests: Sequence[str], limit_seconds: float = LIMIT_SECONDS
) -> tuple[int | None, str]:
    """Run pytest in a copy; return its exit code and last line.

    The exit code is None when the run proves nothing: it hung, or the fault breaks the program.
    """
    # What a test waits for in vain is its failure, before the run counts as one that hung.
    patience = f"{limit_seconds / 5:.0f}"
    code, output = pytest_output(server, root, tests, limit_seconds, TEST_PATIENCE_SECONDS=patience)
    if code is None:
        return None, f"hung for {limit_seconds:.0f} seconds{_place_of(output)}"

    lines = output.strip().splitlines()
    # Such an error fails any test, so it proves nothing about this one.
    clumsy = CLUMSY.search(output)
    if code == FAILED and clumsy:
        return None, f"failed with {clumsy[0]}, which any test would see"
    return code, lines[-1] if lines else "no output"


def _place_of(output: str) -> str:
    """Where a run that hung waited: the innermost frame of the main thread."""
    frames = re.findall(r"most recent call first\):\n +(File .*)", output)
    return f", in {frames[-1]}" if frames else ""


def pytest_output(
    server: ForkServer,
    root: Path,
    arguments: Sequence[str],
    limit_seconds: float,
    **variables: str,
) -> tuple[int | None, str]:
    """Run pytest in a copy up to its first failure: its exit code (None: it hung) and output."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tools'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "FAULT_RUN_NESTED": "1",
        "TEST_SMALLEST_EXAMPLE": "0",
        **variables,
    }
    # A run that hangs says where, before it is ended.
    stacks = f"faulthandler_timeout={0.8 * limit_seconds:.1f}"
    unused = [part for name in UNUSED for part in ("-p", f"no:{name}")]
    command = ["-m", "pytest", "-q", "-x", *unused, "-o", stacks, *arguments]
    job = server.start([command], environment, root, merged=True)
    if not server.wait(job, limit_seconds):
        server.end(job)
        return None, job.text("out")
    (code,) = job.codes
    return code, job.text("out")


def check_mutation(
    server: ForkServer, mutation: Mutation, clean: Path, limit_seconds: float = LIMIT_SECONDS
) -> Outcome:
    """Break a linked copy of `clean` and run the test that must fail there.

    `clean` is a copy of the repository, and in nobody else's hands.
    """
    begun = time.monotonic()
    # Links do not reach over file systems.
    with tempfile.TemporaryDirectory(prefix="mutation_", dir=clean.parent) as directory:
        copy = linked_copy(clean, Path(directory) / "copy")
        try:
            apply(mutation, copy)
        except (ValueError, SyntaxError, OSError) as error:
            return Outcome(mutation, False, time.monotonic() - begun, str(error))
        # A hang proves nothing, and may be the machine's: one that is the fault's comes again.
        for _ in range(2):
            code, detail = run_pytest(server, copy, [mutation.test], limit_seconds)
            if not detail.startswith("hung"):
                break
    return Outcome(mutation, code == FAILED, time.monotonic() - begun, detail)


def check_unbroken(
    server: ForkServer, mutations: Sequence[Mutation], clean: Path
) -> tuple[bool, str]:
    """True when all named tests pass on an unbroken copy; with pytest's last line."""
    with tempfile.TemporaryDirectory(prefix="mutation_", dir=clean.parent) as directory:
        copy = linked_copy(clean, Path(directory) / "copy")
        code, detail = run_pytest(
            server, copy, sorted({mutation.test for mutation in mutations}), 3 * LIMIT_SECONDS
        )
    return code == PASSED, detail


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="mutations whose name contains this"
    )
    parser.add_argument(
        "--required", action="store_true", help="only the mutations that are required"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the table without running anything"
    )
    options = parser.parse_args(arguments)

    chosen = [
        m for m in MUTATIONS if options.only in m.name and (m.required or not options.required)
    ]
    if not chosen:
        parser.error(f"no mutation's name contains {options.only!r}")

    if options.list:
        rows = ((m.name, f"`{m.test}`") for m in chosen)
        print("\n".join(markdown_table(("mutation", "caught by"), rows)))
        return 0
    with (
        tempfile.TemporaryDirectory(prefix="mutation_") as scratch,
        warm_server(Path(scratch)) as server,
    ):
        return check(server, chosen, copy_repository(ROOT, Path(scratch) / "clean"))


def check(server: ForkServer, chosen: Sequence[Mutation], clean: Path) -> int:
    """Check the mutations one after the other and print the table; the exit code."""
    # A test that fails without a mutation would count as a catch.
    passed, detail = check_unbroken(server, chosen, clean)
    print(f"unbroken: {detail}\n", flush=True)
    if not passed:
        print("a named test fails without a mutation, so nothing can be shown", file=sys.stderr)
        return 1

    headings = ("mutation", "test that must fail", "caught", "seconds")
    print("\n".join(markdown_table(headings, [])), flush=True)
    missed = 0
    for mutation in chosen:
        outcome = check_mutation(server, mutation, clean)
        missed += not outcome.caught
        result = "yes" if outcome.caught else f"NO: {outcome.detail}"
        cells = (mutation.name, f"`{mutation.test}`", result, f"{outcome.seconds:.0f}")
        print(markdown_row(cells), flush=True)

    print(f"\n{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
