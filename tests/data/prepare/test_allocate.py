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
from k2train.data.manifest import Facts
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.allocate.deduplicate import flag_duplicates
from k2train.data.prepare.allocate.held_out import (
    exact,
    held_out_boundaries,
    position_histogram,
    samples_of,
)
from k2train.data.prepare.allocate.mixture import (
    allocate,
    apportion,
    keyed_permutation,
    row_positions,
    spread,
)
from k2train.data.prepare.allocate.passes import runs_of
from k2train.data.prepare.allocate.plan_file import Plan
from k2train.data.prepare.encode import sorted_runs
from k2train.data.prepare.source import POSITIONS
from k2train.data.prepare.workspace import Workspace, read_json, write_json
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.errors import DataError
from tests.support.sorted_runs import Text, is_inside, kept_texts, recipe_of, workspace_of

LENGTHS = np.random.Generator(np.random.Philox(key=2)).integers(1, 50, 300).tolist()


def texts_of(origin: str, count: int, files: int, copies: int = 0) -> list[Text]:
    """Random texts; `copies` of them repeat the text of another one."""
    found = [
        Text(origin, f"f{i % files:03d}", i // files, LENGTHS[i % 300], 1000 + i)
        for i in range(count)
    ]
    return found + [
        Text(origin, f"f{i % files:03d}", 10**6 + i, LENGTHS[i % 300], 1000 + i)
        for i in range(copies)
    ]


def planned(workspace: Workspace) -> dict[str, Any]:
    plan_task(workspace)
    content: dict[str, Any] = read_json(workspace.folder / "plan" / "plan.json")
    return content


# Mixing: arithmetic on counts


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(9, 60), min_size=1), st.integers(1, 9))
def test_chunks_are_even(counts: dict[str, int], chunks: int) -> None:
    """Catches a chunk with two samples of a subset, or two rows, more than another; and a sample
    lost or doubled.
    """
    plan = spread(counts, chunks)
    for name, count in counts.items():
        assert [i for part in plan for i in part[name]] == list(range(count))
        sizes = [len(part[name]) for part in plan]
        assert max(sizes) - min(sizes) <= 1
    rows = [sum(map(len, part.values())) for part in plan]
    assert max(rows) - min(rows) <= 1


def test_subset_too_small_for_the_chunks() -> None:
    """Catches chunks without any sample of a subset."""
    with pytest.raises(DataError, match="subset b gives 2 samples, fewer than the 3 chunks"):
        spread({"a": 9, "b": 2}, 3)


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
            flag_duplicates(aside, workspace.folder, runs_of_pass, ranks, part), dtype=bool
        )
        assert [path.name for path in aside.iterdir()] == ["duplicates"]
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


# Held out


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
    texts = {"code": texts_of("code", 120, 40, copies=20), "prose": texts_of("prose", 100, 30)}
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

        account = planned(workspace_of(Path(folder), recipe, texts, 3, 200))["account"]

    for name, item in account.items():
        inside = [text for text in texts[name] if is_inside(recipe, name, text)]
        kept = kept_texts(recipe, name, texts[name])
        assert item["documents_read"] == len(texts[name])
        assert item["outside_documents"] == len(texts[name]) - len(inside)
        assert item["duplicate_documents"] == len(inside) - len(kept)
        assert item["duplicate_tokens"] == sum(t.length for t in inside) - sum(
            t.length for t in kept
        )
        assert item["training_documents"] + item["held_out_documents"] == len(kept)
        tokens = item["training_tokens"]
        held = item["held_out_tokens"] + item["held_out_unused_tokens"]
        assert tokens + held == sum(text.length for text in kept)
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
