"""Sorted runs: documents come back sorted for any division, and other tools can read the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from k2train.data.document_keys import document_key64
from k2train.data.prepare.encode import run_writer, sorted_runs
from k2train.data.prepare.encode.run_writer import RunWriter
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.errors import DataError

# (source, name, tokens): sources ascend, names may be anything that is Unicode.
GOLDEN = 6519934819017967463
Documents = Sequence[tuple[str, str, list[int]]]
entries = st.lists(
    st.tuples(
        st.sampled_from(["a/1", "a/2", "b/1"]),
        st.text(max_size=5),
        st.lists(st.integers(0, 999), max_size=9),
    ),
    max_size=20,
).map(lambda found: sorted(found, key=lambda entry: entry[0]))


def write(
    folder: Path, documents: Documents, passes: int = 1, capacity: int = 64, dtype: str = "uint16"
) -> RunWriter:
    folder.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(folder / "000", "web", passes, 5, dtype, capacity)
    counts: dict[str, int] = {}
    for source, name, tokens in documents:
        ordinal = counts[source] = counts.get(source, -1) + 1
        pieces = (np.array(tokens, np.int32), np.array([2], np.int32)) if tokens else ()
        writer.add(source, ordinal, name.encode(), pieces, len(name), ordinal + 7, len(tokens) % 3)
    writer.flush()
    return writer


def read(writer: RunWriter, number: int) -> list[tuple[int, str, int, str, list[int]]]:
    return [
        entry
        for run in writer.runs[number]
        for entry in Run(writer.stem.with_name(run["path"])).documents()
    ]


@given(entries, st.integers(1, 3), st.sampled_from([1, 7, 64, 10_000]))
@settings(deadline=None, max_examples=60)
def test_every_pass_holds_every_document_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, passes: int, capacity: int
) -> None:
    """Catches documents lost between parts, a neighbour's tokens, and an unsorted run."""
    writer = write(tmp_path_factory.mktemp("runs"), documents, passes, capacity)
    counts: dict[str, int] = {}
    for number in range(passes):
        counts.clear()
        wanted = []
        for source, name, tokens in documents:
            ordinal = counts[source] = counts.get(source, -1) + 1
            key = document_key64(5, "web", number, source, name)
            wanted.append((key, source, ordinal, name, [*tokens, 2] if tokens else []))

        assert sorted(read(writer, number)) == sorted(wanted)

        for run in writer.runs[number]:
            order = [entry[:3] for entry in Run(writer.stem.with_name(run["path"])).documents()]
            assert order == sorted(order)
            assert (run["first_key"], run["last_key"]) == (order[0][0], order[-1][0])

        assert sum(run["tokens"] for run in writer.runs[number]) == sum(
            len(t) + 1 for _, _, t in documents if t
        )


def test_columns_stay_with_their_document(tmp_path: Path) -> None:
    """Catches one of the many arrays left in the order of reading."""
    documents = [("s", f"{'n' * i}", [i] * i) for i in range(1, 40)]
    (entry,) = write(tmp_path, documents, capacity=10_000).runs[0]
    run = Run(tmp_path / entry["path"])
    names = run.names()
    assert names != sorted(names)
    assert run.read("places").tolist() == [len(name) for name in names]
    assert run.read("ordinals").tolist() == [len(name) - 1 for name in names]
    assert run.read("texts").tolist() == [len(name) + 6 for name in names]
    assert run.read("fim").tolist() == [len(name) % 3 for name in names]
    assert run.read("lengths").tolist() == [len(name) + 1 for name in names]
    assert run.names(7, 12) == names[7:12]
    assert run.names(7, 7) == []
    assert run.source_keys == ["s"]
    assert (len(run), run.subset, run.pass_number) == (39, "web", 0)
    assert run.tokens_total == entry["tokens"]
    assert run.path.stat().st_size == entry["bytes"]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_library_reads_a_run(tmp_path: Path, dtype: str) -> None:
    """Catches a header that the safetensors library refuses, and ids cut to 16 bits."""
    highest = 2 ** (8 * np.dtype(dtype).itemsize - 1) - 1
    (entry,) = write(tmp_path, [("s", "é\0", [1, highest]), ("t", "b", [3])], dtype=dtype).runs[0]

    run = Run(tmp_path / entry["path"])
    with safe_open(run.path, "numpy") as file:
        assert set(file.keys()) == {
            *(
                "keys",
                "places",
                "texts",
                "name_ends",
                "lengths",
                "sources",
                "ordinals",
                "tokens",
                "fim",
                "names",
            )
        }
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).dtype == run.read(name).dtype
            assert file.get_tensor(name).tolist() == run.read(name).tolist()

        assert file.metadata()["format"] == sorted_runs.FORMAT

    assert highest in run.read("tokens").tolist()
    assert set(run.names()) == {"é\0", "b"}


def test_keys_are_fixed_for_ever() -> None:
    """Catches a change of the hash or its input: old preparations could not be reproduced."""
    assert document_key64(22238, "web", 0, "web/a.jsonl", "17") == GOLDEN
    others = [
        document_key64(22239, "web", 0, "web/a.jsonl", "17"),
        document_key64(22238, "code", 0, "web/a.jsonl", "17"),
        document_key64(22238, "web", 1, "web/a.jsonl", "17"),
        document_key64(22238, "web", 0, "web/b.jsonl", "17"),
        document_key64(22238, "web", 0, "web/a.jsonl", "18"),
    ]
    assert len({*others, GOLDEN}) == 6


def test_a_long_document_and_a_full_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a document longer than a run, memory that never shrinks, and an unbounded index."""
    monkeypatch.setattr(run_writer, "MAX_DOCUMENTS", 5)
    documents = [
        ("s", "0", [1]),
        ("s", "1", [2] * 100),
        *(("s", str(i), [3]) for i in range(2, 20)),
    ]
    writer = write(tmp_path, documents, capacity=20)
    assert len(writer._tokens) == 20
    assert max(run["documents"] for run in writer.runs[0]) == 5
    assert sorted(len(entry[4]) for entry in read(writer, 0)) == [2] * 19 + [101]


def test_blocks_of_the_gathering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens lost between two blocks of the sorted copy."""
    documents = [("s", str(i), [i] * (i % 7)) for i in range(60)]
    whole = read(write(tmp_path / "a", documents, capacity=10_000), 0)
    monkeypatch.setattr(run_writer, "GATHER_TOKENS", 5)
    assert read(write(tmp_path / "b", documents, capacity=10_000), 0) == whole


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a run under its final name, or next to it."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_writer, "_write_slices", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, [("s", "a", [1])])
    assert list(tmp_path.iterdir()) == []


def test_damaged_runs(tmp_path: Path) -> None:
    """Catches a damaged run that is read as a shorter one, or shown as a traceback."""
    (entry,) = write(tmp_path, [("s", "a", [1])]).runs[0]
    path = tmp_path / entry["path"]
    content = path.read_bytes()
    for broken in (
        content[:-1],
        content[:20],
        content[:4],
        b"",
        b"x" * 50,
        content.replace(b"k2train-run-1", b"k2train-run-0"),
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"not a run .*delete it and start"):
            Run(path)

    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Run(path)
