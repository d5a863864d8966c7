"""Plan task: documents left out, held out and trained on, and an account of every token."""

import tempfile
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.data.chunk import ChunkInfo, Manifest
from k2train.data.document_keys import chunks_of_document
from k2train.data.manifest_facts import Facts
from k2train.data.prepare.allocate import deduplicate
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.allocate.deduplicate import SEEN, TextRuns, flag_texts
from k2train.data.prepare.allocate.held_out import (
    exact,
    held_out_boundaries,
    position_histogram,
    samples_of,
)
from k2train.data.prepare.allocate.mixture import (
    allocate,
    apportion,
    count_of,
    keyed_permutation,
    row_positions,
    spread,
)
from k2train.data.prepare.allocate.passes import runs_of
from k2train.data.prepare.allocate.plan_file import Plan
from k2train.data.prepare.allocate.text_flags import seen_texts
from k2train.data.prepare.encode import sorted_runs
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import POSITIONS
from k2train.data.prepare.workspace import Workspace, read_json, write_json
from k2train.data.prepare.write.text_files import write_texts
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.data.text_record import TextRecord
from k2train.errors import DataError
from k2train.files import sha256_file
from tests.support.data_folder import rewrite
from tests.support.sorted_runs import (
    Text,
    is_inside,
    kept_texts,
    recipe_of,
    texts_on_side,
    workspace_of,
)
from tests.support.tiny_corpus import make_corpus

LENGTHS = np.random.Generator(np.random.Philox(key=2)).integers(1, 50, 300).tolist()


def texts_of(origin: str, count: int, files: int, copies: int = 0, first: int = 0) -> list[Text]:
    """Random texts; `copies` of them repeat the text of another one.

    Texts of two origins differ, unless both are given the same `first`.
    """
    first = first or (5000 if origin == "prose" else 1000)
    found = [
        Text(origin, f"f{i % files:03d}", i // files, LENGTHS[i % 300], first + i)
        for i in range(count)
    ]
    return found + [
        Text(origin, f"f{i % files:03d}", 10**6 + i, LENGTHS[i % 300], first + i)
        for i in range(copies)
    ]


def planned(workspace: Workspace) -> dict[str, Any]:
    plan_task(workspace)
    content: dict[str, Any] = read_json(workspace.folder / "plan" / "plan.json")
    return content


# Mixing: arithmetic on counts


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(9, 9000), min_size=1), st.integers(1, 9)
)
def test_chunks_are_even(counts: dict[str, int], chunks: int) -> None:
    """Catches a chunk with two samples of a subset, or two rows, more than another; and a sample
    lost or doubled.
    """
    plan = spread(counts, chunks, 8)
    for name, count in counts.items():
        dealt = [[i for samples in part[name] for i in samples] for part in plan]
        assert sorted(i for samples in dealt for i in samples) == list(range(count))
        assert all(samples == sorted(samples) for samples in dealt)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert [count_of(part[name]) for part in plan] == [len(samples) for samples in dealt]
    rows = [sum(map(count_of, part.values())) for part in plan]
    assert max(rows) - min(rows) <= 1


@given(st.integers(9, 9000), st.integers(2, 9), st.data())
def test_neighbours_are_dealt_to_all_chunks(count: int, chunks: int, data: st.DataObject) -> None:
    """Catches a long document that fills a chunk: its samples must be spread over all of them, one
    block more or less.
    """
    plan = spread({"before": 10, "books": count}, chunks, 8)
    first = data.draw(st.integers(0, count - 1))
    document = range(first, data.draw(st.integers(first, count)))
    block = 1 if count < 4096 else count // 2048
    shares = [sum(i in document for samples in part["books"] for i in samples) for part in plan]
    assert sum(shares) == len(document)
    assert max(shares) <= -(-len(document) // chunks) + 2 * block


def test_large_subsets_are_dealt_in_blocks() -> None:
    """Catches a chunk of a large corpus that reads single samples, or stretches that are shorter
    than a batch of the merge.
    """
    # K2's largest subset: 612.3 billion tokens, 360 chunks.
    samples = 612_300_000_000 // 2048
    plan = spread({"refinedweb": samples}, 360, 2048)
    blocks = [item for part in plan for item in part["refinedweb"]]
    assert max(map(len, blocks)) * 2048 == 2**26
    # A chunk's part is 1.7 billion tokens, at least 26 batches of 2**26.
    assert max(len(part["refinedweb"]) for part in plan) == 26
    assert [len(part["refinedweb"]) for part in spread({"refinedweb": 10**6}, 4, 2048)] == [513] * 4
    # A single chunk takes everything, as one stretch.
    assert spread({"a": 10**6}, 1, 2048) == [{"a": (range(10**6),)}]


def test_subset_too_small_for_the_chunks() -> None:
    """Catches chunks without any sample of a subset."""
    with pytest.raises(DataError, match="subset b gives 2 samples, fewer than the 3 chunks"):
        spread({"a": 9, "b": 2}, 3, 8)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=1), st.floats(0, 1))
