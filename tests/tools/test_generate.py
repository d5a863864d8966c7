"""`tools/generate.py`: catches answers beside the wrong prompts, and tracebacks."""

import io
import json
from pathlib import Path

import pytest

from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits
from k2train.inference.prompts import encode_prompts
from k2train.inference.source import Source
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_generation import tiny_run

generate_tool = load_tool("generate")
TEXTS = ["the cat", "a do", ""]


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("generate"))


def _expected(run: Path, texts: list[str], max_tokens: int = 100) -> list[str]:
    source = Source.find(run)
    limits = Limits(max_tokens, frozenset({2}), source.tokenizer.vocab_size)
    prompts = encode_prompts(source.tokenizer, texts, source.context_tokens)
    answers = generate(LanguageModel(source), prompts, limits)
    return [source.tokenizer.decode(answer.ids) for answer in answers]


def test_prompts_are_answered_in_their_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an answer beside the wrong prompt, and one that is missing."""
    expected = _expected(run, TEXTS)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(text)}\n" for text in TEXTS))
    assert generate_tool.main([str(run), "--prompts", str(file), "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert out == "".join(f"{text}{more}\n" for text, more in zip(TEXTS, expected, strict=True))

    asked = [word for text in TEXTS for word in ("--prompt", text)]
    assert generate_tool.main([str(run), *asked, "--json", "--max-tokens", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["prompt"]) for line in lines] == list(enumerate(TEXTS))
    assert [line["text"] for line in lines] == _expected(run, TEXTS, 4)
    assert {len(line["ids"]) for line in lines if line["finish"] == "max_tokens"} <= {4}


def test_a_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a stream that differs from the answer, and a mistake that ends the conversation."""
    long = "a dog ran to the cat " * 9
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the cat\n{long}\na do"))
    assert generate_tool.main([str(run), "--interactive", "--max-tokens", "6"]) == 0
    first, last = _expected(run, ["the cat", "a do"], 6)
    captured = capsys.readouterr()
    assert captured.out == f"the cat{first}\na do{last}\n"
    assert "--truncate" in captured.err and captured.err.count("\n") == 1


def test_a_long_prompt_can_be_cut(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches --truncate that leaves no room for the answer."""
    options = [str(run), "--prompt", "a dog ran to the cat " * 9, "--max-tokens", "4", "--json"]
    assert generate_tool.main(options) == 2
    assert "--truncate" in capsys.readouterr().err
    assert generate_tool.main([*options, "--truncate"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 12


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        (["--prompt", "a", "--tensor", "2"], "2 processes, and 1 were started"),
        (["--prompt", "a", "--top-k", "3"], "--temperature above 0"),
        (["--prompts", "/none"], "No such file"),
        (["--prompt", "a", "--tokenizer", "/none"], "cannot be read as tokenizer.model"),
    ),
)
def test_a_mistake_is_one_line(
    run: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a mistake that costs the import of torch."""
    assert generate_tool.main([str(run), *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
