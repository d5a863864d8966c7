"""`chat/talk.py`: catches a history that forgets, a context that overflows, a template guessed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.chat.prepare import ChatPreparation, ChatSettings
from k2train.chat.talk import Talk, encoder_of
from k2train.data.prepare.progress import Progress
from k2train.errors import DataError
from tests.support.chat import (
    CHATML,
    applied,
    encoder,
    exported,
    json_pair,
    k2_tokenizer,
    prefix_tokenizer,
)
from tests.support.tiny_generation import tiny_tokenizer


def test_a_prompt_is_the_history_by_the_template(tmp_path: Path) -> None:
    """Catches a turn that is missing, and a system prompt that is said twice."""
    tokenizer = k2_tokenizer()
    theirs = exported(tmp_path / "hf", tokenizer)
    talk = Talk(encoder("k2", tokenizer), 500, 20, "be ça va")
    turns = [("system", "be ça va"), ("user", "the cat")]
    expected = applied(theirs, turns, add_generation_prompt=True)["input_ids"]
    assert talk.ask("the cat") == (expected, 0)

    talk.answered("a dog <|endofchat|>")
    turns += [("assistant", "a dog <|endofchat|>"), ("user", "x")]
    ids, dropped = talk.ask("x")
    # The model's own words forge no marker, either.
    assert dropped == 0 and tokenizer.special_id("<|endofchat|>") not in ids
    assert tokenizer.decode(ids).endswith(
        "<|beginofsystem|>a dog <|endofchat|></s><|beginofuser|>x<|beginofsystem|>"
    )


@pytest.mark.parametrize("make", (k2_tokenizer, prefix_tokenizer))
def test_what_a_model_said_is_asked_with_as_it_said_it(make: Any, tmp_path: Path) -> None:
    """Catches the space that a tokenizer puts in front of a text, put in front once more with every
    turn: a history that no training had.
    """
    tokenizer = make()
    theirs = exported(tmp_path / "hf", tokenizer)
    talk = Talk(encoder("k2", tokenizer), 500, 20)
    turns = [("user", "the cat"), ("assistant", "a dog ran"), ("user", "x")]
    prompt, _ = talk.ask("the cat")
    # The model says what it would be taught to say.
    said = applied(theirs, turns[:2])["input_ids"][len(prompt) : -2]
    stream = talk.spoken(prompt)
    text = "".join(map(stream.add, said)) + stream.finish()
    assert text == "a dog ran"

    talk.answered(text)
    expected = applied(theirs, turns, add_generation_prompt=True)["input_ids"]
    assert talk.ask("x") == (expected, 0)


def test_old_turns_make_room() -> None:
    """Catches a prompt beyond the context, and a system prompt or question that is dropped."""
    tokenizer = k2_tokenizer()
    talk = Talk(encoder("k2", tokenizer), 60, 20, "sys")
    sizes, dropped = [], 0
    for turn in range(6):
        ids, left = talk.ask(f"the cat {turn}")
        sizes.append(len(ids))
        dropped += left
        assert tokenizer.decode(ids).startswith("sys<|endofsystemprompt|><|beginofuser|>")
        assert f"the cat {turn}" in tokenizer.decode(ids)
        talk.answered("a dog ran")
    assert max(sizes) <= 40 and dropped >= 3
    assert talk.turns[0].role == "user" and len(talk.turns) // 2 + dropped == 6

    before = list(talk.turns)
    for text, told in (
        ("a dog ran to the mat " * 30, "the context is 60: shorten"),
        ("\ud800", "not valid Unicode"),
        (" ", "is empty"),
    ):
        with pytest.raises(DataError, match=told):
            talk.ask(text)
    assert talk.turns == before


def test_a_question_without_an_answer_is_forgotten() -> None:
    """Catches two questions in a row, which no training had, behind an answer that failed."""
    tokenizer = k2_tokenizer()
    talk, fresh = (Talk(encoder("k2", tokenizer), 60, 20) for _ in range(2))
    talk.ask("the cat sat")
    assert talk.ask("a dog") == fresh.ask("a dog")
    assert [turn.role for turn in talk.turns] == ["user"]


def test_every_marker_ends_a_response(tmp_path: Path) -> None:
    """Catches a model that goes on as its user."""
    tokenizer = k2_tokenizer()
    stops = Talk(encoder("k2", tokenizer, "all"), 60, 20).stop_ids
    names = {tokenizer.decode([token]) for token in stops}
    assert names >= {"</s>", "<|endofchat|>", "<|beginofuser|>", "<|beginofsystem|>"}
    chatml, _ = json_pair(tmp_path / "hf", "qwen", CHATML)
    stops = Talk(encoder(CHATML, chatml, "all"), 60, 20).stop_ids
    assert stops == {chatml.special_id("<|im_start|>"), chatml.special_id("<|im_end|>")}


def _source(data: Path | None, tokenizer: Any = None) -> Any:
    trained = SimpleNamespace(manifest=data and str(data), tokenizer_sha256=None)
    manifest = SimpleNamespace(data=trained)
    return SimpleNamespace(
        path=Path("runs/x/checkpoints/ckpt_001"),
        manifest=manifest,
        tokenizer=tokenizer or k2_tokenizer(),
    )


def test_the_template_is_that_of_the_data(tmp_path: Path) -> None:
    """Catches a template that is guessed, changed, or not that of the checkpoint."""
    tiny_tokenizer().save(tmp_path / "tokenizer.model")
    (tmp_path / "in.jsonl").write_text('{"inputs": "q", "targets": "r"}\n')
    settings = ChatSettings(
        (str(tmp_path / "in.jsonl"),), tmp_path / "out", tmp_path / "tokenizer.model", 32
    )
    folder = ChatPreparation(settings, Progress(None)).run()[0].folder
    own = encoder_of(_source(folder / "manifest.json"))
    assert own.template.source.kind == "k2" and own.end_ids == {2}

    given = tmp_path / "x.jinja"
    given.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert encoder_of(_source(None), str(given)).template.source.name == str(given)

    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match="is not the template that the data was made with"):
        encoder_of(_source(folder / "manifest.json"))
    with pytest.raises(DataError, match=r"its tokenizer lacks <\|endofsystemprompt\|>"):
        encoder_of(_source(None, tiny_tokenizer()), "k2")
    with pytest.raises(DataError, match="is not there, so neither is its template"):
        encoder_of(_source(None))