def test_apportion_adds_up(weights: dict[str, int], part: float) -> None:
    """Catches rounding that loses a row, or asks a subset for more than it has."""
    total = int(part * sum(weights.values()))
    parts = apportion(total, weights)
    assert sum(parts.values()) == total
    assert all(parts[name] <= weights[name] for name in weights)
    assert all(
        abs(parts[n] * sum(weights.values()) - total * w) < sum(weights.values())
        for n, w in weights.items()
        if w
    )


def test_allocation() -> None:
    """Catches a filling subset that takes the others' rows, and a shortage that goes unnoticed."""
    available = {"code": 50, "prose": 10}
    assert allocate(available, None, None) == available
    assert allocate(available, 30, "code") == {"code": 20, "prose": 10}
    assert allocate(available, 30, None) == {"code": 25, "prose": 5}
    assert sum(allocate(available, 6, "code").values()) == 6
    with pytest.raises(DataError, match="needs 61 samples, the subsets hold 60"):
        allocate(available, 61, "code")


def test_permutation_is_fixed_for_ever() -> None:
    """Catches a change of the generator, of its key, or of the sort: old folders could not be made
    again.
    """
    assert keyed_permutation(10, 22238, "rows of chunk_000").tolist() == [
        5,
        8,
        0,
        6,
        2,
        7,
        1,
        3,
        4,
        9,
    ]

    assert row_positions(10, 22238, "chunk_000").tolist() == [2, 6, 4, 7, 8, 0, 3, 5, 1, 9]
    assert sorted(keyed_permutation(1000, 1, "x")) == list(range(1000))
    assert keyed_permutation(50, 1, "x").tolist() != keyed_permutation(50, 2, "x").tolist()


# Duplicates


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.integers(1, 3),
    st.sampled_from([1, 4, 2**20]),
)
@settings(deadline=None, max_examples=25)
def test_the_first_of_equal_texts_stays(contents: list[int], tasks: int, part: int) -> None:
    """Catches a text kept twice or not at all, one kept that is not the first by name, and parts
    that are not searched.
    """
    texts = [Text("code", f"f{i * 7 % 5}", i, 3, content) for i, content in enumerate(contents)]
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        recipe = recipe_of(Path(folder), {"code": {"drop_duplicates": True, "share": [0.0, 0.6]}})
        workspace = workspace_of(Path(folder), recipe, {"code": texts}, tasks, capacity=12)
        runs_of_pass = runs_of(workspace)["code"][0]
        ranks = {f"code/f{i}": i for i in range(5)}
        aside = Path(folder) / "aside"
        aside.mkdir()
        flags = np.fromfile(
            flag_texts(aside, workspace.folder, [TextRuns(runs_of_pass, 0, True)], ranks, (), part),
            dtype=bool,
        )
        assert [path.name for path in aside.iterdir()] == ["flags"]
        found = [
            document
            for entry in runs_of_pass
            for document in sorted_runs.Run(workspace.folder / entry.path).documents()
        ]

    first: dict[int, Text] = {}
    for text in sorted(texts, key=lambda t: (t.source, t.ordinal)):
        first.setdefault(text.content, text)
    kept = {(text.source, text.ordinal) for text in first.values()}
    assert len(found) == len(texts)
    assert [(source, ordinal) not in kept for _, source, ordinal, *_ in found] == flags.tolist()


