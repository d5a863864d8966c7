"""Token account of a data folder: facts and tables against numbers that are set here."""

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.data.inspect.account import DOCUMENTS, account_facts, held_out_notes
from k2train.data.inspect.left_out import left_out_lines
from k2train.data.inspect.text import View, render
from k2train.data.manifest import Manifest, read_manifest
from tests.support.tiny_corpus import SEQUENCE, make_corpus

# One subset `noise` of 2 chunks of 63 rows.
MADE = 2 * 63 * SEQUENCE


def corpus_with(folder: Path, account: dict[str, Any] | None, **recipe: Any) -> Manifest:
    manifest = make_corpus(folder, chunks=2, held_out=False)
    content = json.loads(manifest.path.read_text())
    facts: dict[str, Any] = {"name": "small", "seed": 3}
    if account is not None:
        facts |= {
            "account": {"noise": account},
            "recipe": {"subsets": {"noise": {"repeat": 1}}, **recipe},
        }
    manifest.path.write_text(json.dumps({**content, "facts": facts}))
    return read_manifest(folder)


def account_of(**changes: int) -> dict[str, Any]:
    zeros = dict.fromkeys(DOCUMENTS.values(), 0)
    tokens = {"training_tokens": MADE + 5, "asked_tokens": MADE + 5, "tail_tokens": 5}
    return {**zeros, **tokens, "documents_read": 70, "training_documents": 70, **changes}


def section(lines: list[str], title: str) -> list[str]:
    """The lines below a title, to the next empty one."""
    start = lines.index(title) + 1
    return lines[start : lines.index("", start)]


def cells(lines: list[str], title: str) -> dict[str, str]:
    """The one row of a table by its headings; columns are apart by two blanks."""
    head, row, *_ = section(lines, title)
    names, values = (
        [part.strip() for part in line.split("  ") if part.strip()] for line in (head, row)
    )
    return dict(zip(names, values, strict=True))


def test_documents_by_what_became_of_them(tmp_path: Path) -> None:
    """Catches a document that is nowhere in the table, a column of nothing but zeros, and one
    column told as another.
    """
    counts = {key: 10 + i for i, key in enumerate(DOCUMENTS.values())}
    lines = render(account_facts(corpus_with(tmp_path / "a", account_of(**counts))), View())

    assert cells(lines, "documents") == {
        "subset": "noise",
        "read": "10",
        "used": "11",
        "held out": "12",
        "outside share": "13",
        "not chosen": "14",
        "empty": "15",
        "filtered": "16",
        "short": "17",
        "duplicates": "18",
        "held out copies": "19",
        "seen": "20",
        "rejected": "21",
        "shared ids": "22",
    }

    lines = render(
        account_facts(corpus_with(tmp_path / "b", account_of(short_documents=4))), View()
    )

    assert cells(lines, "documents") == {
        "subset": "noise",
        "read": "70",
        "used": "70",
        "short": "4",
    }


def test_a_folder_without_an_account(tmp_path: Path) -> None:
    """Catches a table of nothing, words that explain a column which is not there, and an account
    that is required.
    """
    lines = render(account_facts(corpus_with(tmp_path / "a", None)), View())
    assert "documents" not in lines
    assert cells(lines, "tokens")["made"] == f"{MADE:,}"
    message = [line.split()[0] for line in lines if line.startswith("  ")]
    assert message == ["made", "apart"]
    assert not any(line.startswith("note:") for line in lines)
    old = account_of()
    del old["repeated_id_documents"], old["rejected_documents"]
    assert "shared ids" not in cells(
        render(account_facts(corpus_with(tmp_path / "b", old)), View()), "documents"
    )


def test_words_are_explained_where_they_stand(tmp_path: Path) -> None:
    """Catches a heading with a sense of its own that nobody explains, and an explanation far from
    it.
    """
    lines = render(
        account_facts(corpus_with(tmp_path / "a", account_of(rejected_documents=1))), View()
    )
    below: dict[str, list[str]] = {}
    title = ""
    for before, line in zip(["", *lines], lines, strict=False):
        title = line if before == "" and not line.startswith(" ") else title
        if line.startswith("  ") and before[:2] in ("", "  "):
            below.setdefault(title, []).append(line[2:].split("  ")[0])

    assert below == {
        "tokens": ["one pass", "asked", "made", "difference", "tail"],
        "documents": ["read", "used", "rejected"],
        "samples in a chunk": ["apart"],
    }


