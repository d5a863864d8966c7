"""`tools/evaluate.py`: catches a table of other results, tracebacks, and a try at the network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from unittest import mock

import pytest

from k2train.evaluation.results import read_results
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.scored import local_tasks, scored_run

evaluate = load_tool("evaluate")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The program sets defaults of libraries in its environment, which is that of all tests."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(pool, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    return tmp_path / "run"


def test_the_table_is_that_of_the_results(
    own: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [
        str(own),
        "--tasks",
        "fixed,texts",
        "--checkpoints",
        "0,2",
        "--task-folder",
        str(tasks),
    ]
    assert evaluate.main([*asked, "--limit", "3"]) == 0
    shown = capsys.readouterr()
    head, *rows = (re.split(r"  +", line.strip()) for line in shown.out.splitlines())
    assert head == ["checkpoint", "step", "fixed (1-shot) acc_norm", "texts bits_per_byte"]
    found = {(one.checkpoint, one.task): one for one in read_results(own)}
    assert [row[0] for row in rows] == ["ckpt_000", "ckpt_002"]
    for name, _, share, bits in rows:
        assert share.startswith(f"{found[name, 'fixed'].scores['acc_norm']:.4f} ± ")
        assert bits.startswith(f"{found[name, 'texts'].scores['bits_per_byte']:.4f}")
    assert found["ckpt_002", "fixed"].items == 3 and "ckpt_002: 2 tasks to do" in shown.err
    # It has learned the words.
    losses = [found[name, "texts"].scores["bits_per_byte"] for name in ("ckpt_000", "ckpt_002")]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--tasks", "texts", "--checkpoints", "7"],
            "has no 'ckpt_007'; it has ckpt_002, ckpt_001, ckpt_000",
        ),
        (
            ["--tasks", "texts", "--tensor", "2"],
            "--tensor (2) x --pipeline (1) = 2 must divide the 1",
        ),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "texts", "--limit", "0"], "must be a whole number of at least 1"),
        (["--tasks", "texts", "--shots", "x"], "must be a whole number from 0, not 'x'"),
        (["--tasks", "broken"], "is not valid YAML"),
        (["--tasks", "wrong"], "wrong.yaml: "),
        (["--tasks", "other_metric"], "loglikelihood_rolling has no score under acc; name another"),
        (["--tasks", "no_target"], "no_target.yaml: can only concatenate str"),
    ],
)
def test_a_mistake_is_one_line(
    own: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    """Catches a traceback, and a half result behind it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.yaml").write_text((tasks / "texts.yaml").read_text())
    away = evaluate.main([str(own), "--tasks", "texts", "--task-folder", str(tmp_path / "none")])
    assert away == 2 and "none is not a folder" in capsys.readouterr().err
    (folder / "broken.yaml").write_text("task: [")
    (folder / "wrong.yaml").write_text("task: wrong\noutput_type: guess\n")
    (folder / "texts.jsonl").write_text((tasks / "texts.jsonl").read_text())
    for name, was, now in (
        ("other_metric", '"bits_per_byte", "aggregation": "bits_per_byte"', '"acc"'),
        ("no_target", '"{{text}}"', '"{{text + 1}}"'),
    ):
        content = (tasks / "texts.yaml").read_text()
        assert was in content
        content = content.replace('"task": "texts"', f'"task": "{name}"')
        (folder / f"{name}.yaml").write_text(content.replace(was, now))
    try:
        code = evaluate.main([str(own), *arguments, "--task-folder", str(folder)])
    except SystemExit as ended:
        code = int(str(ended.code))
    told = capsys.readouterr()
    # Without bars of libraries that these tests import before the tool can silence them.
    lines = [one for one in re.split(r"[\r\n]+", told.err) if one and "/s]" not in one]
    assert code == 2 and len(lines) == 1 and says in lines[0], told.err
    assert told.out == "" and read_results(own) == []


def test_a_missing_package_is_one_line(
    own: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback where lm-eval is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate.main([str(own), "--tasks", "texts", "--task-folder", str(tasks)]) == 2
    told = capsys.readouterr().err
    assert "pip install 'k2train[eval]'" in told and told.count("\n") == 1


def test_a_package_of_its_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a task that imports the package `evaluate`, and gets this program."""
    tools = ROOT / "tools"
    monkeypatch.setattr(sys, "path", [str(tools), f"{tools}/", *sys.path])
    before = list(sys.path)
    with evaluate.own_folder_hidden():
        found = PathFinder.find_spec("evaluate", sys.path)
    assert found is None or Path(str(found.origin)).parent != tools
    assert sys.path == before


def test_arguments_are_checked_before_the_harness_is_imported(tmp_path: Path) -> None:
    """Catches seconds of imports in front of a mistake."""
    program = (
        "import sys, evaluate; code = evaluate.main(sys.argv[1:]); "
        "loaded = {'torch', 'lm_eval', 'datasets'} & set(sys.modules); "
        "sys.exit(code if not loaded else 9)"
    )
    asked = [str(tmp_path), "--tasks", "demo"]
    done = subprocess.run(
        [sys.executable, "-c", program, *asked],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "has no checkpoints" in done.stderr, done.stderr


def test_data_that_are_not_here_are_named(
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Catches a try at the network, and a line that names no data set."""
    import socket

    def refused(*_: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    (tmp_path / "away.yaml").write_text(
        "task: away\ndataset_path: nobody/such-a-data-set\noutput_type: loglikelihood_rolling\n"
        "test_split: test\ndoc_to_target: text\n"
    )
    assert evaluate.main([str(own), "--tasks", "away", "--task-folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "nobody/such-a-data-set" in told and "--download" in told, told
    assert told.count("\n") == 1
