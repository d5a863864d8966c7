"""`tools/chat.py` with a model trained on chat data: catches a lost history, and wrong targets."""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.chat.talk import encoder_of
from k2train.inference.source import Source
from tests.support.chat import messages_of
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_chat import GLOBAL, chat_data, chat_run, chat_tree
from tests.support.tiny_corpus import train, write_yaml
from tests.support.tiny_generation import peer_of, tiny_run

chat = load_tool("chat")


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_run(pool, tmp_path_factory.mktemp("chat"))


def _answers(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    assert chat.main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_conversation_keeps_its_history(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a second question that is asked as if it were the first, and other tokens."""
    options = [run, "--system", "sat", "--max-tokens", 5]
    first, second = _answers(capsys, *options, "--message", "the cat", "--message", "a dog")
    encoder = encoder_of(Source.find(run))
    turns = [("system", "sat"), ("user", "the cat")]
    expected = encoder.prompt(messages_of(turns))
    assert first["prompt_tokens"] == len(expected)
    assert first["ids"] == _greedy(run, expected, 5)
    turns += [("assistant", first["text"]), ("user", "a dog")]
    expected = encoder.prompt(messages_of(turns))
    assert second["prompt_tokens"] == len(expected)
    assert second["ids"] == _greedy(run, expected, 5)


def _greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by transformers, up to a marker or `</s>`."""
    source = Source.find(run)
    peer, ids = peer_of(source), list(prompt)
    markers = {source.tokenizer.special_id(n) for n in source.tokenizer.specials[-4:]}
    for _ in range(count):
        with torch.no_grad():
            logits = peer(torch.tensor([ids])).logits[0, -1, : source.tokenizer.vocab_size]
        if (token := int(logits.argmax())) in {2, *markers}:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_lines_of_stdin(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistake that ends the conversation, and a full context that is not told."""
    lines = ["the cat", "", "a dog ran to the mat " * 30, *["the cat ran"] * 4]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert chat.main([str(run), "--max-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 5
    told = captured.err.splitlines()
    assert sum("shorten it" in line for line in told) == 1
    assert any("dropped 1 turn at the beginning" in line for line in told)
    assert "Traceback" not in captured.err

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main([str(run)]) == 0
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback at the end of a conversation."""

    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert chat.main([str(run)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_checkpoint_of_other_data(
    pool: GlooPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a base model that is talked to by a template it never saw."""
    base = tiny_run(pool, tmp_path)
    for options, told in (
        ([], "was no chat data"),
        (["--template", "k2"], "its tokenizer lacks <|endofsystemprompt|>"),
    ):
        assert chat.main([str(base), "--message", "a", *options]) == 2
        err = capsys.readouterr().err
        assert told in err and "--template" in err and err.count("\n") == 1


def test_the_loss_is_that_of_transformers(run: Path) -> None:
    """Catches a mask that is dropped or shifted, and a mean of means: -100 labels, by transformers.

    Attention is blocked between conversations here; transformers gets each one alone.
    """
    source = Source.find(run / "checkpoints" / "ckpt_000")
    peer = peer_of(source)
    folder = run.parents[1] / "data"
    ids = np.load(folder / "chunk_000.npy")[:GLOBAL].astype(np.int64)
    packed = np.load(folder / "chunk_000.mask.npy")[:GLOBAL]
    learned = np.unpackbits(packed, axis=1, bitorder="little")[:, : ids.shape[1]].astype(bool)
    ends = source.tokenizer.special_id("<|endofchat|>")

    total, count = 0.0, 0
    for row, mask in zip(ids, learned, strict=True):
        cuts = [0, *(np.flatnonzero(row == ends) + 1).tolist()]
        for start, end in pairwise(cuts):
            labels = np.where(mask[start:end], row[start:end], -100)
            with torch.no_grad():
                # Its mean over the labels that are not -100; it shifts them itself.
                loss = peer(
                    torch.tensor(row[None, start:end]), labels=torch.tensor(labels[None])
                ).loss
            total += float(loss) * int((labels != -100).sum())
            count += int((labels != -100).sum())
    first = step_rows(run / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(total / count, rel=2e-5)
    assert count == int(learned.sum()) > 30


def test_training_refuses_what_does_not_belong(run: Path, tmp_path: Path) -> None:
    """Catches masks that are ignored without a word, and a parent with another tokenizer."""
    manifest = run.parents[1] / "data" / "manifest.json"
    unsaid = chat_tree(manifest, tmp_path / "runs", "unsaid", data__loss_mask="none")
    done = train(write_yaml(tmp_path / "unsaid.yaml", unsaid))
    assert done.returncode == 2 and "data.loss_mask" in done.stderr
    assert done.stderr.count("\n") == 1

    other = chat_data(tmp_path / "other", specials=("<|more|>",), seed=5)
    tree = chat_tree(other, tmp_path / "runs", "other", run__init_from=str(run))
    done = train(write_yaml(tmp_path / "more.yaml", tree), "run.stop_after_steps=1")
    # More markers behind are an extension, which may follow.
    assert done.returncode == 75, done.stderr
    tree = chat_tree(
        manifest,
        tmp_path / "runs",
        "back",
        run__init_from=str(tmp_path / "runs/other/checkpoints/ckpt_000_step_000001"),
        data__seen_before="allow",
    )
    done = train(write_yaml(tmp_path / "back.yaml", tree), "run.stop_after_steps=1")
    assert done.returncode == 2 and "tokenizer" in done.stderr and done.stderr.count("\n") == 1
