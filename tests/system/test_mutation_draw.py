"""Drawn mutations: the edits are small and whole, and only a failing test counts as a notice."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_corpus import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import mutation_draw as tool

from mutation_check import warm_server
from mutation_places import Edit, edits_of

SOURCE = '''"""What 1 + 1 is."""

import os

LIMIT: int | None = 5


def half(é: float, by: int = 2, *, fast: bool = True) -> float | None:
    """Half of 3 - 1."""
    assert by != 0, f"by {1 + 1}"
    if by < 0 or not fast:
        raise ValueError("no" + str(1 - by))
    os.stat(".")
    total = max(é, -1)
    total += é[1:by]
    return total / by
'''
EDITS = {
    ("number", "5", "6"),
    ("number", "2", "3"),
    ("true / false", "True", "False"),
    ("condition", "by < 0 or not fast", "(not (by < 0 or not fast))"),
    ("and / or", "by < 0 or not fast", "(by < 0 and (not fast))"),
    ("comparison", "by < 0", "(by <= 0)"),
    ("number", "0", "1"),
    ("negation", "not fast", "(fast)"),
    ("statement left out", 'os.stat(".")', "pass"),
    ("arguments swapped", "max(é, -1)", "(max(-1, é))"),
    ("min / max", "max", "(min)"),
    ("sign", "-1", "(1)"),
    ("number", "1", "2"),
    ("statement left out", "total += é[1:by]", "pass"),
    ("arithmetic", "total += é[1:by]", "total -= é[1:by]"),
    ("slice", "é[1:by]", "(é[:by])"),
    ("slice", "é[1:by]", "(é[1:])"),
    ("arithmetic", "total / by", "(total * by)"),
}


def test_every_edit_of_a_file_and_no_other(tmp_path: Path) -> None:
    """Catches an edit of an assertion, a message, an annotation or a docstring, which no test could
    notice, and one at the wrong place behind a letter of two bytes.
    """
    (tmp_path / "half.py").write_text(SOURCE, encoding="utf-8")
    edits = edits_of(tmp_path, "half.py")
    assert {(edit.kind, edit.old, edit.new) for edit in edits} == EDITS
    for edit in edits:
        edit.apply(tmp_path)
        assert (tmp_path / "half.py").read_text(encoding="utf-8") != SOURCE
        (tmp_path / "half.py").write_text(SOURCE, encoding="utf-8")


def test_an_edit_that_changes_nothing_is_not_drawn(tmp_path: Path) -> None:
    """Catches two equal arguments that are swapped, which no test could notice."""
    (tmp_path / "file.py").write_text("a = x.narrow(0,  0, n)\nb = y.narrow(0, 1, n)\n")
    swapped = [edit for edit in edits_of(tmp_path, "file.py") if edit.kind == "arguments swapped"]
    assert [(edit.line, edit.is_the_same) for edit in swapped] == [(1, True), (2, False)]
    assert not any(
        edit.is_the_same for _, edit in zip(range(99), tool.drawn_edits(ROOT, 1), strict=False)
    )


def test_the_draw_is_that_of_its_seed_and_over_all_rooms() -> None:
    first, again, other = (
        [edit for edit, _ in zip(tool.drawn_edits(ROOT, seed), range(200), strict=False)]
        for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert len({(edit.file, edit.line) for edit in first}) == 200
    rooms = {edit.file.split("/")[1] for edit in first}
    assert rooms == {"parallel", "model", "optim", "train", "data", "checkpoint"}
    assert not {edit.file for edit in first} & set(tool.NOT_ON_A_CPU)


def test_tests_of_a_file_come_first_and_whole_runs_last() -> None:
    stages = tool.stages_of(ROOT, "k2train/optim/adamw.py")
    assert stages[0] == ["tests/optim/test_adamw.py", "-m", "not slow"]
    assert "tests/optim/test_adamw.py" not in stages[1]
    assert set(tool.WHOLE) <= set(stages[-2]) and stages[-1][-2:] == ["-m", "slow"]
    assert all((ROOT / test).exists() for test in tool.WHOLE)

    # `load` imports it, and golden checkpoints are read in the tests of `load` alone.
    stages = tool.stages_of(ROOT, "k2train/checkpoint/reshard_read.py")
    assert "tests/checkpoint/test_load.py" in {test for stage in stages for test in stage}
    stages = tool.stages_of(ROOT, "k2train/optim/adamw.py", emulated=True)
    assert [tool.EMULATED, "-m", "not slow"] in stages
    assert (ROOT / tool.EMULATED).exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with warm_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package of one module, and a test that looks at half of it."""
    root = tmp_path / "repository"
    for folder in ("k2train/optim", "tests/optim"):
        (root / folder).mkdir(parents=True)
    (root / "k2train" / "optim" / "toy.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef unseen(a):\n    return a * 2\n\n\nX = [3][0]\n"
    )
    (root / "tests" / "optim" / "test_toy.py").write_text(
        "from k2train.optim.toy import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    return root


def edit_of(repository: Path, old: str, kind: str) -> Edit:
    edits = edits_of(repository, "k2train/optim/toy.py")
    (found,) = [edit for edit in edits if (edit.old, edit.kind) == (old, kind)]
    return found


@pytest.mark.parametrize(
    ("old", "kind", "noticed"),
    (("a + b", "arithmetic", "tests/optim/test_toy.py::test_add"), ("a * 2", "arithmetic", "")),
)
def test_what_a_test_notices_and_what_none_does(
    server: Any, repository: Path, old: str, kind: str, noticed: str
) -> None:
    before = (repository / "k2train" / "optim" / "toy.py").read_text()
    result = tool.check_edit(server, edit_of(repository, old, kind), repository)
    assert result.noticed_by == noticed
    assert (repository / "k2train" / "optim" / "toy.py").read_text() == before
    assert "**nothing**" in tool.table([result])[-1] or noticed


def test_a_package_that_cannot_be_imported_proves_nothing(server: Any, repository: Path) -> None:
    with pytest.raises(tool.BrokenPackageError):
        tool.check_edit(server, edit_of(repository, "0", "number"), repository)


def test_a_test_that_fails_anyway_has_noticed_nothing(server: Any, repository: Path) -> None:
    result = tool.check_edit(server, edit_of(repository, "a + b", "arithmetic"), repository)
    assert tool.check_unbroken(server, [result], repository) == ""
    (repository / "k2train" / "optim" / "toy.py").write_text("def add(a, b):\n    return 7\n")
    assert "1 failed" in tool.check_unbroken(server, [result], repository)
