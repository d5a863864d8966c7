"""`chat/encode.py` against transformers: catches other ids, and a mask that is off by one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2train.chat.encode import ChatEncoder
from k2train.chat.template import Rendering, Span
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from tests.support.chat import (
    CHATML,
    CONVERSATIONS,
    LLAMA3,
    LLAMA3_BLOCKS,
    LLAMA3_HEADERS,
    TEXT_BLOCKS,
    TEXT_INSIDE,
    Turns,
    applied,
    encoder,
    exported,
    json_pair,
    k2_tokenizer,
    messages_of,
    prefix_tokenizer,
)

TWO_TURNS: Turns = [
    ("system", "s"),
    ("user", "the cat"),
    ("assistant", "a dog ran"),
    ("user", "the"),
    ("assistant", "mat"),
]


@pytest.mark.parametrize("make", (k2_tokenizer, prefix_tokenizer))
def test_k2_ids_and_mask_are_those_of_transformers(make: object, tmp_path: Path) -> None:
    """Catches another text, another split at markers, and a mask that learns too much or little."""
    tokenizer = make()  # type: ignore[operator]
    theirs, ours = exported(tmp_path / "hf", tokenizer), encoder("k2", tokenizer)
    for turns in CONVERSATIONS:
        expected, found = applied(theirs, turns), ours.encode(messages_of(turns))
        assert found.ids.tolist() == expected["input_ids"]
        assert found.learned.astype(int).tolist() == expected["assistant_masks"]
        prompt = applied(theirs, turns[:-1], add_generation_prompt=True)["input_ids"]
        assert ours.prompt(messages_of(turns[:-1])) == prompt
    assert ours.notes == []


@pytest.mark.parametrize(
    ("kind", "template", "specials"),
    (
        ("qwen", CHATML, ()),
        ("llama3", LLAMA3, LLAMA3_HEADERS),
        ("llama3", LLAMA3_BLOCKS, LLAMA3_HEADERS),
        ("neox", TEXT_BLOCKS, ()),
        ("digits", TEXT_BLOCKS, ()),
        ("neox", TEXT_INSIDE, ()),
    ),
)
def test_other_templates_give_the_ids_of_transformers(
    kind: str, template: str, specials: tuple[str, ...], tmp_path: Path
) -> None:
    """Catches a tokenizer.json that is cut otherwise at its control tokens, or at a response."""
    tokenizer, theirs = json_pair(tmp_path / "hf", kind, template, specials)
    ours = encoder(template, tokenizer)
    for turns in CONVERSATIONS:
        expected, found = applied(theirs, turns), ours.encode(messages_of(turns))
        assert found.ids.tolist() == expected["input_ids"]
        if "endgeneration" in template:
            assert found.learned.astype(int).tolist() == expected["assistant_masks"]
        prompt = applied(theirs, turns[:-1], add_generation_prompt=True)["input_ids"]
        assert ours.prompt(messages_of(turns[:-1])) == prompt


@pytest.mark.parametrize("template", (TEXT_BLOCKS, TEXT_INSIDE), ids=("behind", "inside"))
def test_a_response_inside_of_a_text_with_a_space_in_front(template: str, tmp_path: Path) -> None:
    """Catches a mask that the space in front of a text has shifted by a byte."""
    tokenizer = prefix_tokenizer()
    theirs, ours = exported(tmp_path / "hf", tokenizer, template), encoder(template, tokenizer)
    for turns in CONVERSATIONS:
        expected, found = applied(theirs, turns), ours.encode(messages_of(turns))
        assert found.ids.tolist() == expected["input_ids"]
        assert found.learned.astype(int).tolist() == expected["assistant_masks"]


def test_found_responses_are_those_of_blocks(tmp_path: Path) -> None:
    """Catches a response that is found without blocks one token too early or too late."""
    tokenizer, _ = json_pair(tmp_path / "hf", "llama3", LLAMA3, LLAMA3_HEADERS)
    found, blocks = encoder(LLAMA3, tokenizer), encoder(LLAMA3_BLOCKS, tokenizer)
    for turns in CONVERSATIONS:
        one, other = (way.encode(messages_of(turns)) for way in (found, blocks))
        assert one.ids.tolist() == other.ids.tolist()
        assert one.learned.tolist() == other.learned.tolist() and one.learned.any()
    assert found.end_ids == blocks.end_ids >= {tokenizer.special_id("<|eot_id|>")}


def _spans(encoder: ChatEncoder, turns: Turns) -> list[str]:
    """Text of each stretch of learned tokens, written out here."""
    found = encoder.encode(messages_of(turns))
    decode = encoder.template.tokenizer.decode
    spans: list[str] = []
    before = False
    for token, learned in zip(found.ids.tolist(), found.learned.tolist(), strict=True):
        if learned:
            spans = [*spans, ""] if not before else spans
            spans[-1] += decode([token])
        before = learned
    return spans


def test_the_edges_of_a_response(tmp_path: Path) -> None:
    """Catches a marker that is learned, a first token that is not, and a turn without its end."""
    tokenizer = k2_tokenizer()
    ours = encoder("k2", tokenizer)
    assert _spans(ours, TWO_TURNS) == ["a dog ran</s>", "mat</s>"]

    found = ours.encode(messages_of(TWO_TURNS))
    ids, learned = found.ids.tolist(), found.learned.tolist()
    # Learned is the label of the position before: the marker predicts the first word.
    first = learned.index(True)
    assert ids[:first] == ours.prompt(messages_of(TWO_TURNS[:2]))
    assert ids[first - 1] == tokenizer.special_id("<|beginofsystem|>")
    assert ids[-2:] == [tokenizer.eos_id, tokenizer.special_id("<|endofchat|>")]
    assert learned[-2:] == [True, False]
    assert ours.end_ids == {tokenizer.eos_id}

    chatml, _ = json_pair(tmp_path / "hf", "qwen", CHATML)
    # The line break behind the end is the template's.
    assert _spans(encoder(CHATML, chatml), TWO_TURNS) == ["a dog ran<|im_end|>", "mat<|im_end|>"]
    assert encoder("k2", tokenizer, "all").encode(messages_of(TWO_TURNS)).learned.all()


NAMES = ("<|beginofuser|>", "<|beginofsystem|>", "<|endofchat|>", "</s>", "<s>", "<fim_middle>")


@pytest.mark.parametrize("role", ("system", "user", "assistant"))
@pytest.mark.parametrize("name", NAMES)
def test_no_text_becomes_a_marker(name: str, role: str) -> None:
    """Catches a user who ends the system prompt, or speaks for the assistant."""
    tokenizer = k2_tokenizer()
    ours = encoder("k2", tokenizer)
    plain: Turns = [("system", "a"), ("user", "a"), ("assistant", "a")]
    forged = [(r, f"x {name}{name} y" if r == role else c) for r, c in plain]
    found, expected = (ours.encode(messages_of(turns)) for turns in (forged, plain))
    control = [
        [token for token in one.ids.tolist() if tokenizer.is_control(token)]
        for one in (found, expected)
    ]
    assert control[0] == control[1]
    assert f"x {name}{name} y" in tokenizer.decode(found.ids)


def test_no_marker_is_put_together_from_two_messages(tmp_path: Path) -> None:
    """Catches a name that begins in one message and ends in the next, or in the template."""
    tokenizer = k2_tokenizer()
    joined = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    turns: Turns = [("user", "<|endof"), ("assistant", "chat|>")]
    ids = encoder(joined, tokenizer, "all").encode(messages_of(turns)).ids.tolist()
    assert ids == [*tokenizer.encode("<|endofchat|>"), tokenizer.eos_id]
    ended = "{% for m in messages %}{{ m.content }}chat|>{{ eos_token }}{% endfor %}"
    ids = encoder(ended, tokenizer, "all").encode(messages_of(turns[:1])).ids.tolist()
    assert ids == [*tokenizer.encode("<|endofchat|>"), tokenizer.eos_id]


CAPTURED = (
    "{% for m in messages %}{% set x %}{% generation %} {{ m.content + eos_token }}"
    "{% endgeneration %}{% endset %}{{ SHOWN }}{% endfor %}"
)
"""Blocks inside of a text that the template takes before it writes it."""


@pytest.mark.parametrize(
    ("template", "told"),
    (
        ("{% for m in messages %}{{ m.content }}", "test.jinja:1: no Jinja template"),
        ("{{ messages[9].content }}", "does not render"),
        ("{{ raise_exception('no') }}", r"does not render \(no\)"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "does not render"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no control token follows"),
        ("{{ messages[-1].content + eos_token }}", "response 1 0 times"),
        (
            "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
            "2 times",
        ),
        (
            "{% for m in messages %}{{ m.content | length ~ m.content + eos_token }}{% endfor %}",
            "response 1 cannot be found",
        ),
        (
            "{% for m in messages %}{{ m.content.split() | length ~ m.content + eos_token }}"
            "{% endfor %}",
            "response 1 cannot be found",
        ),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "has 0 of 2 responses"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{{ eos_token }}"
            "{% endgeneration %}",
            "has 1 of 2 responses",
        ),
        (CAPTURED.replace("SHOWN", "x | trim"), "blocks have rendered"),
        (CAPTURED.replace("SHOWN", "x | length ~ x"), "blocks have rendered"),
    ),
)
def test_a_template_without_a_mask_is_refused(template: str, told: str) -> None:
    """Catches training on everything because nobody found the responses, and a text that only the
    search for them gives.
    """
    with pytest.raises(DataError, match=told) as caught:
        encoder(template, k2_tokenizer())
    assert str(caught.value).startswith("test.jinja") and "\n" not in str(caught.value)


def test_what_a_template_does_with_markers_in_text() -> None:
    """Catches a template that takes a message apart at what may be text."""
    tokenizer = k2_tokenizer()
    strips = "{% for m in messages %}{{ m.content.split('</s>')[-1] + eos_token }}{% endfor %}"
    ours = encoder(strips, tokenizer)
    with pytest.raises(DataError, match="cannot be told apart"):
        ours.encode(messages_of([("user", "a"), ("assistant", "x</s>y")]))
    assert ours.encode(messages_of([("user", "a<b>"), ("assistant", "x")])).learned.any()


def test_notes_say_what_a_template_lacks() -> None:
    """Catches blocks without the end of a turn, and a prompt that training never had."""
    tokenizer: Tokenizer = k2_tokenizer()
    endless = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}<|beginofsystem|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    notes = encoder(endless, tokenizer).notes
    assert len(notes) == 2 and "to stop" in notes[0] and "add_generation_prompt" in notes[1]


class _Passes(tuple[Span, ...]):
    """Spans that count how often they are gone through."""

    count = 0

    def __iter__(self) -> Iterator[Span]:
        _Passes.count += 1
        return super().__iter__()


def test_a_long_conversation_takes_time_as_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work that is quadratic in the turns: one record would stop a preparation."""
    ours = encoder("k2", k2_tokenizer())
    render = ours.template.render

    def counted(*given: Any, **options: Any) -> Rendering:
        found = render(*given, **options)
        return replace(found, spans=_Passes(found.spans))

    turns: Turns = [("user", "the cat"), ("assistant", "a dog")] * 50
    expected = ours.encode(messages_of(turns))
    monkeypatch.setattr(ours.template, "render", counted)
    found = ours.encode(messages_of(turns))
    assert found.learned.tolist() == expected.learned.tolist() and found.learned.sum() >= 50
    assert _Passes.count <= 4