def test_duplicates_are_found_over_all_subsets(tmp_path: Path) -> None:
    """Catches a text kept in two subsets, one lost because its first copy is in a subset that
    keeps duplicates, and a document that two subsets read on purpose taken for its own copy.
    """
    both = {"origin": "files", "drop_duplicates": True}
    recipe = recipe_of(
        tmp_path,
        {"web": both, "again": both, "books": {"drop_duplicates": True}, "notes": {}},
        chunks=1,
    )
    web = [Text("files", "a", i, 9, i) for i in range(20)]
    texts = {
        "web": web,
        "again": web,
        "books": [Text("books", "a", i, 9, i + 12) for i in range(20)],
        "notes": [Text("notes", "a", i, 9, i) for i in range(20)],
    }
    account = planned(workspace_of(tmp_path, recipe, texts, 2, 60))["account"]
    found = {
        name: (item["duplicate_documents"], item["duplicate_tokens"])
        for name, item in account.items()
    }
    assert found == {"web": (0, 0), "again": (0, 0), "books": (8, 72), "notes": (0, 0)}


@pytest.mark.parametrize("part", [1, 4, 2**20])
def test_seen_texts_are_flagged_whatever_the_subset_keeps(tmp_path: Path, part: int) -> None:
    """Catches a text of an earlier stage that is trained on again, and one that is left out
    because the hash of another is near.
    """
    recipe = recipe_of(tmp_path, {"web": {}})
    web = [Text("web", f"f{i % 3}", i, 3, i) for i in range(60)]
    workspace = workspace_of(tmp_path, recipe, {"web": web}, 2, 12)
    entries = runs_of(workspace)["web"][0]
    hashes = [
        np.array(sorted(t.text for t in web[a:b]), dtype=np.uint64) for a, b in [(3, 9), (8, 20)]
    ]
    records = []
    for number, found in enumerate([*hashes, *(np.unique(h - np.uint64(1)) for h in hashes)]):
        write_texts(tmp_path / f"{number}.npy", found)
        records.append(TextRecord(tmp_path / f"{number}.npy"))
    aside = tmp_path / "aside"
    aside.mkdir()
    ranks = {f"web/f{i}": i for i in range(3)}
    runs = [TextRuns(entries, 0, False)]
    for seen, wanted in ((records[:2], set(range(3, 20))), (records[2:], set()), ((), set())):
        path = flag_texts(aside, workspace.folder, runs, ranks, seen, part)
        flags = np.fromfile(path, dtype=np.uint8)
        found = [
            ordinal
            for entry in entries
            for _, _, ordinal, *_ in sorted_runs.Run(workspace.folder / entry.path).documents()
        ]
        assert {o for o, flag in zip(found, flags.tolist(), strict=True) if flag == SEEN} == wanted
        assert set(flags.tolist()) <= {0, SEEN}


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 70), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_flags_are_those_of_their_documents(wanted: list[int], size: int, held: int) -> None:
    """Catches a flag at the border of two ranges that is lost, or given to a neighbour."""
    with tempfile.TemporaryDirectory() as folder:
        flags = deduplicate._FlagFile(Path(folder), len(wanted), size, held)
        for index in [*range(1, len(wanted), 2), *range(0, len(wanted), 2)]:
            if wanted[index]:
                flags.add(np.array([index], dtype=np.uint64), wanted[index])
        assert list(flags.write().read_bytes()) == wanted
        assert [path.name for path in Path(folder).iterdir()] == ["flags"]


def test_many_flags_are_written_in_few_steps(tmp_path: Path) -> None:
    """Catches one write per document, which takes hours for a corpus of many copies."""
    texts = np.zeros(100_000, dtype=deduplicate.RECORD)
    texts["order"] = texts["position"] = np.arange(100_000)
    texts["drops"] = 1
    flags = deduplicate._FlagFile(tmp_path, len(texts))
    with mock.patch("os.pwrite") as write, mock.patch.object(flags, "add", wraps=flags.add) as add:
        deduplicate._flag_part(flags, texts, ())
        found = np.fromfile(flags.write(), dtype=np.uint8)
    assert (write.call_count, add.call_count) == (0, 2)
    assert found.tolist() == [0] + [deduplicate.DUPLICATE] * 99_999


