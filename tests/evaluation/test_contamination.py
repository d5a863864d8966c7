"""`evaluation/contamination.py`: catches planted items that are not found, or at another place or
step, and items that are found and are not there.
"""

from pathlib import Path

import numpy as np
import pytest

from k2train.data.manifest import read_manifest
from k2train.data.trace.build import open_index
from k2train.data.trace.exposures import Stage
from k2train.data.trace.findings import Corpus
from k2train.errors import UserError
from k2train.evaluation.contamination import Contamination, _Cover
from k2train.evaluation.contamination_findings import Hit, ItemFinding, Rules
from k2train.evaluation.contamination_items import SearchedItem
from tests.support.command_line import load_tool
from tests.support.contaminated_run import STEPS, Planted, plant, words

pytest.importorskip("pydivsufsort", reason="the extra `trace` is not installed")

recorded_run = load_tool("recorded_run")

CHUNKS = ("chunk_000", "chunk_002", "chunk_003")
L, M, N = (words(seed, 24) for seed in (70, 71, 72))
A, B, C, D, E, F, G, H, K = (words(seed, 24) for seed in range(9))
TIGHT = words(9, 12)
ANSWER = " is " + words(90, 3)
WRONG = " " + words(91, 24)
HALVES = E.split()
PLACES = {
    ("chunk_000", 1): f" {A} ",
    ("chunk_000", 4): f" {B} ",
    ("chunk_003", 0): f" {B} ",
    ("chunk_001", 2): f" {C} ",
    ("chunk_001", 5): f" {D} ",
    ("chunk_002", 3): f" {' '.join(HALVES[:14])} ",
    ("chunk_002", 0): f" {G} ",
    ("chunk_002", 1): f" {TIGHT} ",
    ("chunk_003", 4): f" {H}{ANSWER} ",
    ("chunk_002", 5): f"{WRONG} ",
    # The wholly covered item comes later than most of it.
    ("chunk_000", 0): f" {' '.join(K.split()[:21])} ",
    ("chunk_003", 2): f" {K} ",
}
ITEMS = (
    SearchedItem("once", A),
    SearchedItem("twice", B),
    SearchedItem("deferred", C),
    SearchedItem("to come", D),
    SearchedItem("half", E),
    SearchedItem("nowhere", F),
    # In the middle of words: none of the tokens at its edges is one of the row.
    SearchedItem("edges", G[2:-2]),
    SearchedItem("tight edges", TIGHT[2:-2]),
    SearchedItem("answered", H, ANSWER, (ANSWER, WRONG)),
    SearchedItem("wrong choice", words(92, 12), " yes", (" yes", WRONG)),
    SearchedItem("early", K),
    SearchedItem("short", "the river"),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("contamination"), PLACES)


def search(planted: Planted, rules: Rules | None = None, run: bool = True) -> Contamination:
    corpora, notes = recorded_run.corpora_of(planted.run if run else planted.data, None)
    assert notes == []
    indexes = recorded_run.indexes_of(corpora, None)
    return Contamination(corpora, indexes, planted.tokenizer, rules or Rules())


@pytest.fixture(scope="module")
def found(planted: Planted) -> dict[str, ItemFinding]:
    return {one.name: one for one in search(planted).find(ITEMS)}


def test_the_step_that_read_each_item(found: dict[str, ItemFinding]) -> None:
    """Catches a step of the order before a deferral, of an attempt that was undone, or of a later
    place, and an item whose step is to come told as read.
    """
    assert {name: (one.label, one.step) for name, one in found.items()} == {
        "once": ("exposed", 1),
        "twice": ("exposed", 2),
        "deferred": ("exposed", 7),
        "to come": ("clean", None),
        "half": ("partly", None),
        "nowhere": ("clean", None),
        "edges": ("exposed", 3),
        "tight edges": ("exposed", 3),
        "answered": ("exposed", 6),
        "wrong choice": ("clean", None),
        "early": ("exposed", 1),
        "short": ("too short", None),
    }


def test_the_places_are_those_that_hold_the_text(
    planted: Planted, found: dict[str, ItemFinding]
) -> None:
    """Catches a chunk or row that does not hold the text, and one that does and is missing: Python
    looks for the text in every row.
    """
    for item in ITEMS:
        texts = dict(item.parts())
        for part in found[item.name].parts:
            size = len(texts[part.name].encode())
            whole = [hit for hit in part.hits if (hit.first, hit.last) == (0, size)]
            places = sorted((row.chunk, row.row) for hit in whole for row in hit.rows)
            if part.needed:
                assert places == planted.places(texts[part.name]), (item.name, part.name)
            for hit in part.hits:
                text = texts[part.name].encode()[hit.first : hit.last]
                ((row,),) = [hit.rows]
                assert text in planted.rows[row.chunk, row.row]


def test_how_much_of_an_item_is_covered(found: dict[str, ItemFinding]) -> None:
    """Catches tokens at the edges that are lost, and a share of rows that were never read."""
    shares = {name: one.parts[0] for name, one in found.items()}
    for name in ("once", "twice", "deferred", "edges", "tight edges"):
        assert shares[name].covered == 1.0 and shares[name].longest == shares[name].tokens
    assert 0.3 < shares["half"].covered < 0.75
    assert (shares["to come"].covered, shares["to come"].covered_in_data) == (0.0, 1.0)
    assert shares["nowhere"].hits == () and shares["short"].hits == ()
    exposures = [
        (one.state, one.step) for hit in shares["deferred"].hits for one in hit.rows[0].exposures
    ]
    assert exposures == [("undone", 3), ("trained", 7)]


