"""`tools/gallery.py`: other answers than `generate.py` gives, work done twice, a traceback."""

import json
import shutil
from pathlib import Path

import pytest

from k2train.inference import session
from tests.support import forkserver
from tests.support.command_line import TOOLS, load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import environment
from tests.support.tiny_gallery import choice_item, make_result
from tests.support.tiny_generation import tiny_run

tool, generate_tool = load_tool("gallery"), load_tool("generate")
TEXTS = ["the cat", "a do"]


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("gallery_tool"))


def asked(*more: str) -> list[str]:
    return [*(word for text in TEXTS for word in ("--prompt", text)), "--max-tokens", "5", *more]


def kept(run: Path, name: str) -> list[str]:
    lines = (run / "gallery" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_answers_are_those_of_generate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches another choice of tokens, weights or prompts, and a second call that asks again."""
    warm = asked("--temperature", "0.8", "--seed", "3")
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    for options in (asked(), warm):
        for path in (run / "gallery").glob("*"):
            path.unlink()
        assert tool.main([str(run), *options, "--out", str(run.parent / "site")]) == 0
        told = capsys.readouterr()
        assert told.err.splitlines()[: len(names)] == [f"{name}: 2 answers" for name in names]
        for name in names:
            assert generate_tool.main([str(run / "checkpoints" / name), *options, "--json"]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert kept(run, name) == [json.loads(line)["text"] for line in lines]

    before = {path: path.read_bytes() for path in (run.parent / "site").rglob("*.*")}
    again = ["--out", str(run.parent / "site"), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load", None)
        assert tool.main([str(run), *again]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["checkpoints"], facts["prompts"], facts["tasks"]) == (len(names), 2, 0)
    assert {path: path.read_bytes() for path in (run.parent / "site").rglob("*.*")} == before


def test_evaluations_need_no_prompt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a model that is read to show what is on record."""
    bare = tmp_path / "bare"
    make_result(bare, "quiz", 1, [choice_item(0, 0, [-1.0, -2.0])])
    assert tool.main([str(bare)]) == 0
    page = bare / "gallery" / "pages" / "index.html"
    assert capsys.readouterr().out.startswith(f"{page}: 1 checkpoint, 0 prompts, 1 task, ")
    assert not (bare / "gallery" / "asked.json").exists()


@pytest.mark.parametrize(
    "options, word",
    (
        ((), "nothing to show yet; give --prompts"),
        (("--seed", "3"), "--seed belongs to a question"),
        (("--prompt", "x", "--top-p", "0.5"), "temperature 0 takes the most likely"),
        (("--prompt", "x " * 200), "prompt 1 has"),
        (("--prompt", "x", "--checkpoints", "77"), "has no 'ckpt_077'"),
        (("--prompt", "x", "--tensor", "2"), "2 processes, and 1 were started"),
        (("--prompts", "none.txt"), "none.txt cannot be read"),
        (("--prompt", "x", "--out", "/proc"), "has files and is no gallery"),
    ),
)
def test_mistakes_are_one_line(
    run: Path, options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a file that a mistake leaves."""
    for path in (run / "gallery").glob("*"):
        path.unlink()
    before = sorted(run.rglob("*"))
    assert tool.main([str(run), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_that_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches answers of flipped weights."""
    path = next((run / "checkpoints" / "ckpt_000" / "model").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tool.main([str(run), *asked(), "--checkpoints", "0"]) == 2
    path.write_bytes(content)
    (line,) = capsys.readouterr().err.splitlines()
    assert path.name in line
    assert not (run / "gallery" / "ckpt_000.jsonl").exists()


def test_two_ranks_answer_every_checkpoint(run: Path) -> None:
    """Catches a second checkpoint whose ranks do not meet, answers written once a rank, and ranks
    that wait for one that could not write.
    """
    shutil.rmtree(run / "gallery", ignore_errors=True)
    (run / "gallery").write_text("no folder")
    command = [TOOLS / "gallery.py", run, *asked("--tensor", "2", "--out", str(run.parent / "two"))]
    done = forkserver.run(command, environment(), processes=2)
    assert done.returncode == 1
    lines = {line for line in done.stderr.splitlines() if "gallery" in line}
    assert lines == {f"{run / 'gallery'} cannot be written: File exists"}, done.stderr
    assert "Traceback" not in done.stderr

    (run / "gallery").unlink()
    done = forkserver.run(command, environment(), processes=2)
    assert done.returncode == 0, done.stderr
    for path in (run / "checkpoints").iterdir():
        assert len(kept(run, path.name)) == 2
