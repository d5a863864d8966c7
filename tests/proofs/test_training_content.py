"""The summary of training content: what the record knows is answered, the rest is open."""

from typing import Any

import pytest

from k2train.proofs.facts import Stage, read_stages
from k2train.proofs.training_content import (
    QUESTIONS,
    SECTIONS,
    SIZES,
    content_summary,
    summary_markdown,
)
from tests.proofs.conftest import SUBSETS, Made
from tests.support.tiny_corpus import ROWS, SEQUENCE

ANSWERED = {
    "models",
    "dependencies",
    "modalities",
    "text_size",
    "text_content",
    "recorded_sources",
    "processing",
}


def answers(summary: Any) -> dict[str, Any]:
    return {one["key"]: one["answer"] for one in summary["questions"]}


def test_known_answers_are_those_of_the_manifest(made: Made) -> None:
    """Catches tokens of the held-out part, a size in the wrong range, and a source that is lost."""
    found = answers(content_summary(read_stages([made.run])))
    total = 2 * ROWS * SEQUENCE
    assert found["text_size"].startswith(f"less than 1 billion tokens ({total:,} tokens")
    letters = 2 * ROWS * SUBSETS["letters"]
    assert found["text_content"][0] == f"letters: {letters:,} tokens"
    assert found["recorded_sources"] == [
        "letters: origin: https://letters.example, read as text",
        "forms: origin not on record",
    ]
    assert found["processing"] == [
        "tiny, account of the preparation: documents read 130, duplicate documents 4"
    ]
    assert found["dependencies"].startswith("None")


def test_what_is_not_on_record_stays_open(made: Made) -> None:
    """Catches an invented "no", and a question that is neither answered nor listed as open."""
    summary = content_summary(read_stages([made.run]))
    found = answers(summary)
    assert {key for key, answer in found.items() if answer is not None} == ANSWERED
    assert len(summary["open"]) == len(QUESTIONS) - len(ANSWERED)
    assert {one.section for one in QUESTIONS} <= SECTIONS.keys()
    text = summary_markdown(summary)
    assert text.count("_open: not on record_") == len(summary["open"])
    for number, title in SECTIONS.items():
        assert f"# {number}. {title}\n" in text


def test_a_run_without_its_data_says_nothing_of_sizes(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sum over the stages whose manifests are there, as if it were all."""
    monkeypatch.setattr(Stage, "data", None)
    found = answers(content_summary(read_stages([made.run])))
    assert found["text_size"] is None and found["modalities"] is None
    assert found["models"] == ["tiny, ckpt_000 to ckpt_002 (3)"]


def test_ranges_have_no_gap() -> None:
    """Catches a range in the wrong order: the first whose end is above the size is taken."""
    ends = [end for end, _ in SIZES]
    assert ends[-1] is None and ends[:-1] == sorted(e for e in ends if e is not None)


def test_what_is_no_summary_is_one_line() -> None:
    """Catches a traceback for a file from elsewhere."""
    for broken in (None, [], {}, {"title": 1}):
        with pytest.raises(ValueError, match="is no summary"):
            summary_markdown(broken)
