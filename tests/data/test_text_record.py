"""Record of texts: read by ranges, compared whole or by a sample, damaged ones refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.data.prepare.write.text_files import merge_texts, write_texts
from k2train.data.source_record import compare_data
from k2train.data.text_record import (
    TextOverlap,
    TextRecord,
    exact_overlap,
    open_texts,
    sampled_overlap,
)
from k2train.errors import DataError
from k2train.files import sha256_file
from tests.support.data_folder import rewrite
from tests.support.tiny_corpus import make_corpus

LARGEST = 2**64 - 1
hashes = st.sets(
    st.one_of(st.integers(0, 40), st.integers(0, LARGEST), st.just(LARGEST)), max_size=60
)


def record_of(path: Path, found: set[int]) -> TextRecord:
    write_texts(path, np.array(sorted(found), dtype=np.uint64))
    return TextRecord(path)


@given(st.lists(hashes, max_size=4), st.sampled_from([1, 7, 1000]))
@settings(deadline=None, max_examples=40)
def test_merged_records_hold_each_text_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[set[int]], size: int
) -> None:
    """Catches a text lost at the border of two ranges, or listed twice; the file is plain NumPy."""
    folder = tmp_path_factory.mktemp("merge")
    paths = [folder / f"{number}.npy" for number in range(len(files))]
    for path, found in zip(paths, files, strict=True):
        record_of(path, found)
    wanted = sorted(set().union(*files))
    assert merge_texts(paths, folder / "texts.npy", size) == len(wanted)
    assert np.load(folder / "texts.npy").tolist() == wanted
    record = TextRecord(folder / "texts.npy")
    for low, high in ((0, 2**64), (3, 20), (LARGEST, 2**64), (20, 2**63)):
        assert record.between(low, high).tolist() == [h for h in wanted if low <= h < high]


few = st.sets(st.integers(0, 40), min_size=8)


@given(
    st.one_of(few, hashes),
    st.one_of(few, hashes),
    st.integers(1, 25),
    st.integers(1, 9),
    st.sampled_from([9, 1000]),
)
@settings(deadline=None, max_examples=100)
def test_a_sample_is_all_texts_up_to_a_hash(
    tmp_path_factory: pytest.TempPathFactory,
    first: set[int],
    second: set[int],
    sample: int,
    lookups: int,
    block: int,
) -> None:
    """Catches a text called new because the other folder was read to a smaller hash only, and a
    small folder that is not compared whole.
    """
    folder = tmp_path_factory.mktemp("pair")
    earlier, later = record_of(folder / "a.npy", first), record_of(folder / "b.npy", second)
    whole = TextOverlap(len(first & second), *[len(second)] * 2)
    assert exact_overlap(earlier, later, block) == whole

    found = sampled_overlap(earlier, later, sample, lookups)
    small, large = sorted((second, first), key=len)
    if len(small) <= lookups or max(len(small), len(large)) <= sample:
        assert found == whole and found.is_exact
        return
    # As many texts of the smaller folder as both heads have, or as are looked for.
    head = sorted(large)[sample - 1] if len(large) > sample else LARGEST
    wanted = max(lookups, sum(text <= head for text in sorted(small)[:sample]))
    bound = LARGEST if wanted >= len(small) else sorted(small)[wanted - 1]
    shared, compared = (sum(text <= bound for text in texts) for texts in (first & second, second))
    assert found == TextOverlap(shared, compared, len(second))


@pytest.mark.parametrize("is_later", [True, False])
@pytest.mark.parametrize(("count", "compared"), [(300, 300), (4096, 4096), (12_000, 4096)])
def test_a_small_folder_is_compared_with_a_large_one(
    tmp_path: Path, is_later: bool, count: int, compared: int
) -> None:
    """Catches a small next stage of which a handful of texts is compared, since few are among the
    first ones of a large folder.
    """
    random = np.random.Generator(np.random.Philox(key=1))
    large = np.sort(random.integers(0, 2**64, 500_000, dtype=np.uint64))
    # Every second text is shared, about.
    other = random.integers(0, 2**64, count // 2, dtype=np.uint64)
    small = np.sort(np.concatenate([random.choice(large, count - count // 2, False), other]))
    for name, texts in (("large", large), ("small", small)):
        write_texts(tmp_path / f"{name}.npy", texts)
    records = [TextRecord(tmp_path / f"{name}.npy") for name in ("large", "small")]
    found = sampled_overlap(*(records if is_later else records[::-1]))
    bound = small[compared - 1] if compared < len(small) else np.uint64(LARGEST)
    shared = np.intersect1d(small[small <= bound], large)
    assert len(shared) > 0.4 * compared
    assert found.shared == len(shared)
    later = small if is_later else large
    assert (found.compared, found.total) == (int(np.sum(later <= bound)), len(later))
    assert found.is_exact == (compared == len(small))


def test_a_text_is_found_in_few_reads_wherever_it_is(tmp_path: Path) -> None:
    """Catches a search that reads the whole file, or does not end where hashes are uneven."""
    even = np.random.Generator(np.random.Philox(key=1)).integers(0, 2**64, 10**5, dtype=np.uint64)
    uneven = np.arange(10**5, dtype=np.uint64) ** np.uint64(3)
    for texts, most in ((np.sort(even), 6), (uneven, 20)):
        write_texts(tmp_path / "texts.npy", texts)
        record = TextRecord(tmp_path / "texts.npy")
        for index in (0, 1, 600, len(texts) // 2, len(texts) - 1):
            for text in (int(texts[index]), int(texts[index]) + 1):
                with mock.patch.object(record, "read", wraps=record.read) as read:
                    known = text in texts[max(0, index - 2) : index + 3].tolist()
                    assert record.has(text) == known
                assert read.call_count <= most
        assert not record.has(LARGEST)


def test_all_texts_are_compared_in_small_reads(tmp_path: Path) -> None:
    """Catches a large earlier record that is read at once for a small later one."""
    random = np.random.Generator(np.random.Philox(key=1))
    large = np.sort(random.integers(0, 2**64, 100_000, dtype=np.uint64))
    write_texts(tmp_path / "large.npy", large)
    write_texts(tmp_path / "small.npy", large[::5000])
    records = [TextRecord(tmp_path / f"{name}.npy") for name in ("large", "small")]
    for pair in (records, records[::-1]):
        sizes: list[int] = []
        for record in records:
            record._file.read = largest_into(sizes, record._file.read)  # type: ignore[method-assign]
        found = exact_overlap(*pair, block=1000)
        assert (found.shared, found.total) == (20, len(pair[1]))
        assert max(sizes) < 2000 and sum(sizes) > 100_000


def largest_into(sizes: list[int], read: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    def counted(start: int, stop: int) -> Any:
        sizes.append(stop - start)
        return read(start, stop)

    return counted


@pytest.mark.parametrize("damage", ["missing", "cut", "order"])
def test_a_damaged_record_of_the_earlier_folder_leaves_the_files(
    tmp_path: Path, damage: str
) -> None:
    """Catches one missing file that turns off the comparison of source files as well."""
    made = {}
    for name in ("first", "next"):
        make_corpus(tmp_path / name, 1, seed=len(name))
        write_texts(tmp_path / name / "texts.npy", np.arange(9, dtype=np.uint64))
        texts = {"sha256": sha256_file(tmp_path / name / "texts.npy"), "count": 9}
        (tmp_path / name / "sources.json").write_text('{"training": ["a.txt"], "held_out": []}')
        sources = sha256_file(tmp_path / name / "sources.json")
        facts = {"texts": {"file": "texts.npy", **texts}, "sources_sha256": sources}
        made[name] = rewrite(tmp_path / name, facts=facts)
    content = (tmp_path / "first" / "texts.npy").read_bytes()
    changed = content[:-8] if damage == "cut" else content[:-16] + content[-8:] + content[-16:-8]

    for name in ("first", "next"):
        path = tmp_path / name / "texts.npy"
        path.unlink() if damage == "missing" else path.write_bytes(changed)
        if name == "first":
            found = compare_data(made["first"], made["next"])
            assert found.shared == ("source a.txt",)
            assert found.method == (
                "chunks and source files (the record of texts of first is missing or damaged)"
            )
            path.write_bytes(content)
    # The later folder's own record must be whole.
    with pytest.raises(DataError, match=r"next/texts\.npy.*fetch it again"):
        compare_data(made["first"], made["next"])


def test_what_is_said_of_a_sample_and_of_all() -> None:
    """Catches an estimate that passes for a count."""
    assert TextOverlap(3, 40, 40).message == "3 of its 40 documents by text"
    assert TextOverlap(3, 40, 40).method == "all 40 texts"
    some = TextOverlap(30, 1000, 500_000)
    assert some.message == (
        "about 15,000 of its 500,000 documents by text (30 of a sample of 1,000)"
    )
    assert some.method == "a sample of 1,000 of 500,000 texts"


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "fewer"])
def test_a_damaged_record_is_refused(tmp_path: Path, damage: str) -> None:
    """Catches a record of no texts, or of others, that lets a stage train on the same again."""
    make_corpus(tmp_path / "data", 1)
    path = tmp_path / "data" / "texts.npy"
    write_texts(path, np.arange(9, dtype=np.uint64))
    texts = {"file": "texts.npy", "sha256": sha256_file(path), "count": 9}
    manifest = rewrite(tmp_path / "data", facts={"texts": texts})
    record = open_texts(manifest)
    assert record is not None and len(record) == 9
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "other":
        np.save(path, np.zeros((9, 1)))
    else:
        write_texts(path, np.arange(8, dtype=np.uint64))
    with pytest.raises(DataError, match=r"texts\.npy.*fetch it again"):
        open_texts(manifest)


def test_folders_without_a_record_are_compared_as_before(tmp_path: Path) -> None:
    """Catches an older folder that is refused, or called compared by text."""
    older = make_corpus(tmp_path / "older", 1, seed=1)
    make_corpus(tmp_path / "newer", 1, seed=2)
    write_texts(tmp_path / "newer" / "texts.npy", np.arange(9, dtype=np.uint64))
    texts = {
        "file": "texts.npy",
        "sha256": sha256_file(tmp_path / "newer" / "texts.npy"),
        "count": 9,
    }
    newer = rewrite(tmp_path / "newer", facts={"texts": texts})
    assert open_texts(older) is None
    found = compare_data(older, newer)
    assert found.shared == ()
    assert found.method == "chunks and source files (older without a record of texts)"
    same = compare_data(newer, newer)
    assert same.shared[-1] == "9 of its 9 documents by text" and same.method == "all 9 texts"