def test_the_answer_with_the_question(found: dict[str, ItemFinding]) -> None:
    """Catches a question alone, or an answer elsewhere, told as both; and a wrong choice that
    counts.
    """
    assert [name for name, one in found.items() if one.with_answer] == ["answered"]
    wrong = {part.name: part for part in found["wrong choice"].parts}
    assert wrong["choice 1"].covered == 1.0 and not wrong["choice 1"].is_judged
    assert wrong["choice 1"].step == 4


def test_nothing_is_found_in_random_text(planted: Planted) -> None:
    """Catches hits by chance: other texts of the same words."""
    items = [SearchedItem(str(seed), words(seed, 30)) for seed in range(5000, 5150)]
    for one in search(planted).find(items):
        assert one.label == "clean" and one.parts[0].hits == ()


def test_the_rules_decide(planted: Planted) -> None:
    """Catches a threshold that is not looked at."""
    items = [one for one in ITEMS if one.name in ("half", "early", "once")]
    half = {one.name: one for one in search(planted, Rules(exposed=0.4, clean=0.1)).find(items)}
    assert half["half"].label == "exposed" and half["half"].step == 4
    whole = {one.name: one for one in search(planted, Rules(exposed=1.0)).find(items)}
    assert whole["early"].step == 5 and whole["once"].step == 1
    long = {one.name: one for one in search(planted, Rules(tokens=60)).find(items)}
    # A part of fewer tokens than that must match as a whole.
    assert long["once"].label == "exposed" and long["half"].label == "clean"
    for wrong in ({"exposed": 1.1}, {"clean": 0.0}, {"clean": 0.9}, {"least_tokens": 14}):
        with pytest.raises(UserError, match="--"):
            Rules(**wrong)  # type: ignore[arg-type]


def test_a_longer_span_in_a_chunk_hides_no_shorter_one(tmp_path: Path) -> None:
    """Catches an item that counts as clean, or as read later, because another row of the same
    chunk has more of it.
    """
    early, late, unread = L, M, N
    places = {
        ("chunk_000", 1): f" {' '.join(early.split()[:21])} ",
        ("chunk_000", 4): f" {early} ",
        ("chunk_000", 2): f" {late} ",
        ("chunk_000", 5): f" {' '.join(late.split()[3:])} ",
        ("chunk_001", 2): f" {' '.join(unread.split()[:21])} ",
        ("chunk_001", 5): f" {unread} ",
    }
    items = [SearchedItem("early", L), SearchedItem("late", M), SearchedItem("unread", N)]
    found = {one.name: one for one in search(plant(tmp_path, places)).find(items)}
    assert {name: (one.label, one.step) for name, one in found.items()} == {
        "early": ("exposed", 1),
        "late": ("exposed", 1),
        "unread": ("exposed", 7),
    }
    part = found["unread"].parts[0]
    assert 0.8 <= part.covered < 1 == part.covered_in_data
    # Each row once.
    assert [len(one.parts[0].hits) for one in found.values()] == [2, 2, 2]


def test_the_first_of_more_places_than_are_looked_at(tmp_path: Path) -> None:
    """Catches the step of a later row, where an item is in more rows than are looked at."""
    first = {
        (name, row): words(200 + 10 * n + row, 16)
        for n, name in enumerate(CHUNKS)
        for row in range(3)
    }
    places = {
        (name, row + late): f" {text} " for (name, row), text in first.items() for late in (0, 3)
    }
    planted = plant(tmp_path, places)
    items = [SearchedItem(f"{name} {row}", text) for (name, row), text in first.items()]
    found = search(planted, Rules(places=1)).find(items)
    assert [one.step for one in found] == [STEPS[name] for name in CHUNKS for _ in range(3)]


def test_a_token_without_bytes_is_not_covered() -> None:
    """Catches a share above 0 of an item that is nowhere."""
    cover = _Cover(np.array([0, 0, 4, 4, 8]))
    assert cover.share == 0.0
    cover.add(Hit(0, 4, 1, ()))
    assert cover.share == 0.5


def test_a_data_folder_has_places_without_steps(planted: Planted) -> None:
    """Catches items of a data folder that count as clean, for want of a run."""
    found = {one.name: one for one in search(planted, run=False).find(ITEMS)}
    assert found["to come"].label == found["once"].label == "exposed"
    assert found["once"].step is None and found["nowhere"].label == "clean"
    assert found["answered"].with_answer


def test_an_earlier_stage_was_read_before_the_first_step(planted: Planted, tmp_path: Path) -> None:
    """Catches steps of another run that are compared with those of this one's checkpoints."""
    run = recorded_run.open_run(planted.run)
    manifest = read_manifest(planted.data)
    corpora = [Corpus(manifest, [Stage(run, branch=True)])]
    before = Contamination(corpora, [open_index(manifest)], planted.tokenizer, Rules())
    (one,) = before.find([ITEMS[2]])
    assert (one.label, one.step) == ("exposed", 0)
