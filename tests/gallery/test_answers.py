"""Kept answers: one of other weights, one that a kill cut off, one drawn for another number."""

from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.gallery.answers import (
    Asked,
    Settings,
    answered_checkpoints,
    answers_path,
    append_answers,
    matching,
    read_answers,
    read_asked,
    write_asked,
)
from tests.support.tiny_gallery import SETTINGS, answer

ASKED = Asked(prompts=("one", "two"), settings=SETTINGS)


def texts(records: list, asked: Asked = ASKED, manifest: str = "m1") -> list[str | None]:
    return [one and one.text for one in matching(records, asked, manifest)]


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    """Catches a text that the file changes: line ends, NUL, what a browser or JSON escapes."""
    hostile = "a\r\n\x00\u2028\u202e</script>\"'\\ \U0001f600"
    kept = [answer(1, 0, "one", hostile), answer(1, 1, "two", "")]
    append_answers(tmp_path, "ckpt_001", kept)
    assert read_answers(tmp_path, "ckpt_001") == (kept, 0)
    assert texts(kept) == [hostile, ""]
    assert read_answers(tmp_path, "ckpt_002") == ([], 0)


def test_a_kill_costs_one_line(tmp_path: Path) -> None:
    """Catches an answer that is glued to the torn line before it."""
    append_answers(tmp_path, "ckpt_001", [answer(1, 0, "one", "first")])
    path = answers_path(tmp_path, "ckpt_001")
    whole = path.read_bytes()
    append_answers(tmp_path, "ckpt_001", [answer(1, 1, "two", "second")])
    path.write_bytes(path.read_bytes()[: len(whole) + 40])
    records, damaged = read_answers(tmp_path, "ckpt_001")
    assert texts(records) == ["first", None] and damaged == 1
    append_answers(tmp_path, "ckpt_001", [answer(1, 1, "two", "again")])
    records, damaged = read_answers(tmp_path, "ckpt_001")
    assert texts(records) == ["first", "again"] and damaged == 1


def test_only_what_was_asked_counts() -> None:
    """Catches an answer of other weights or other options, shown as this checkpoint's."""
    kept = [answer(1, 0, "one", "first")]
    assert texts(kept) == ["first", None]
    assert texts(kept, manifest="other") == [None, None]
    longer = Asked(prompts=ASKED.prompts, settings=Settings(max_tokens=41))
    assert texts(kept, longer) == [None, None]


def test_a_draw_belongs_to_its_number() -> None:
    """Catches a sampled answer under a number whose draws are others; a greedy one may move."""
    moved = Asked(prompts=("zero", "one"), settings=SETTINGS)
    assert texts([answer(1, 0, "one", "first")], moved) == [None, "first"]
    warm = Settings(max_tokens=40, temperature=0.7)
    drawn = answer(1, 0, "one", "first", settings=warm)
    assert texts([drawn], Asked(prompts=("zero", "one"), settings=warm)) == [None, None]
    assert texts([drawn], Asked(prompts=("one",), settings=warm)) == ["first"]


def test_what_was_asked_is_remembered(tmp_path: Path) -> None:
    """Catches a damaged file that is taken for no question, and then replaced."""
    assert read_asked(tmp_path) is None
    write_asked(tmp_path, ASKED)
    assert read_asked(tmp_path) == ASKED
    (tmp_path / "gallery" / "asked.json").write_text('{"prompts": 3}')
    with pytest.raises(RunError, match="ask again with --prompts"):
        read_asked(tmp_path)


def test_checkpoints_are_in_the_order_of_training(tmp_path: Path) -> None:
    """Catches the order of names, and a file that is no checkpoint's."""
    assert answered_checkpoints(tmp_path) == []
    for name in ("ckpt_1000", "ckpt_002", "notes", "ckpt_002_step_000030"):
        append_answers(tmp_path, name, [answer(1, 0, "one", "x")])
    assert answered_checkpoints(tmp_path) == ["ckpt_002", "ckpt_002_step_000030", "ckpt_1000"]
