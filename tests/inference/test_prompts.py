"""`inference/prompts.py`: catches prompts that are lost, cut, or too long without a word."""

from pathlib import Path

import pytest

from k2train.errors import DataError
from k2train.inference.prompts import encode_prompt, encode_prompts, read_prompts
from tests.support.tiny_generation import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    """Catches an empty prompt that is skipped, so that answers have other numbers than lines."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("the cat\n\n  übel \r\nlast".encode())
    assert read_prompts(file) == ["the cat", "", "  übel ", "last"]


def test_json_lines(tmp_path: Path) -> None:
    """Catches a prompt of several lines that becomes several prompts."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "more": 1}\n"c"\n')
    assert read_prompts(file) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    (
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\xff\n", "cannot be read"),
        ("p.jsonl", b'"a"\n{"text": "b"}\n', "line 2: must be a text"),
        ("p.jsonl", b'"a"\n"b\n', "line 2: not valid JSON"),
    ),
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    """Catches a traceback, and a message without the line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "none.txt")


def test_a_prompt_must_leave_room() -> None:
    """Catches a prompt as long as the context, whose first token would come from nowhere."""
    text = "a dog ran to the cat"
    count = len(TOKENIZER.encode(text))
    assert len(encode_prompt(TOKENIZER, 0, text, count + 1).ids) == count
    with pytest.raises(DataError, match=rf"prompt 3 has {count} tokens, the context {count}.*--tr"):
        encode_prompt(TOKENIZER, 2, text, count)
    kept = encode_prompt(TOKENIZER, 2, text, count, keep_tokens=4)
    assert list(kept.ids) == TOKENIZER.encode(text)[-4:]


def test_text_stays_text() -> None:
    """Catches a prompt that forges the end of a document."""
    (prompt,) = encode_prompts(TOKENIZER, ["</s><fim_middle>"], 100)
    assert min(prompt.ids) > 2 and max(prompt.ids) < TOKENIZER.base_size
    assert TOKENIZER.decode(prompt.ids) == "</s><fim_middle>"


def test_an_empty_prompt_begins_a_document() -> None:
    """Catches a pass over no token at all."""
    assert encode_prompt(TOKENIZER, 0, "", 16).ids == (TOKENIZER.eos_id,)