def test_a_large_earlier_record_is_read_in_parts(tmp_path: Path) -> None:
    """Catches a record of 8 GB in memory because the new corpus is small."""
    recipe = recipe_of(tmp_path, {"web": {}})
    web = [Text("web", "f0", i, 3, i) for i in range(40)]
    workspace = workspace_of(tmp_path, recipe, {"web": web}, 1, 12)
    random = np.random.Generator(np.random.Philox(key=3))
    others = random.integers(0, 2**64, 20_000, dtype=np.uint64)
    known = np.array([text.text for text in web[:9]], dtype=np.uint64)
    write_texts(tmp_path / "texts.npy", np.sort(np.concatenate([others, known])))
    record, read = TextRecord(tmp_path / "texts.npy"), []
    entries = runs_of(workspace)["web"][0]

    def between(low: int, high: int) -> Any:
        read.append(TextRecord.between(record, low, high))
        return read[-1]

    with mock.patch.object(record, "between", between):
        runs = [TextRuns(entries, 0, False)]
        path = flag_texts(tmp_path, workspace.folder, runs, {"web/f0": 0}, [record], 100)
    assert np.fromfile(path, dtype=np.uint8).sum() == SEEN * 9
    assert 1 < max(map(len, read)) < 200


def seen_folder(folder: Path, hashes: list[int]) -> Manifest:
    """A data folder with a record of these texts."""
    make_corpus(folder, 1)
    path = folder / "texts.npy"
    write_texts(path, np.array(sorted(hashes), dtype=np.uint64))
    texts = {"file": path.name, "sha256": sha256_file(path), "count": len(hashes)}
    return rewrite(folder, facts={"texts": texts})


def test_the_plan_says_which_texts_it_left_out(tmp_path: Path) -> None:
    """Catches a digest of one record beside the flags of another, the order of `seen` that
    matters, and a folder that counts twice.
    """
    web = [Text("web", f"f{i % 3}", i, 30, i) for i in range(60)]
    parts = {"a": web[:9], "b": web[9:20], "c": web[30:31]}
    made = {
        name: seen_folder(tmp_path / name, [text.text for text in texts])
        for name, texts in parts.items()
    }
    digests = {name: sha256_file(tmp_path / name / "texts.npy") for name in made}
    for order in ("abc", "cbab"):
        paths = [made[name].path for name in order]
        recipe = recipe_of(tmp_path / order, {"web": {}}, seen=paths)
        plan = planned(workspace_of(tmp_path / order, recipe, {"web": web}, 2, 120))
        assert plan["seen"] == sorted(digests.values())
        assert plan["account"]["web"]["seen_documents"] == 21


@pytest.mark.parametrize("damage", ["other", "order", "missing", "manifest"])
def test_a_damaged_record_of_seen_texts_is_refused(tmp_path: Path, damage: str) -> None:
    """Catches texts that are trained on again because the record of them is damaged, while the new
    folder says that they were left out.
    """
    web = [Text("web", f"f{i % 3}", i, 30, i) for i in range(60)]
    manifest = seen_folder(tmp_path / "a", [text.text for text in web[:9]])
    recipe = recipe_of(tmp_path, {"web": {}}, seen=[manifest.path])
    workspace = workspace_of(tmp_path, recipe, {"web": web}, 2, 120)
    assert len(seen_texts(recipe, verify=True)) == 1
    path = tmp_path / "a" / "texts.npy"
    content = path.read_bytes()
    if damage == "other":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "order":
        path.write_bytes(content[:128] + content[136:] + content[128:136])
    else:
        (path if damage == "missing" else manifest.path).unlink()
    name = "manifest.json" if damage == "manifest" else "texts.npy"
    for call in (lambda: plan_task(workspace), lambda: seen_texts(recipe, verify=True)):
        with pytest.raises(DataError, match=rf"^seen: /\S*{name}\b"):
            call()
    assert not (workspace.folder / "plan" / "plan.json").exists()


# Held out


