"""`checkpoint/selection.py`: catches a checkpoint that was not meant, and one that is left out."""

from pathlib import Path

import pytest

from k2train.checkpoint.selection import chosen, selected
from k2train.errors import CheckpointError, RunError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose checkpoints are folders alone; 4 is missing, as with every_chunks."""
    for name in (
        *(f"ckpt_{n:03d}" for n in (0, 1, 2, 3, 5, 12)),
        "ckpt_003_step_000007",
        "ckpt_006.tmp",
    ):
        (tmp_path / "r" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "r" / "checkpoints" / "ckpt_001" / "manifest.json").write_text("{}")
    return tmp_path / "r"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("newest", ["012"]),
        ("all", ["000", "001", "002", "003", "005", "012"]),
        ("every:2", ["000", "002", "012"]),
        ("12,0", ["000", "012"]),
        ("ckpt_003_step_000007, 1-3", ["001", "002", "003", "003_step_000007"]),
    ],
)
def test_words_take_numbered_ones(run: Path, text: str, numbers: list[str]) -> None:
    """Catches a number taken for a place in the list, saves inside chunks among all, an order."""
    assert [path.name for path in chosen(run, text)] == [f"ckpt_{one}" for one in numbers]


@pytest.mark.parametrize("text", ["4", "every:0", "", "all,2", "ckpt_1", "1,1", "ckpt_006.tmp"])
def test_words_that_take_none(run: Path, text: str) -> None:
    """Catches a mistake that evaluates nothing, in silence."""
    with pytest.raises(CheckpointError, match=r"or take all, newest or every:N"):
        chosen(run, text)


def test_a_run_is_evaluated_alone(run: Path, tmp_path: Path) -> None:
    """Catches scores of another run under this one's name, and a choice that is empty."""
    other = tmp_path / "other" / "checkpoints" / "ckpt_001"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"ckpt_001 is not of .*r; take one that is"):
        chosen(run, f"2,{other}")
    with pytest.raises(CheckpointError, match=r"takes none of .*other, which has ckpt_001"):
        chosen(tmp_path / "other", "every:2")
    with pytest.raises(RunError, match="is not a directory"):
        chosen(tmp_path / "none", "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="has no checkpoints"):
        chosen(tmp_path / "empty", "all")


def names(run: Path, text: str) -> list[str]:
    return [path.name for item in selected(run, text) for path in item]


def test_what_is_named_is_taken(run: Path) -> None:
    """Catches a save inside a chunk in a range, and a range that ends too early."""
    assert names(run, "2") == ["ckpt_002"]
    assert names(run, "12, ckpt_003_step_000007,1") == [
        "ckpt_012",
        "ckpt_003_step_000007",
        "ckpt_001",
    ]
    assert names(run, "2-12") == ["ckpt_002", "ckpt_003", "ckpt_005", "ckpt_012"]
    assert names(run, "ckpt_001-2") == ["ckpt_001", "ckpt_002"]
    assert names(run, f"3,{run}/checkpoints/ckpt_001") == ["ckpt_003", "ckpt_001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "has no 'ckpt_004'; it has ckpt_012, ckpt_005, ckpt_003_step_000007, ckpt_003, "),
        ("6", "has no 'ckpt_006'"),
        ("3-4", "has no 'ckpt_004'"),
        ("5-3", "5-3 is no range; the lower number comes first"),
        ("1,1", "ckpt_001 twice"),
        ("1-3,2", "ckpt_002 twice"),
        ("1,", "has no ''"),
        ("\u0663", "has no"),
        ("somewhere/ckpt_001", "somewhere/ckpt_001 is no checkpoint"),
    ],
)
def test_mistakes(run: Path, text: str, message: str) -> None:
    """Catches a shorter window without a word, and a traceback."""
    with pytest.raises(CheckpointError) as caught:
        selected(run, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_twice(run: Path) -> None:
    """Catches a checkpoint that counts twice, by another path."""
    with pytest.raises(CheckpointError, match="twice"):
        selected(run, f"1,{run}/checkpoints/../checkpoints/ckpt_001")
    with pytest.raises(RunError, match="is not a directory"):
        selected(run / "none", "1")
