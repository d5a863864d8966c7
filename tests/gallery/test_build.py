"""What a gallery is made of: an empty one, one that shows what it was not asked, a silent loss."""

from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.gallery.build import read_content, write_gallery
from tests.support.tiny_gallery import choice_item, make_answers, make_result

PROMPTS = ["one", "two"]


def test_nothing_to_show_is_a_mistake(tmp_path: Path) -> None:
    """Catches an empty page, which looks like a finished one."""
    with pytest.raises(RunError, match="nothing to show yet; give --prompts FILE"):
        read_content(tmp_path, None, None)
    asked = make_answers(tmp_path, 0, PROMPTS, lambda c, p: "")
    with pytest.raises(RunError, match="nothing to show yet"):
        read_content(tmp_path, asked, None)


def test_it_has_what_is_on_record(tmp_path: Path) -> None:
    """Catches a checkpoint, a prompt or a task that is left out."""
    run = tmp_path / "run"
    asked = make_answers(run, 3, PROMPTS, lambda c, p: f"said {c} {p}")
    make_result(run, "quiz", 4, [choice_item(0, 0, [-1.0, -2.0])])
    content = read_content(run, asked, None)
    assert content.checkpoints == {"ckpt_000", "ckpt_001", "ckpt_002", "ckpt_004"}
    assert sorted(content.texts()) == sorted(
        [*(f"said {c} {p}" for c in range(3) for p in range(2)), " choice 0", " choice 1"]
    )
    one = read_content(run, asked, ["ckpt_001"])
    assert one.checkpoints == {"ckpt_001"} and not one.tasks

    written = write_gallery(tmp_path / "site", content, None)
    found = {path.name for path in (tmp_path / "site").iterdir()}
    assert found >= {"index.html", "prompts.html", "evaluation.html"}
    assert "trace.py index" in written.page.read_text()


def test_spans_are_asked_for_every_text(tmp_path: Path) -> None:
    """Catches an answer whose spans nobody looked for, and the command where spans are."""
    run = tmp_path / "run"
    asked = make_answers(run, 2, PROMPTS, lambda c, p: f"said {c} {p}")
    texts: list[str] = []

    def find(wanted: object) -> dict[str, list]:
        texts.extend(wanted)  # type: ignore[call-overload]
        return {text: [] for text in texts}

    page = write_gallery(tmp_path / "site", read_content(run, asked, None), find, ["a <note>"]).page
    assert sorted(texts) == [f"said {c} {p}" for c in range(2) for p in range(2)]
    assert "trace.py" not in page.read_text() and "a &lt;note&gt;" in page.read_text()
    data = next((tmp_path / "site").glob("files_*/data_prompt_0001.js")).read_text()
    assert data.count('"spans":[]') == 2