@pytest.mark.parametrize("split_by", ["text", "source"])
@pytest.mark.parametrize("held_out", [{"rows": 90}, {"share": 0.3}])
def test_no_held_out_text_is_trained_on(
    tmp_path: Path, split_by: str, held_out: dict[str, Any]
) -> None:
    """Catches a text that is held out under one name and trained on under another: in the same
    file, in another file, and in a subset that has another boundary.
    """
    subsets = {
        "code": {"split_by": split_by, "share": [0.0, 0.9], "repeat": 2},
        "prose": {"split_by": split_by},
    }
    recipe = recipe_of(tmp_path, subsets, held_out=held_out)
    texts = {
        "code": texts_of("code", 150, 40, copies=100),
        "prose": texts_of("prose", 300, 70, first=1000),
    }
    workspace = workspace_of(tmp_path, recipe, texts, 3, 200)
    plan = planned(workspace)
    sides: dict[int, set[int]] = {1: set(), 2: set()}
    for name, passes in runs_of(workspace).items():
        for number, entries in enumerate(passes):
            files = plan["subsets"][recipe_index(recipe, name)]["passes"][number]["files"]
            masks = np.fromfile(workspace.folder / "plan" / f"{files}.masks", dtype=np.uint8)
            for entry in entries:
                hashes = sorted_runs.Run(workspace.folder / entry.path).read("texts")
                mask = masks[entry.first : entry.first + entry.documents]
                for side, found in sides.items():
                    found |= set(hashes[mask == side].tolist())

    assert len(sides[1]) > 100 and len(sides[2]) > 10
    assert sides[1].isdisjoint(sides[2])
    # By text all copies are at one place. So none of the subset whose held-out part begins first
    # had to be left out: only texts that another one holds out, and this one does not.
    places = plan["held_out_places"]
    copies = {name: item["held_out_copy_documents"] for name, item in plan["account"].items()}
    assert sum(copies.values()) > 0 and len(set(places.values())) == 2
    assert split_by == "source" or copies[min(places, key=places.__getitem__)] == 0


def recipe_index(recipe: Recipe, name: str) -> int:
    return list(recipe.subsets).index(name)


def test_rows_are_held_out_at_the_upper_end(tmp_path: Path) -> None:
    """Catches more text held out than needed, and boundaries that differ within an origin."""
    shared = {"origin": "files", "share": [0.0, 0.7]}
    recipe = recipe_of(
        tmp_path, {"code": shared, "docs": shared, "prose": {}}, held_out={"rows": 30}
    )
    texts = {
        "code": texts_of("files", 300, 100),
        "docs": [t for t in texts_of("files", 300, 100) if t.ordinal == 1],
        "prose": texts_of("prose", 200, 50),
    }
    content = planned(workspace_of(tmp_path, recipe, texts, 2, 700))
    boundaries, account = content["held_out_places"], content["account"]
    assert boundaries["code"] == boundaries["docs"] != boundaries["prose"]
    quota = {name: item["held_out_tokens"] for name, item in account.items()}
    assert sum(quota.values()) == 30 * 8

    slack = []
    for name, listed in texts.items():
        inside = [text for text in listed if is_inside(recipe, name, text)]
        held = [text for text in inside if text.position >= boundaries[name]]
        assert account[name]["held_out_documents"] == len(held)
        assert account[name]["training_documents"] == len(inside) - len(held)
        tokens = sum(text.length for text in held)
        assert account[name]["held_out_unused_tokens"] == tokens - quota[name] >= 0
        lowest = min(text.position for text in held)
        slack.append(
            tokens - sum(text.length for text in held if text.position == lowest) < quota[name]
        )

    # Without its lowest file one of the subsets of each origin would have too little.
    assert slack[0] or slack[1]
    assert slack[2]


def test_the_highest_boundary_that_suffices(tmp_path: Path) -> None:
    """Catches a bucket too many or too few, and one subset's boundary used for another's files."""
    recipe = recipe_of(tmp_path, {"a": {"share": [0.0, 0.5]}, "b": {}}, held_out={"rows": 4})
    counts = {name: np.full(2**16, 3, dtype=np.int64) for name in ("a", "b")}
    # Two rows of 8 tokens from each: six buckets of 3.
    assert held_out_boundaries(recipe, counts) == {
        "a": (2**16 - 6) * 2**31,
        "b": (2**16 - 6) * 2**32,
    }
    counts["b"][-6] = 0
    assert held_out_boundaries(recipe, counts)["b"] == (2**16 - 7) * 2**32


