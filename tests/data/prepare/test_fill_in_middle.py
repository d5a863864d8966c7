"""Fill-in-the-middle: order of the parts, restoring, and choices by the document's name."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.data.prepare.encode.fill_in_middle import (
    KINDS,
    SPECIALS,
    Item,
    Kind,
    choose_fim,
    choose_item,
    cut_points,
    encode_documents,
    fim_ids,
    fim_parts,
    restore,
)
from k2train.data.tokenizer import EOS_ID, K2_SPECIAL_TOKENS, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from tests.data.test_tokenizer import CONTROL_TEXTS, corpus_text, trained_elsewhere

TEXTS = st.lists(
    st.sampled_from(
        [*CONTROL_TEXTS, "\U0001d518\U0001d518", "é", "e\u0301", "\r\n", " ", "the value"]
    )
    | st.text(),
    max_size=8,
).map("".join)
NAMES = [(f"origin/file{i % 50}.py", f"file{i % 50}.py:{i}") for i in range(4000)]


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_tokenizer([corpus_text(i, 200) for i in range(20)], 320)


@pytest.fixture(scope="module", params=["own", "published"])
def tokenizer(request: pytest.FixtureRequest, own: Tokenizer) -> Tokenizer:
    return own if request.param == "own" else Tokenizer(trained_elsewhere())


# The order of the parts


def test_parts_stand_as_k2_has_them(tokenizer: Tokenizer) -> None:
    """Catches parts or special tokens in another order, a space before a part, and a missing or
    doubled part.
    """
    prefix, middle, suffix = "def the ", "value\n", " x = 1"
    text = prefix + middle + suffix
    head, turn, last = (
        tokenizer.special_id(f"<fim_{name}>") for name in ("prefix", "suffix", "middle")
    )
    p, m, s, pm = (tokenizer.encode(part) for part in (prefix, middle, suffix, prefix + middle))
    assert fim_ids(tokenizer, text, "psm", 8, 14).tolist() == [head, *p, turn, *s, last, *m]
    assert fim_ids(tokenizer, text, "spm", 8, 14).tolist() == [head, turn, *s, last, *pm]
    assert fim_ids(tokenizer, text, "none", 0, 0).tolist() == tokenizer.encode(text)
    decoded = tokenizer.decode(fim_ids(tokenizer, text, "psm", 8, 14))
    assert decoded == "<fim_prefix>def the <fim_suffix> x = 1<fim_middle>value\n"
    decoded = tokenizer.decode(fim_ids(tokenizer, text, "spm", 8, 14))
    assert decoded == "<fim_prefix><fim_suffix> x = 1<fim_middle>def the value\n"


def test_prefix_and_middle_are_one_text_in_spm(tokenizer: Tokenizer) -> None:
    """Catches a piece boundary where prefix and middle meet, which ordinary text would not have."""
    text = "return return"
    assert len(tokenizer.encode("return")) < len(tokenizer.encode("ret")) + len(
        tokenizer.encode("urn")
    )
    assert fim_ids(tokenizer, text, "spm", 3, 6).tolist()[
        -len(tokenizer.encode("return")) :
    ] == tokenizer.encode("return")


@given(TEXTS, st.sampled_from(KINDS), st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=200)
def test_the_document_comes_back(
    tokenizer: Tokenizer, text: str, kind: Kind, first: int, second: int
) -> None:
    """Catches a part lost or doubled, a cut inside a character, and text that is taken for a
    special token.
    """
    a, b = sorted((min(first, len(text)), min(second, len(text))))
    assert "".join(fim_parts(text, a, b)) == text
    ids = fim_ids(tokenizer, text, kind, a, b)
    assert ids.dtype == np.int32
    assert restore(tokenizer, ids) == text
    assert restore(tokenizer, [*ids.tolist(), EOS_ID]) == text
    controls = [token for token in ids.tolist() if token >= tokenizer.base_size or token <= EOS_ID]
    assert sorted(controls) == (
        [] if kind == "none" else sorted(map(tokenizer.special_id, SPECIALS))
    )


@given(
    st.lists(
        st.tuples(TEXTS, st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), max_size=6
    )
)
@settings(deadline=None)
def test_many_documents_encode_as_each_alone(
    own: Tokenizer, drawn: list[tuple[str, Kind, int, int]]
) -> None:
    """Catches parts that slip to the neighbour in the one call that encodes them all."""
    items = [Item(t, kind, *sorted((min(a, len(t)), min(b, len(t))))) for t, kind, a, b in drawn]
    together = encode_documents(own, items, num_threads=2)
    assert [ids.tolist() for ids in together] == [fim_ids(own, *item).tolist() for item in items]


@pytest.mark.parametrize("cut", [(0, 0), (0, 5), (3, 9), (0, 14), (14, 14)])
@pytest.mark.parametrize("kind", ["psm", "spm"])
def test_a_kept_dummy_prefix_begins_the_document(kind: Kind, cut: tuple[int, int]) -> None:
    """Catches a space in front of each part, in the midst of words, and one that is missing."""
    kept = Tokenizer(trained_elsewhere(), dummy_prefix="keep")
    text = "def the value x"
    assert restore(kept, fim_ids(kept, text, kind, *cut)) == f" {text}"


def test_pieces_of_a_document_do_not_restore(own: Tokenizer) -> None:
    """Catches a slice of a row restored as if it were the document."""
    ids = fim_ids(own, "def the value x = 1", "psm", 4, 8).tolist()
    turn = ids.index(own.special_id("<fim_suffix>"))
    for broken in (ids[1:], ids[:turn], ids[turn:], ids + ids):
        with pytest.raises(DataError, match="not one whole"):
            restore(own, broken)


def test_a_tokenizer_without_the_specials(own: Tokenizer) -> None:
    """Catches a KeyError for a recipe with too few special tokens; plain text needs none."""
    bare = Tokenizer(own.model, [name for name in K2_SPECIAL_TOKENS if name != "<fim_suffix>"])
    assert restore(bare, fim_ids(bare, "plain", "none", 0, 0)) == "plain"
    with pytest.raises(DataError, match="has no <fim_suffix>"):
        fim_ids(bare, "cut", "psm", 1, 2)


# Choices


def test_choices_are_fixed_for_ever() -> None:
    """Catches another hash, key or scale: old folders could not be reproduced."""
    kinds = [choose_fim(22238, "stdlib/a.py", f"a.py:{i}", 0.25, 0.25) for i in range(8)]
    assert kinds == ["spm", "spm", "spm", "spm", "none", "spm", "psm", "psm"]
    cuts = [cut_points(22238, "stdlib/a.py", f"a.py:{i}", 1000) for i in range(4)]
    assert cuts == [(161, 522), (134, 962), (143, 397), (697, 911)]


@pytest.mark.parametrize(
    "psm, spm", [(0.25, 0.25), (0.5, 0.5), (0.1, 0.0), (0.0, 0.7), (0.0, 0.0), (1.0, 0.0)]
)
def test_shares_are_kept(psm: float, spm: float) -> None:
    """Catches shares swapped or scaled: counts over 4000 names lie within 4 deviations of their
    share.
    """
    kinds = [choose_fim(1, source, name, psm, spm) for source, name in NAMES]
    for kind, share in (("psm", psm), ("spm", spm), ("none", 1 - psm - spm)):
        assert abs(kinds.count(kind) - share * len(NAMES)) <= 4 * sqrt(
            len(NAMES) * share * (1 - share)
        )


def test_one_share_leaves_the_other_alone() -> None:
    """Catches documents of one kind that move when the share of the other changes."""

    def chosen(kind: Kind, psm: float, spm: float) -> set[tuple[str, str]]:
        return {
            (source, name)
            for source, name in NAMES
            if choose_fim(1, source, name, psm, spm) == kind
        }

    assert chosen("psm", 0.3, 0.1) == chosen("psm", 0.3, 0.5) > chosen("psm", 0.2, 0.5)
    assert chosen("spm", 0.0, 0.4) == chosen("spm", 0.6, 0.4) > chosen("spm", 0.6, 0.1)


def test_the_choice_hangs_on_every_part_of_the_name() -> None:
    """Catches a key without the seed, the source or the document, and two names with one key."""
    keys = [
        (1, "a", "b"),
        (2, "a", "b"),
        (1, "c", "b"),
        (1, "a", "d"),
        (1, "ab", ""),
        (1, "", "ab"),
        (1, "b", "a"),
    ]

    keys += [(1, "a\0b", "c"), (1, "a", "b\0c"), (1, "\udcff", "b")]
    assert len({cut_points(*key, 10**9) for key in keys}) == len(keys)

    for seed in (1, 2):
        kinds = [choose_fim(seed, source, name, 0.5, 0.5) for source, name in NAMES]
        cuts = [cut_points(seed, source, name, 99)[0] < 29 for source, name in NAMES]
        both = sum(kind == "psm" and early for kind, early in zip(kinds, cuts, strict=True))
        # Kind and cuts are drawn apart: about half of the early cuts are in psm documents.
        assert abs(both / sum(cuts) - 0.5) < 0.05


@given(st.integers(0, 2**64), st.text(), st.text(), st.integers(0, 2**40))
def test_cuts_lie_in_order_inside_the_text(
    seed: int, source: str, name: str, n_characters: int
) -> None:
    """Catches a cut after the end, and a prefix that ends after the middle."""
    a, b = cut_points(seed, source, name, n_characters)
    assert 0 <= a <= b <= n_characters


def test_cuts_are_even() -> None:
    """Catches cuts that never reach the ends or cluster: all 4 x 4 pairs of ends are equally
    frequent.
    """
    counts = np.zeros((4, 4))
    for source, name in NAMES:
        a, b = cut_points(7, source, name, 3)
        counts[a, b] += 1
    for a in range(4):
        for b in range(4):
            share = 0.0 if a > b else (1 if a == b else 2) / 16
            assert abs(counts[a, b] - share * len(NAMES)) <= 4 * sqrt(
                len(NAMES) * share * (1 - share)
            ), (a, b)


def test_the_shortest_documents_stay_plain() -> None:
    """Catches a document of at most one character divided in three; one of two may be cut."""
    for text in ("", "x", "\U0001d518"):
        assert choose_item(1, "s", "d", text, 0.5, 0.5) == Item(text, "none", 0, 0)
    item = choose_item(1, "s", "d", "xy", 0.5, 0.5)
    assert item == ("xy", choose_fim(1, "s", "d", 0.5, 0.5), *cut_points(1, "s", "d", 2))
    assert item.kind != "none"
    assert choose_item(1, "s", "d", "xy", 0.0, 0.0).kind == "none"
