"""`evaluation/code_run.py` and `tools/code_eval.py`: catches answers beside other problems, results
made twice or not again, and mistakes that are told late.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.evaluation.code_run import CodeRun
from k2train.evaluation.code_sandbox import Sandbox
from k2train.evaluation.code_tasks import completion_of, read_problems
from k2train.evaluation.results import read_items, read_result, read_results, result_paths
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits, Sampling
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_generation import tiny_run

tool = load_tool("code_eval")
# With a context of 16 tokens, and a model that can only be wrong: the second problem is solved
# by any text without an end of line.
PROBLEMS = (
    {"task_id": "t/0", "prompt": "a", "test": "def check(c): pass", "entry_point": "f"},
    {"task_id": "t/1", "prompt": "#", "test": "\ndef check(c): pass", "entry_point": "int"},
    {"task_id": "t/2", "prompt": "#", "test": "\ndef check(c): 1 / 0", "entry_point": "int"},
)


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("code"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


def words(run: Path, file: Path, *more: str) -> list[str]:
    options = ("--samples", "3", "--temperature", "0.8", "--k", "1,2", "--max-tokens", "6")
    return [str(run), "--problems", str(file), "--run-code", *options, *more]


def expected(run: Path, checkpoint: str, sampling: Sampling, samples: int) -> list[tuple[str, ...]]:
    """The completions, each prompt by itself."""
    source = Source.find(run / "checkpoints" / checkpoint)
    model = LanguageModel(source)
    limits = Limits(6, frozenset({2}), source.tokenizer.vocab_size)
    found = []
    for number, problem in enumerate(PROBLEMS):
        ids = tuple(source.tokenizer.encode(problem["prompt"]))
        texts = []
        for sample in range(samples):
            prompt = Prompt(number * 2**20 + sample, problem["prompt"], ids)
            (answer,) = generate(model, [prompt], limits, sampling)
            texts.append(completion_of(source.tokenizer.decode(answer.ids)))
        found.append(tuple(texts))
    return found


def test_scores_of_two_checkpoints(
    run: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches weights of another checkpoint, draws that depend on the batch, a sample beside
    another problem, and a result that is computed although it is there, or kept although it must
    not be.
    """
    assert tool.main(words(run, file, "--checkpoints", "all", "--batch", "2")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["checkpoint", "step", "problems", "pass@1", "pass@2"]
    results = read_results(run)
    assert [line.split()[0] for line in shown[1:]] == [one.checkpoint for one in results]
    assert len(results) > 1 and {one.task for one in results} == {"tiny"}
    for result in results:
        items = read_items(run, result)
        sampling = Sampling(0.8)
        assert [one.generated for one in items] == expected(run, result.checkpoint, sampling, 3)
        assert [one.item for one in items] == ["t/0", "t/1", "t/2"]
        assert [one.scores["pass@1"] for one in items] == [0.0, 1.0, 0.0]
        assert result.scores["pass@2"] == pytest.approx(1 / 3)
        assert result.settings["samples"] == 3 and result.settings["temperature"] == 0.8

    # There for these weights and settings: nothing is computed.
    with monkeypatch.context() as patch:
        patch.setattr(CodeRun, "score", None)
        assert tool.main(words(run, file, "--checkpoints", "all", "--json")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["checkpoint"] for line in lines] == [one.checkpoint for one in results]

    # Another seed, or items that are damaged: made again, that one alone.
    newest = results[-1].checkpoint
    place, lines_of = result_paths(run, "tiny", newest)
    whole = lines_of.read_bytes()
    lines_of.write_bytes(whole[:-5])
    before = place.read_bytes()
    assert tool.main(words(run, file)) == 0
    assert lines_of.read_bytes() == whole and place.read_bytes() == before
    assert tool.main(words(run, file, "--seed", "1")) == 0
    assert read_result(place).settings["seed"] == 1
    assert read_results(run)[0] == results[0]


def test_more_samples_begin_with_the_same_ones(run: Path, file: Path) -> None:
    """Catches draws that are keyed by the number of samples."""
    found = []
    for samples in ("2", "4"):
        options = words(run, file, "--samples", samples, "--task", f"of_{samples}")
        assert tool.main(options) == 0
        (result,) = [one for one in read_results(run) if one.task == f"of_{samples}"]
        found.append([item.generated for item in read_items(run, result)])
    few, many = found
    assert few == [texts[:2] for texts in many] and few != [texts[2:] for texts in many]


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--k", "1,5"], "--k (5) must be from 1 to --samples (3)"),
        (["--k", "x"], "--k (x): must be whole numbers"),
        (["--temperature", "0"], "are all the same: set it above 0"),
        (["--problems", "none.jsonl"], "none.jsonl cannot be read"),
        (["--checkpoints", "99"], "has no 'ckpt_099'"),
        (["--task", "../x"], "--task (../x)"),
    ),
)
def test_a_mistake_is_one_line(
    run: Path, file: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a model that is loaded first."""
    assert tool.main(words(run, file, *more)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_it_must_be_allowed(run: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches code of a model that runs unasked."""
    options = [one for one in words(run, file) if one != "--run-code"]
    assert tool.main(options) == 2
    assert "say --run-code" in capsys.readouterr().err


def test_a_prompt_that_is_too_long(run: Path, file: Path, tmp_path: Path, capsys: Any) -> None:
    """Catches a problem that is cut, and so cannot be solved."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({**PROBLEMS[0], "prompt": "the cat " * 30}) + "\n")
    assert tool.main(words(run, long)) == 2
    assert "t/0 has a prompt of" in capsys.readouterr().err


def test_the_sandbox_decides_the_result(run: Path, file: Path) -> None:
    """Catches a result of a weaker sandbox, or of other limits, that is taken for this one's."""
    code = CodeRun(read_problems(file), 1, (1,), Sampling(), 6, False)
    source = Source.find(run)
    weak, strong = Sandbox.open(allow_weak=True), Sandbox.open(allow_weak=True)
    weak = Sandbox(weak.limits, not strong.namespaces)
    assert code.settings(source, weak) != code.settings(source, strong)
