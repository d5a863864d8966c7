"""Too few documents: the message names the key that fixes it, and a number that suffices."""

import re
from pathlib import Path
from typing import Any

import pytest

from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.allocate.shortage import check_samples
from k2train.errors import DataError
from tests.support.sorted_runs import Text, recipe_of, workspace_of

# 60 documents of 10 tokens in 60 files: 600 tokens, 75 samples of 8.
TEXTS = [Text("a", f"f{i:02d}", 0, 10, i) for i in range(60)]
OTHER = [Text("b", f"f{i:02d}", 0, 10, i) for i in range(60)]


def refused(tmp_path: Path, subset: dict[str, Any], **keys: Any) -> str:
    """Error for the subset `a` next to a subset `b` that has enough."""
    recipe = recipe_of(tmp_path, {"a": subset, "b": {"repeat": 4}}, **{"chunks": 100, **keys})
    with pytest.raises(DataError) as caught:
        plan_task(workspace_of(tmp_path, recipe, {"a": TEXTS, "b": OTHER}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("subset", "keys", "words"),
    [
        (
            {},
            {},
            "gives 75 samples of 8 tokens, fewer than the 100 chunks: its "
            "documents hold 600 tokens, below the 800 of a sample for each: "
            "raise repeat to 1.34, or add files, or lower chunks to 75",
        ),
        (
            {"repeat": 0.5},
            {},
            "hold 600 tokens, 300 with repeat 0.5, below the 800 .*: raise repeat to 1.34",
        ),
        (
            {"limit_tokens": 300, "repeat": 2},
            {},
            r"gives 37 .*: limit_tokens \(300\) is below the 800 tokens .* raise it, or lower "
            r"chunks to 37$",
        ),
        (
            {"limit_tokens": 300},
            {},
            r"raise limit_tokens \(300\) and raise repeat to 1.34, or lower chunks to 37$",
        ),
        ({"share": [0.0, 0.5]}, {}, "raise repeat to .*, or widen its share, or lower chunks to"),
        (
            {},
            {"sequence_length": 700},
            r"gives 0 samples of 700 .*, or lower sequence_length \(700\)",
        ),
        (
            {},
            {"sequence_length": 700, "chunks": 5000},
            r"below the 3500000 of a sample for each: add files, or lower",
        ),
        (
            {"share": [0.0, 0.00001], "split_by": "source"},
            {},
            "gives 0 samples .*: of its 60 documents 60 are outside "
            "its share: widen it, or give split_by text$",
        ),
        (
            {},
            {"held_out": {"share": 0.99999}},
            "gives 0 samples .*: of its 60 documents 60 are held out: lower held_out",
        ),
        (
            {"split_by": "document"},
            {"held_out": {"share": 0.99999}},
            r"documents 60 are held out: lower held_out( \(|$)",
        ),
        (
            {},
            {"chunks": 50, "rows_per_chunk": 2},
            r"rows_per_chunk \(2\) leaves it 20 of its 75: raise rows_per_chunk, .* lower chunks "
            r"to 20",
        ),
    ],
    ids=[
        "few",
        "half",
        "limit",
        "limit-and-few",
        "share",
        "long",
        "hopeless",
        "outside",
        "held",
        "held-documents",
        "rows",
    ],
)
def test_the_key_that_fixes_it_is_named(
    tmp_path: Path, subset: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    """Catches `widen its share` where there is no share, and a number that is refused again."""
    message = refused(tmp_path, subset, **keys)
    assert message.startswith("subset a ") and re.search(words, message), message


def test_why_documents_are_none(tmp_path: Path) -> None:
    """Catches a cause that did not affect the most documents, and files without any document."""
    recipe = recipe_of(tmp_path, {"a": {}})
    kinds = (
        "documents_read",
        "rejected",
        "empty",
        "filtered",
        "short",
        "not_chosen",
        "outside",
        "duplicate",
        "held_out",
        "held_out_copy",
        "seen",
    )

    zeros = {kind if kind == "documents_read" else f"{kind}_documents": 0 for kind in kinds} | {
        "training_tokens": 0
    }
    for changes, words in (
        ({}, "its files hold no document"),
        (
            {"documents_read": 9, "short_documents": 5, "outside_documents": 4},
            "of its 9 documents 5 are shorter than min_ch",
        ),
        (
            {"documents_read": 9, "not_chosen_documents": 9},
            "of its 9 documents 9 are outside the interval `documents`",
        ),
        (
            {"documents_read": 9, "filtered_documents": 9},
            "of its 9 documents 9 are left out by `where`: check its keys",
        ),
        (
            {"documents_read": 9, "rejected_documents": 20, "duplicate_documents": 9},
            "of its 29 documents 20 are broken: check",
        ),
    ):
        with pytest.raises(DataError, match=words):
            check_samples(recipe, {"a": zeros | changes}, {"a": 0}, {"a": 0})


def test_the_smallest_is_explained_and_the_others_named(tmp_path: Path) -> None:
    """Catches subsets fixed one after the other, each after another reading of the corpus."""
    recipe = recipe_of(tmp_path, {"a": {}, "b": {}, "c": {}}, chunks=9)
    account = {name: {"training_tokens": 40} for name in "abc"}
    with pytest.raises(
        DataError, match=r"^subset b gives 2 samples.* lower chunks to 2 \(also too few: a 5\)$"
    ):
        check_samples(recipe, account, {"a": 5, "b": 2, "c": 9}, {"a": 5, "b": 2, "c": 9})
