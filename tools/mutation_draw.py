"""Drawn mutations: break the code at random places, one edit at a time; does any test notice?

    python tools/mutation_draw.py [--count N] [--seed S] [--only TEXT] [--record FILE]
                                   [--emulated-cuda] [--list]

- The places are in what computes numbers: parallel, model, optim, engine, data order and loader,
  checkpoint load. `mutation_places.py` says what an edit is.
- Tests run in stages, until one fails: those of the file, those that import it, those of the
  modules that import it, whole runs against code that is not ours; then the slow ones of the first
  and the last kind. With --emulated-cuda those under emulated CUDA, too; they need
  K2TRAIN_CUDA_PYTHON.
- An edit with which the package cannot be imported is not counted, and another one is drawn.
- A test that hangs notices too, after some minutes.
- `--record` keeps each result as a line of JSON, and the next start goes on behind the last one.
- An edit that survives is a missing test, or changes nothing that can be computed.

Exit codes: 0 every edit was noticed; 1 one survived; 2 a usage error.
"""

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import Parser, command, positive

from fault_tests.processes import ForkServer
from k2train.text import markdown_row, markdown_table
from mutation_check import FAILED, PASSED, ROOT, copy_repository, pytest_output, warm_server
from mutation_places import Edit, edits_of

DRAWN_FROM = (
    "k2train/parallel",
    "k2train/model",
    "k2train/optim",
    "k2train/train/engine.py",
    "k2train/data/order.py",
    "k2train/data/loader.py",
    "k2train/data/document_boundaries.py",
    "k2train/checkpoint/load.py",
    "k2train/checkpoint/reshard_read.py",
    "k2train/checkpoint/shards.py",
    "k2train/checkpoint/piece_check.py",
)
NOT_ON_A_CPU = (
    "k2train/model/kernels/fp8.py",
    "k2train/model/kernels/optional.py",
    "k2train/parallel/symmetric_memory.py",
)
"""Left out, as text with `cuda` in it: needs an accelerator, or a package that only one has."""
WHOLE = (
    "tests/model/test_hugging_face.py",
    "tests/system/test_independent_run.py",
    "tests/train/test_engine.py",
    "tests/laws/test_layout_law.py",
    "tests/laws/test_record_law.py",
    "tests/train/test_train.py",
)
"""Tests of whole steps and whole runs, for every file."""
EMULATED = "tests/emulated_cuda/test_engine.py"
"""Steps under emulated CUDA: what only an accelerator runs."""
LIMIT_SECONDS = 900.0
HANG_SECONDS = "120"
"""How long a test waits for processes that an edit may have locked."""
NOTICED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Drawn:
    """Result of one edit: the test that noticed it, "" for none."""

    name: str
    old: str
    new: str
    noticed_by: str
    seconds: float


class BrokenPackageError(Exception):
    """With an edit the package cannot be imported, so it proves nothing about a test."""


