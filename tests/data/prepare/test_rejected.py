"""Shares of the broken: by documents, by bytes and by files, each against `max_rejected_share`."""

from pathlib import Path
from typing import Any

import pytest

from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.rejected import check_rejected
from k2train.data.prepare.workspace import Workspace
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError

GOOD = b'{"text": "a good line"}\n'


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()


def encoded(limit: float, **subset: Any) -> Workspace:
    tree = {"name": "s", "output": "out", "seed": 5, "sequence_length": 16, "chunks": 1}
    web = {"kind": "jsonl", "paths": ["web/*"], **subset}
    recipe = Recipe.model_validate(
        {**tree, "tokenizer": {"model": "t"}, "subsets": {"web": web}, "max_rejected_share": limit}
    )
    tokenizer = train_tokenizer(["a good line " * 9], 280)
    tasks = encode_tasks(recipe, list_sources(recipe))
    folder = Path(f"work{limit}{subset.get('kind', '')}").resolve()
    workspace = Workspace.create(folder, Path("out.tmp"), recipe, tokenizer, tasks)
    for number in range(len(tasks)):
        encode_task(workspace, number)
    return workspace


def test_a_few_broken_lines_may_be_most_of_the_bytes() -> None:
    """Catches a damaged archive counted by its few lines: a third of the corpus lost below 1 %."""
    Path("web/a.jsonl").write_bytes(GOOD * 500 + b"x" * (len(GOOD) * 300) + b"\n")
    with pytest.raises(DataError, match=r"subsets.web: 7200 of 18700 bytes are broken, a share o"):
        check_rejected(encoded(0.1))
    check_rejected(encoded(0.4))


def test_small_files_count_as_files() -> None:
    """Catches a third of the files lost because they are small."""
    for number in range(6):
        bad = number < 2
        content = GOOD + b"{" + b"x" * 30 + b"\n" if bad else GOOD * 1000
        Path(f"web/{number}.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"subsets.web: 2 of 6 files are broken, a share of 0.3333"):
        check_rejected(encoded(0.1))
    check_rejected(encoded(0.34))


def test_many_short_broken_lines_count_as_documents() -> None:
    """Catches a share of documents that is no longer looked at."""
    Path("web/a.jsonl").write_bytes(GOOD * 90 + b"{\n" * 10)
    with pytest.raises(DataError, match=r"subsets.web: 10 of 100 documents are broken, a share of"):
        check_rejected(encoded(0.05))
    check_rejected(encoded(0.1))


def test_a_text_file_that_cannot_be_read_is_one_of_many() -> None:
    """Catches a corpus of texts that one bad file stops, whatever max_rejected_share says."""
    for number in range(20):
        Path(f"web/{number:02d}.txt").write_bytes(b"a\xff" if number == 7 else b"a good line")
    with pytest.raises(DataError, match=r"1 of 20 (documents|files) are broken"):
        check_rejected(encoded(0.01, kind="text"))
    check_rejected(encoded(0.05, kind="text"))