def test_quotas_follow_what_is_trained_on(tmp_path: Path) -> None:
    """Catches held-out rows in proportion to file sizes where a repeat or a limit changes the
    shares.
    """
    subsets = {"a": {"repeat": 3}, "b": {}, "c": {"limit_tokens": 800}}
    recipe = recipe_of(tmp_path, subsets, held_out={"rows": 40})
    texts = {name: texts_of(name, 200, 60) for name in subsets}
    account = planned(workspace_of(tmp_path, recipe, texts))["account"]
    tokens = sum(text.length for text in texts["a"])
    samples = {"a": 3 * tokens // 8, "b": tokens // 8, "c": 100}
    expected = apportion(40, samples)
    assert {name: item["held_out_tokens"] // 8 for name, item in account.items()} == expected
    assert expected["a"] > 2 * expected["b"] > expected["c"]


def test_a_share_is_held_out_exactly(tmp_path: Path) -> None:
    """Catches a boundary rounded the other way, and rows that are not all of the share."""
    recipe = recipe_of(tmp_path, {"code": {"share": [0.2, 0.7]}}, held_out={"share": 0.1})
    texts = {"code": texts_of("code", 300, 100)}
    content = planned(workspace_of(tmp_path, recipe, texts))
    boundary = content["held_out_places"]["code"]
    assert boundary - 1 < Fraction("0.65") * POSITIONS <= boundary
    tokens = sum(t.length for t in texts["code"] if boundary <= t.position < 0.7 * POSITIONS)
    item = content["account"]["code"]
    assert (item["held_out_tokens"], item["held_out_unused_tokens"]) == (
        tokens // 8 * 8,
        tokens % 8,
    )


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (
            {"rows": 9000},
            r"code must give 9000 held-out rows of 8 = 72000 tokens but has \d{4} for it: lower "
            r"held_out.rows to",
        ),
        (
            {"rows": 300, "share": 0.05},
            r"code must give 300 .* lower held_out.rows to \d+, or raise held_out.share$",
        ),
        (
            {"rows": 300, "share": 0.0001},
            r"subset code must give 300 .* but has 0 for it: raise held_out.share$",
        ),
        ({"share": 1e-9}, r"held_out.share \(1e-09\) holds out 0 tokens, less than one row of 8"),
    ],
)
def test_too_little_to_hold_out(held_out: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Catches a held-out chunk that is silently smaller than asked, or empty."""
    recipe = recipe_of(tmp_path, {"code": {}}, held_out=held_out)
    with pytest.raises(DataError, match=words):
        plan_task(workspace_of(tmp_path, recipe, {"code": texts_of("code", 300, 100)}))


@pytest.mark.parametrize("held_out", [{"rows": 9000}, {"rows": 300, "share": 0.05}])
def test_the_number_to_lower_to_will_do(held_out: dict[str, Any], tmp_path: Path) -> None:
    """Catches advice that is refused again, and advice for fewer rows than could be held out."""
    texts = {"code": texts_of("code", 300, 300), "prose": texts_of("prose", 150, 150)}
    subsets: dict[str, Any] = {"code": {"repeat": 2}, "prose": {}}
    workspace = workspace_of(tmp_path, recipe_of(tmp_path, subsets, held_out=held_out), texts)
    with pytest.raises(DataError, match=r"lower held_out.rows to (\d+)") as refused:
        plan_task(workspace)
    most = int(str(refused.value).split("held_out.rows to ")[1].split(",")[0])
    (tmp_path / "again").mkdir()

    for rows in (most, most + 1 + most // 5):
        changed = recipe_of(tmp_path, subsets, held_out={**held_out, "rows": rows})
        workspace = workspace_of(tmp_path / "again", changed, texts)
        if rows == most:
            assert (
                sum(item["held_out_tokens"] for item in planned(workspace)["account"].values())
                == 8 * most
            )
        else:
            with pytest.raises(DataError):
                plan_task(workspace)


def test_histogram_by_position() -> None:
    """Catches positions beyond the first or last bucket, and counts that overflow."""
    low, high = round(0.25 * POSITIONS), round(0.75 * POSITIONS)
    positions = np.array([low, (low + high) // 2, high - 1], dtype=np.uint64)
    counts = position_histogram((0.25, 0.75), positions, np.array([1, 2, 4]))
    assert np.flatnonzero(counts).tolist() == [0, 2**15, 2**16 - 1]
    assert counts[counts > 0].tolist() == [1, 2, 4]
    histogram = position_histogram(
        (0.0, 1.0), np.array([0, POSITIONS - 1], dtype=np.uint64), np.array([1, 2])
    )
    assert (histogram[0], histogram[-1]) == (1, 2)


def test_numbers_mean_what_is_written(tmp_path: Path) -> None:
    """Catches 0.7 of 10 tokens computed as 6, since 0.7 is a little less in binary."""
    assert int(exact(0.7) * 10) == 7
    recipe = recipe_of(tmp_path, {"code": {"repeat": 0.7}}, sequence_length=7)
    assert samples_of(recipe, {"code": 10}) == {"code": 1}
    assert held_out_boundaries(recipe, {}) == {"code": POSITIONS}


# The account


@given(
    st.sampled_from([0.3, 0.5, 1, 1.5, 2]),
    st.sampled_from([None, {"rows": 6}, {"share": 0.3}]),
    st.sampled_from([None, 300]),
    st.sampled_from([None, 12]),
)
@settings(deadline=None, max_examples=25)
def test_account_adds_up(
    repeat: float, held_out: dict[str, Any] | None, limit: int | None, rows_per_chunk: int | None
) -> None:
    """Catches documents or tokens that are missing from the account, or counted twice."""
    texts = {
        "code": texts_of("code", 120, 40, copies=20),
        "prose": texts_of("prose", 100, 30, 0, 1000),
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        code = {
            "repeat": repeat,
            "drop_duplicates": True,
            "share": [0.0, 0.8],
            "limit_tokens": limit,
        }

        recipe = recipe_of(
            Path(folder),
            {"code": code, "prose": {}},
            held_out=held_out,
            rows_per_chunk=rows_per_chunk,
        )

        plan = planned(workspace_of(Path(folder), recipe, texts, 3, 200))

    account = plan["account"]
    for name, item in account.items():
        inside = [text for text in texts[name] if is_inside(recipe, name, text)]
        kept = kept_texts(recipe, name, texts)
        assert item["documents_read"] == len(texts[name])
        assert item["outside_documents"] == len(texts[name]) - len(inside)
        assert item["duplicate_documents"] == len(inside) - len(kept)
        assert item["duplicate_tokens"] == sum(t.length for t in inside) - sum(
            t.length for t in kept
        )
        trained, held_out_texts = (
            texts_on_side(recipe, name, texts, plan["held_out_places"], held)
            for held in (False, True)
        )
        assert item["training_documents"] == len(trained)
        assert item["held_out_documents"] == len(held_out_texts)
        tokens = item["training_tokens"]
        assert tokens == sum(text.length for text in trained)
        held = item["held_out_tokens"] + item["held_out_unused_tokens"]
        assert held == sum(text.length for text in held_out_texts)
        copies = [text for text in kept if text not in trained and text not in held_out_texts]
        assert item["held_out_copy_documents"] == len(copies)
        assert item["held_out_copy_tokens"] == sum(text.length for text in copies)
        assert item["asked_tokens"] == int(Fraction(str(recipe.subsets[name].repeat)) * tokens)
        assert item["passes"] * tokens == sum(
            item[f"{part}_tokens"] for part in ("used", "unused", "tail", "left_by_repeat")
        )
        assert 0 <= item["tail_tokens"] < 8
        if limit is None and rows_per_chunk is None:
            assert item["unused_tokens"] == 0

    assert account["code"]["duplicate_documents"] > 0
    if limit is not None:
        assert account["code"]["used_tokens"] <= limit
    if rows_per_chunk is not None:
        assert sum(item["used_samples"] for item in account.values()) == 24


def test_shared_ids_are_reported_beside_the_account(tmp_path: Path) -> None:
    """Catches a count of the encode tasks that is lost, or that takes documents out of the sums."""
    recipe = recipe_of(tmp_path, {"code": {}, "prose": {}})
    texts = {name: texts_of(name, 100, 30) for name in ("code", "prose")}

    workspace = workspace_of(tmp_path, recipe, texts, tasks=2)
    for number, count in ((0, 3), (1, 4)):
        record = read_json(workspace.encode_record(number))
        record["subsets"]["code"]["repeated_ids"] = count
        write_json(workspace.encode_record(number), record)

    account = planned(workspace)["account"]
    assert {name: item["repeated_id_documents"] for name, item in account.items()} == {
        "code": 7,
        "prose": 0,
    }
    assert account["code"]["training_documents"] == account["code"]["documents_read"] == 100


def test_too_few_samples(tmp_path: Path) -> None:
    """Catches chunks that come out smaller than the recipe says."""
    recipe = recipe_of(tmp_path, {"code": {}}, rows_per_chunk=5000)
    with pytest.raises(
        DataError, match=r"needs 10000 samples, the subsets hold \d+ without what is held out"
    ):
        plan_task(workspace_of(tmp_path, recipe, {"code": texts_of("code", 100, 10)}))


def test_plan_does_not_depend_on_runs(tmp_path: Path) -> None:
    """Catches an account, boundary or key range that depends on the division into runs."""
    texts = {"code": texts_of("code", 200, 40, copies=9), "prose": texts_of("prose", 200, 30)}
    found = []
    for tasks, capacity in ((1, 10**6), (7, 90)):
        folder = tmp_path / str(tasks)
        folder.mkdir()
        code = {"drop_duplicates": True, "share": [0.1, 0.9]}
        recipe = recipe_of(folder, {"code": code, "prose": {"repeat": 1.5}}, held_out={"rows": 5})
        content = planned(workspace_of(folder, recipe, texts, tasks, capacity))
        found.append(
            {key: value for key, value in content.items() if key not in ("files", "subsets")}
        )
    assert found[0] == found[1]


def test_plan_twice_and_after_a_kill(tmp_path: Path) -> None:
    """Catches a plan that differs the second time, and one that counts as complete without its
    files.
    """
    recipe = recipe_of(tmp_path, {"code": {"drop_duplicates": True}})
    workspace = workspace_of(tmp_path, recipe, {"code": texts_of("code", 100, 10, copies=5)})
    with (
        mock.patch(
            "k2train.data.prepare.allocate.allocate.write_json", side_effect=KeyboardInterrupt
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        plan_task(workspace)

    with pytest.raises(DataError, match=r"plan.json: no plan"):
        Plan.read(workspace.folder)
    content = planned(workspace)
    before = {path.name: path.read_bytes() for path in (workspace.folder / "plan").iterdir()}
    assert sorted(before) == ["0_000.buckets", "0_000.marks", "0_000.masks", "plan.json"]
    for entry in content["files"]:
        assert (workspace.folder / entry["path"]).stat().st_size == entry["bytes"]
    plan_task(workspace)
    assert {
        path.name: path.read_bytes() for path in (workspace.folder / "plan").iterdir()
    } == before


# Finding a document


def test_document_keys_name_the_right_chunks(tmp_path: Path) -> None:
    """Catches a chunk that holds a document but is not listed, and one listed needlessly."""
    texts = {"code": texts_of("code", 300, 40), "prose": texts_of("prose", 300, 30)}
    recipe = recipe_of(
        tmp_path, {"code": {"repeat": 1.5}, "prose": {}}, held_out={"rows": 20}, chunks=6
    )
    workspace = workspace_of(tmp_path, recipe, texts, 2, 900)
    keys = planned(workspace)["document_keys"]

    infos = []
    where: dict[tuple[str, str, str], set[str]] = {}
    for number, name in enumerate(workspace.chunk_names):
        chunk_task(workspace, number)
        infos.append(ChunkInfo(**read_json(workspace.chunk_record(name))["info"]))
        for line in parquet.read_table(workspace.target / f"{name}.parquet").to_pylist():
            where.setdefault((line["subset"], line["source"], line["document"]), set()).add(name)

    manifest = Manifest(
        path=tmp_path,
        sha256="m",
        tokenizer_sha256="t",
        sequence_length=8,
        vocab_size=300,
        dtype="uint16",
        chunks=tuple(infos),
        facts=Facts(document_keys=keys),
    )
    listed = 0

    for document, chunks in where.items():
        found = chunks_of_document(manifest, *document)
        assert found is not None
        assert chunks <= found
        listed += len(found)

    assert listed < 2 * sum(map(len, where.values()))
    assert chunks_of_document(manifest, "other", "code/f000", "d0é") is None
    without = manifest.model_copy(update={"facts": Facts()})
    assert chunks_of_document(without, "code", "code/f000", "d0é") is None
    for wrong, words in (
        ({"scheme": "another", "subsets": 3}, None),
        ({**keys, "seed": "1"}, "facts.document_keys: key 'seed' must be a whole number"),
        ({**keys, "subsets": {"code": {"bits": [65], "chunks": {}}}}, "code.bits"),
    ):
        hostile = manifest.model_copy(update={"facts": Facts(document_keys=wrong)})
        with pytest.raises(DataError, match=words) if words else nullcontext():
            assert chunks_of_document(hostile, "code", "code/f000", "d0é") is None