@pytest.mark.parametrize(
    ("asked", "recipe", "notes"),
    [
        (MADE + 5, {}, []),
        (MADE + 5, {"rows_per_chunk": 63}, []),
        (
            MADE * 4,
            {"rows_per_chunk": 63},
            ["rows_per_chunk takes 25% of what the repeats ask for"],
        ),
        (
            MADE + SEQUENCE,
            {"rows_per_chunk": 63},
            ["rows_per_chunk takes 99% of what the repeats ask for"],
        ),
        (
            MADE * 400,
            {"rows_per_chunk": 63},
            ["rows_per_chunk takes less than 1% of what the repeats ask for"],
        ),
        (
            MADE * 3,
            {"limit_tokens": MADE},
            ["limit_tokens of noise takes 33% of what its repeat asks for"],
        ),
        (MADE * 3, {"limit_tokens": MADE * 3}, []),
        (
            MADE * 4,
            {"limit_tokens": MADE * 2, "rows_per_chunk": 63},
            [
                "limit_tokens of noise takes 50% of what its repeat asks for",
                "rows_per_chunk takes 50% of what the repeats ask for",
            ],
        ),
    ],
)
def test_what_a_limit_leaves_is_noted(
    tmp_path: Path, asked: int, recipe: dict[str, int], notes: list[str]
) -> None:
    """Catches a corpus of which a quarter is used without a word, and a word about nothing but the
    tail.
    """
    manifest = corpus_with(
        tmp_path / "a", account_of(asked_tokens=asked), chunks=2, sequence_length=SEQUENCE
    )
    content = json.loads(manifest.path.read_text())
    wished = content["facts"]["recipe"]
    wished["subsets"]["noise"]["limit_tokens"] = recipe.get("limit_tokens")
    wished["rows_per_chunk"] = recipe.get("rows_per_chunk")
    manifest.path.write_text(json.dumps(content))
    facts = account_facts(read_manifest(manifest.path.parent))
    assert facts["notes"] == notes
    assert [
        line.removeprefix("note: ") for line in render(facts, View()) if line.startswith("note: ")
    ] == notes


def test_held_out_rows_that_cost_much_more_are_noted(tmp_path: Path) -> None:
    """Catches one long document, held out for a few rows, that takes most of the training data."""
    counts = account_of(training_tokens=100, held_out_tokens=16, held_out_unused_tokens=284)
    assert held_out_notes({"books": counts}) == [
        "held_out keeps 75% of books out of the training, 300 tokens for 16 of rows: documents are "
        "held out whole; set held_out.share, or cut the longest documents"
    ]
    for unused in (0, 15, 16):
        rest = account_of(training_tokens=1, held_out_tokens=16, held_out_unused_tokens=unused)
        assert held_out_notes({"books": rest}) == []
    little = account_of(training_tokens=9000, held_out_tokens=16, held_out_unused_tokens=400)
    assert held_out_notes({"books": little}) == []


def test_every_part_that_is_left_out_is_said(tmp_path: Path) -> None:
    """Catches a filter, a limit or a remainder whose count stays in a file that nobody opens."""
    counts = {
        "bare_files": 1,
        "rejected_documents": 2,
        "rejected_bytes": 2048,
        "empty_documents": 1,
        "filtered_documents": 3,
        "filtered_bytes": 3,
        "short_documents": 4,
        "short_bytes": 4,
        "not_chosen_documents": 5,
        "not_chosen_bytes": 5,
        "outside_documents": 6,
        "outside_bytes": 6,
        "duplicate_documents": 7,
        "duplicate_tokens": 70,
        "asked_tokens": 4000,
        "training_tokens": 4000,
        "unused_tokens": 1000,
        "tail_tokens": 8,
        "left_by_repeat_tokens": 9,
        "held_out_unused_tokens": 10,
    }
    manifest = corpus_with(tmp_path / "a", account_of(**counts))
    (line,) = left_out_lines(manifest)
    name, parts = line.removeprefix("left out of ").split(": ")
    assert name == "noise"
    assert parts.split("; ") == [
        "1 file without any line or row",
        "2 documents broken (2.00 KiB)",
        "1 document without text",
        "3 documents not wanted by where (3 B)",
        "4 documents below min_characters (4 B)",
        "5 documents outside the interval documents (5 B)",
        "6 documents outside the share (6 B)",
        "7 documents with a text that was there before (70 tokens)",
        "1.0K tokens (25%, about 18 documents) by the smallest subset",
        "9 tokens of the last pass, by repeat",
        "8 tokens at the end, less than a sample",
        "10 tokens held out, beyond the rows",
    ]
    nothing = corpus_with(tmp_path / "b", {**account_of(), "tail_tokens": 0})
    assert left_out_lines(nothing) == []
