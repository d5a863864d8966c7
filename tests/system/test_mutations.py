"""The table of faults: each can still be made, the short list is caught, and the tool cannot call a
miss a catch.
"""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "mutation_check.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutation_check", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = _load()
REQUIRED = [mutation for mutation in tool.MUTATIONS if mutation.required]
QUICK = REQUIRED[:1]
"""Checked in the quick tests too: one stands for all."""


@pytest.mark.parametrize("mutation", tool.MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_each_mutation_can_be_made(mutation: Any) -> None:
    """Catches a table left behind by the code: a text that is gone or doubled, a test that was
    renamed.
    """
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, (
        f"{mutation.file} has it {source.count(mutation.old)} times"
    )
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")
    path, _, name = mutation.test.partition("::")
    defined = [
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert name.split("[")[0] in defined, f"{path} has no {name}"


def test_names_are_unique_and_the_short_list_is_whole() -> None:
    """Catches a fault dropped from the short list: it must stay with the five kinds that were asked
    for.
    """
    names = [mutation.name for mutation in tool.MUTATIONS]
    assert len(set(names)) == len(names)
    text = " ".join(mutation.name for mutation in REQUIRED)
    for kind in (
        "norm gradients",
        "micro-batches",
        "data-parallel average",
        "maximum",
        "global norm",
    ):
        assert kind in text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A warm process without the repository, from which every run of this file is forked."""
    with tool.warm_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, of which every run of this file has links."""
    copied: Path = tool.copy_repository(ROOT, tmp_path_factory.mktemp("repository") / "clean")
    return copied


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of one function and its tests, so that the tool's own answers are quick."""
    root = tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "toy.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a  # 2 * a\n"
    )
    (root / "tests" / "test_toy.py").write_text(
        "import time\nfrom toy import add, twice\n\ndef test_add():\n    assert add(1, 2) == 3\n\n"
        "def test_weak():\n    assert twice(0) == 0\n\n"
        "def test_slow():\n    time.sleep(add(2, -2) * 1000)\n"
    )
    return root


def mutation_of(old: str, new: str, test: str = "tests/test_toy.py::test_add") -> Any:
    return tool.Mutation("toy", "toy.py", old, new, test)


@pytest.mark.parametrize(
    ("old", "new", "test", "caught", "detail"),
    (
        ("a + b", "a - b", "test_add", True, "1 failed"),
        ("return 2 * a ", "return 3 * a ", "test_weak", False, "1 passed"),
        ("a * b", "a", "test_add", False, "occurs 0 times in toy.py"),
        ("2 * a", "a", "test_weak", False, "occurs 2 times in toy.py"),
        ("a + b", "a +", "test_add", False, "invalid syntax"),
        ("def add", "def sub", "test_add", False, "no collectors"),
        ("a + b", "a + c", "test_add", False, "failed with NameError"),
        ("a + b", "a - b", "test_gone", False, "no match in any of"),
        ("a + b", "a - b", "test_slow", False, "hung for 6 seconds"),
    ),
    ids=(
        "caught",
        "survived",
        "gone",
        "doubled",
        "syntax",
        "collection",
        "clumsy",
        "no-such-test",
        "hung",
    ),
)
def test_only_a_failing_test_is_a_catch(
    server: Any, repository: Path, old: str, new: str, test: str, caught: bool, detail: str
) -> None:
    """Catches a tool that takes any non-zero exit for success: then a typo in the table would pass
    for proof.
    """
    before = (repository / "toy.py").read_text()
    limit = 6.0 if "hung" in detail else tool.LIMIT_SECONDS
    outcome = tool.check_mutation(
        server, mutation_of(old, new, f"tests/test_toy.py::{test}"), repository, limit
    )
    assert outcome.caught is caught and detail in outcome.detail, outcome
    assert (repository / "toy.py").read_text() == before, "the repository itself was broken"


def test_a_test_that_is_red_anyway_is_no_proof(server: Any, repository: Path) -> None:
    """Catches a baseline that is not looked at."""
    assert tool.check_unbroken(server, [mutation_of("a + b", "a - b")], repository)[0]
    (repository / "toy.py").write_text(
        "def add(a, b):\n    return 7\n\n\ndef twice(a):\n    return a\n"
    )
    assert not tool.check_unbroken(server, [mutation_of("7", "8")], repository)[0]


def test_list_and_usage() -> None:
    """Catches a list that runs tests, and a name that matches nothing taken for success."""
    listed = subprocess.run(
        [sys.executable, str(TOOL), "--list"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == len(tool.MUTATIONS) + 2
    nothing = subprocess.run(
        [sys.executable, str(TOOL), "--only", "zzz"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert nothing.returncode == 2 and "no mutation's name contains 'zzz'" in nothing.stderr


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            mutation,
            id=mutation.name.replace(" ", "-"),
            marks=[] if mutation in QUICK else pytest.mark.slow,
        )
        for mutation in tool.MUTATIONS
    ],
)
def test_every_mutation_is_caught(server: Any, clean: Path, mutation: Any) -> None:
    """Catches a suite that one of the known faults of training code passes through."""
    outcome = tool.check_mutation(server, mutation, clean)
    assert outcome.caught, f"{mutation.test} does not see it: {outcome.detail}"