def drawn_edits(root: Path, seed: int) -> Iterator[Edit]:
    """Every edit in an order that `seed` alone decides; at most one of a line."""
    paths = [
        path
        for name in DRAWN_FROM
        for path in ([root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py")))
    ]
    files = [path.relative_to(root).as_posix() for path in paths]
    found = [edit for file in files if file not in NOT_ON_A_CPU for edit in edits_of(root, file)]

    random.Random(seed).shuffle(found)
    seen = set()
    for edit in found:
        if (edit.file, edit.line) not in seen and not edit.is_the_same:
            seen.add((edit.file, edit.line))
            yield edit


def stages_of(root: Path, file: str, emulated: bool = False) -> list[list[str]]:
    """Arguments of pytest, stage by stage: the file's own tests, its importers', whole runs."""
    path = Path(file)
    module = ".".join(path.with_suffix("").parts)
    imports = re.compile(rf"^\s*(?:from|import) {re.escape(module)}\b", re.MULTILINE)

    def importers(folder: str, pattern: str) -> list[Path]:
        found = sorted((root / folder).rglob(pattern))
        users = [one for one in found if imports.search(one.read_text(encoding="utf-8"))]
        return [one.relative_to(root) for one in users]

    own, users = own_tests(path), importers("k2train", "*.py")
    first = [own] if (root / own).exists() else []
    tests = [test.as_posix() for test in importers("tests", "test_*.py")]
    second = [test for test in tests if test not in (*first, *WHOLE)]
    known = {*first, *second, *WHOLE}
    third = [test for test in map(own_tests, users) if test not in known and (root / test).exists()]
    last = [test for test in WHOLE if test not in first and (root / test).exists()]
    device = [EMULATED] if emulated else []

    quick = [[*s, "-m", "not slow"] for s in (first, second, third, last, device) if s]
    return [*quick, [*first, *last, "-m", "slow"]]


def own_tests(path: Path) -> str:
    """The file of a module's own tests."""
    return f"tests/{'/'.join(path.parts[1:-1])}/test_{path.stem}.py"


def check_edit(server: ForkServer, edit: Edit, root: Path = ROOT, emulated: bool = False) -> Drawn:
    """Break a fresh copy and run its tests, stage by stage, until one notices.

    Raises BrokenPackageError when the package cannot be imported.
    """
    begun, noticed = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="mutation_") as directory:
        copy = copy_repository(root, Path(directory) / "copy")
        try:
            edit.apply(copy)
        except SyntaxError as error:
            raise BrokenPackageError(str(error)) from None

        for tests in stages_of(root, edit.file, emulated):
            code, output = pytest_output(
                server, copy, tests, LIMIT_SECONDS, TEST_PATIENCE_SECONDS=HANG_SECONDS
            )
            if "error during collection" in output or "ImportError while loading" in output:
                raise BrokenPackageError(output[-300:])
            if code is None:
                noticed = f"a hang in {tests[0]}"
            elif code == FAILED:
                found = NOTICED.search(output)
                noticed = found[1] if found else tests[0]
            if noticed:
                break
    return Drawn(edit.name, edit.old, edit.new, noticed, round(time.monotonic() - begun, 1))


def check_unbroken(server: ForkServer, results: Sequence[Drawn], root: Path = ROOT) -> str:
    """Run the tests that noticed anything on an unbroken copy; "" when all pass.

    A test that fails anyway has noticed nothing.
    """
    tests = {result.noticed_by for result in results if "::" in result.noticed_by}
    with tempfile.TemporaryDirectory(prefix="mutation_") as directory:
        copy = copy_repository(root, Path(directory) / "copy")
        code, output = pytest_output(server, copy, sorted(tests), 4 * LIMIT_SECONDS)
    return "" if code == PASSED or not tests else output[-1500:]


def recorded(path: Path | None) -> list[Drawn]:
    """Results of earlier starts."""
    if path is None or not path.exists():
        return []
    return [Drawn(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(text: str) -> str:
    """A piece of code in a cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"


def table(results: Sequence[Drawn]) -> list[str]:
    """The results as a Markdown table."""
    rows = [
        (
            result.name.removeprefix("k2train/"),
            shown(result.old),
            shown(result.new),
            result.noticed_by.removeprefix("tests/").replace("|", "\\|") or "**nothing**",
        )
        for result in results
    ]
    return markdown_table(("place", "was", "became", "noticed by"), rows)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--count", type=positive, default=60, metavar="N", help="edits (60)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the draw (1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="edits whose file has this")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep results, and go on")
    parser.add_argument(
        "--emulated-cuda", action="store_true", help="also run the tests under emulated CUDA"
    )
    parser.add_argument("--list", action="store_true", help="print the edits, and exit")
    options = parser.parse_args(arguments)

    drawn = (edit for edit in drawn_edits(ROOT, options.seed) if options.only in edit.file)
    if options.list:
        chosen = [edit for _, edit in zip(range(options.count), drawn, strict=False)]
        print("\n".join(table([Drawn(e.name, e.old, e.new, "-", 0.0) for e in chosen])))
        return 0

    results = recorded(options.record)
    known = {(result.name, result.new) for result in results}
    with (
        tempfile.TemporaryDirectory(prefix="mutation_") as scratch,
        warm_server(Path(scratch)) as server,
    ):
        for edit in drawn:
            if len(results) >= options.count:
                break
            if (edit.name, edit.new) in known:
                continue
            try:
                result = check_edit(server, edit, emulated=options.emulated_cuda)
            except BrokenPackageError:
                print(f"not counted: {edit.name}", file=sys.stderr, flush=True)
                continue
            results.append(result)
            print(markdown_row((result.name, result.noticed_by or "NOTHING")), flush=True)
            if options.record is not None:
                with options.record.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(result)) + "\n")
        problem = check_unbroken(server, results)

    survived = [result for result in results if not result.noticed_by]
    print("\n".join(["", *table(results)]))
    print(f"\n{len(results) - len(survived)} of {len(results)} noticed")
    if problem:
        print(f"a test that noticed one fails without it too:\n{problem}", file=sys.stderr)
    return 1 if survived or problem else 0


if __name__ == "__main__":
    sys.exit(main())
