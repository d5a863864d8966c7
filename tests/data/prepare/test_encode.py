"""Encode task: every document goes where its name says, once, for any grouping of sources."""

import functools
import gzip
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2train.data.document_keys import document_key64
from k2train.data.prepare.encode import encode
from k2train.data.prepare.encode.encode import drawn_position, encode_task
from k2train.data.prepare.encode.fill_in_middle import choose_fim, restore
from k2train.data.prepare.encode.sorted_runs import Run
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import (
    POSITIONS,
    split_position,
    text_digest,
    text_hash,
    text_position,
)
from k2train.data.prepare.sources import stdlib
from k2train.data.prepare.sources.changes import changed_sources, sources_identity
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.rejected import REJECTED_NAME, check_rejected
from k2train.data.prepare.workspace import Workspace, read_json
from k2train.data.source_record import SourceFile
from k2train.data.tokenizer import EOS_ID, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from tests.support.traced_memory import traced_peak

WEB = {"kind": "jsonl", "paths": ["web/*.jsonl"], "id_key": "id"}
UNITS = ("", "_bytes")


def text_of(number: int) -> str:
    choose = random.Random(number)
    words = [
        "def",
        "return",
        "the",
        "value",
        "of",
        "a list",
        "self",
        "</s>",
        "\n    ",
        "\u00e4",
        "\u2581",
        "x = 1",
    ]

    return " ".join(choose.choice(words) for _ in range(choose.randrange(1, 40))) + f" {number}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text_of(i) for i in range(300)], 320)


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six files of 30 documents in the working directory: web/0.jsonl ... with ids d0 ... d179."""
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()
    for file in range(6):
        lines = [{"id": f"d{n}", "text": text_of(n)} for n in range(30 * file, 30 * file + 30)]
        Path(f"web/{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_workspace(
    tokenizer: Tokenizer,
    subsets: dict[str, Any],
    folder: str = "work",
    max_rejected_share: float = 0.01,
    **executor: Any,
) -> Workspace:
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "output": "out",
            "seed": 5,
            "sequence_length": 16,
            "chunks": 1,
            "tokenizer": {"model": "t.model"},
            "subsets": subsets,
            "max_rejected_share": max_rejected_share,
            "executor": executor,
        }
    )

    tasks = encode_tasks(recipe, list_sources(recipe))
    return Workspace.create(Path(folder).resolve(), Path("out.tmp"), recipe, tokenizer, tasks)


def encode_all(
    tokenizer: Tokenizer, subsets: dict[str, Any], folder: str = "work", **options: Any
) -> Workspace:
    workspace = make_workspace(tokenizer, subsets, folder, **options)
    for number in range(len(workspace.tasks)):
        encode_task(workspace, number)
    return workspace


def records(workspace: Workspace) -> list[dict[str, Any]]:
    return [read_json(workspace.encode_record(number)) for number in range(len(workspace.tasks))]


def counts(workspace: Workspace, subset: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records(workspace):
        total.update(
            {key: n for key, n in record["subsets"].get(subset, {}).items() if isinstance(n, int)}
        )
    return total


Entry = tuple[int, str, int, str, tuple[int, ...], int, int, int]


def entries(workspace: Workspace, subset: str, number: int = 0) -> list[Entry]:
    """All columns of the runs of a pass, per document, sorted."""
    found: list[Entry] = []
    for record in records(workspace):
        for entry in record["subsets"].get(subset, {"passes": [[]] * 9})["passes"][number]:
            run = Run(workspace.folder / entry["path"])
            more = zip(
                *(run.read(name).tolist() for name in ("places", "texts", "fim")), strict=True
            )
            for (key, source, ordinal, name, ids), rest in zip(run.documents(), more, strict=True):
                found.append((key, source, ordinal, name, tuple(ids), *rest))
    return sorted(found)


def test_documents_are_encoded_with_their_end(tokenizer: Tokenizer) -> None:
    """Catches ids of another document, a missing </s>, and wrong keys, positions or counts."""
    workspace = encode_all(tokenizer, {"web": {**WEB, "repeat": 1.5}})
    for number in (0, 1):
        found = entries(workspace, "web", number)
        assert len(found) == 180

        for key, source, ordinal, name, ids, unit, text, fim in found:
            index = int(name[1:])
            assert list(ids) == [*tokenizer.encode(text_of(index)), EOS_ID]
            assert key == document_key64(5, "web", number, source, name)
            assert (source, ordinal) == (f"web/{index // 30}.jsonl", index % 30)
            digest = text_digest(text_of(index).encode())
            assert (unit, text, fim) == (text_position(digest), text_hash(digest), 0)

    counted = counts(workspace, "web")
    assert counted == {
        "documents": 180,
        "documents_read": 180,
        "tokens": sum(len(entry[4]) for entry in found),
        "documents_bytes": sum(len(text_of(i).encode()) for i in range(180)),
        "read_bytes": sum(len(Path(f"web/{i}.jsonl").read_bytes()) - 30 for i in range(6)),
        "files": 6,
    } | dict.fromkeys(
        [kind + unit for kind in ("outside", "short", "not_chosen", "filtered") for unit in UNITS]
        + ["rejected", "rejected_bytes", "empty", "broken_files", "bare_files", "repeated_ids"],
        0,
    )
    (record,) = records(workspace)
    assert record["text_bytes"] == sum(len(text_of(i).encode()) for i in range(180))
    for file in record["files"]:
        assert (workspace.folder / file["path"]).stat().st_size == file["bytes"]
    assert sum(run["documents"] for run in record["subsets"]["web"]["passes"][1]) == 180


@pytest.mark.parametrize(
    "executor", [{"task_bytes": 1}, {"run_tokens": 1024}, {"task_bytes": 9000, "run_tokens": 2000}]
)
def test_the_grouping_into_tasks_does_not_show(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, executor: dict[str, int]
) -> None:
    """Catches results that depend on how sources were divided into tasks, runs or batches."""
    subsets = {
        "web": {**WEB, "repeat": 2, "share": [0, 0.7]},
        "fim": {**WEB, "fill_in_the_middle": {"psm": 0.5}},
    }
    subsets["fim"]["share"] = [0, 0.7]
    undivided = encode_all(tokenizer, subsets)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    divided = encode_all(tokenizer, subsets, "cut", **executor)
    assert (
        len([run for record in records(divided) for run in record["subsets"]["web"]["passes"][0]])
        > 3
    )
    for name, number in (("web", 0), ("web", 1), ("fim", 0)):
        assert entries(divided, name, number) == entries(undivided, name, number)
        assert counts(divided, name) == counts(undivided, name)

    assert sources_identity(records(divided)) == sources_identity(records(undivided))


def test_subsets_of_the_same_files_are_read_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files read once per subset, and draws that give a document to two subsets."""
    subsets = {
        "plain": {**WEB, "documents": [0, 0.5]},
        "psm": {**WEB, "documents": [0.5, 0.75], "fill_in_the_middle": {"psm": 1.0}},
        "spm": {**WEB, "documents": [0.75, 1], "fill_in_the_middle": {"spm": 1.0}},
        "again": {**WEB, "documents": [0, 0.5]},
    }

    opened: list[Any] = []
    encoded: list[Any] = []
    read_documents, encode_documents = encode.read_documents, encode.encode_documents
    monkeypatch.setattr(
        encode,
        "read_documents",
        lambda s, source, fields: opened.append(source) or read_documents(s, source, fields),
    )
    monkeypatch.setattr(
        encode,
        "encode_documents",
        lambda t, items: encoded.extend(items) or encode_documents(t, items),
    )
    workspace = encode_all(tokenizer, subsets)
    assert len(opened) == 6
    assert len(encoded) == 180
    names = {name: {entry[3] for entry in entries(workspace, name)} for name in subsets}
    assert sorted(names["plain"] | names["psm"] | names["spm"]) == sorted(
        f"d{i}" for i in range(180)
    )
    assert sum(len(names[name]) for name in ("plain", "psm", "spm")) == 180
    assert names["again"] == names["plain"]
    drawn = {f"d{i}": drawn_position(5, f"web/{i // 30}.jsonl", f"d{i}") for i in range(180)}
    assert names["plain"] == {name for name, at in drawn.items() if at < POSITIONS // 2}
    assert counts(workspace, "psm")["not_chosen"] == 180 - len(names["psm"])

    for kind, name in ((0, "plain"), (1, "psm"), (2, "spm")):
        found = entries(workspace, name)
        assert {entry[7] for entry in found} == {kind}
        assert all(
            restore(tokenizer, list(entry[4])) == text_of(int(entry[3][1:])) for entry in found
        )


def test_draws_are_fixed_for_ever() -> None:
    """Catches a change of the draw, and a draw that equals the position in the share."""
    assert drawn_position(22238, "web/a.jsonl", "17") == 222220859278162
    assert (
        len(
            {
                drawn_position(1, "web/a.jsonl", "17"),
                split_position("web/a.jsonl\00017"),
                text_position(text_digest(b"a text")),
                222220859278162,
            }
        )
        == 4
    )
    # As `sha256sum` computes them: of the text, and of a prefix with that hash.
    assert text_position(text_digest(b"a text")) == 0x77DCE3B84A6F
    assert text_hash(text_digest(b"a text")) == 0x734194EDE5B063E6


def test_fill_in_the_middle_of_some(tokenizer: Tokenizer) -> None:
    """Catches rates applied to all or none, kinds recorded wrongly, and another subset's kind."""
    rates = {"psm": 0.4, "spm": 0.3}
    workspace = encode_all(tokenizer, {"web": {**WEB, "fill_in_the_middle": rates}, "plain": WEB})
    found = entries(workspace, "web")
    kinds = ("none", "psm", "spm")
    assert {kinds[fim] for *_, fim in found} == set(kinds)
    for _, source, _, name, ids, _, _, fim in found:
        assert kinds[fim] == choose_fim(5, source, name, **rates)
        assert restore(tokenizer, list(ids)) == text_of(int(name[1:]))
    assert {entry[7] for entry in entries(workspace, "plain")} == {0}


@pytest.mark.parametrize("split_by", ["source", "document", "text"])
def test_only_the_share_is_taken(tokenizer: Tokenizer, split_by: str) -> None:
    """Catches documents from outside the share, and short ones, among those to train on."""
    web = {**WEB, "share": [0.25, 0.75], "split_by": split_by, "min_characters": 60}
    workspace = encode_all(tokenizer, {"web": web})
    found = entries(workspace, "web")

    wanted = set()
    for i in range(180):
        source = f"web/{i // 30}.jsonl"
        unit = {
            "source": split_position(source),
            "document": split_position(f"{source}\0d{i}"),
            "text": text_position(text_digest(text_of(i).encode())),
        }[split_by]
        if POSITIONS // 4 <= unit < 3 * POSITIONS // 4 and len(text_of(i)) >= 60:
            wanted.add((f"d{i}", unit))

    assert {(entry[3], entry[5]) for entry in found} == wanted
    counted = counts(workspace, "web")
    assert counted["short"] == sum(len(text_of(i)) < 60 for i in range(180))
    assert counted["documents"] == len(wanted) > 0
    assert (
        counted["documents"] + counted["short"] + counted["outside"]
        == counted["documents_read"]
        == 180
    )


def test_duplicates_are_found_outside_the_share_too(tokenizer: Tokenizer) -> None:
    """Catches a text held out in one file and trained on in another for lack of its hash."""
    with open("web/3.jsonl", "a") as stream:
        stream.write(json.dumps({"id": "copy", "text": text_of(7)}) + "\n")
    workspace = encode_all(tokenizer, {"web": {**WEB, "share": [0, 0.5], "drop_duplicates": True}})
    found = entries(workspace, "web")
    assert len(found) == 181
    hashes = {entry[3]: entry[6] for entry in found}
    assert hashes["copy"] == hashes["d7"]
    assert len(set(hashes.values())) == 180
    assert {entry[3] for entry in found if not entry[4]} == {
        entry[3] for entry in found if entry[5] >= POSITIONS // 2
    }
    assert 0 < counts(workspace, "web")["outside"] == sum(not entry[4] for entry in found)


def test_a_document_of_another_set_is_no_first_copy(tokenizer: Tokenizer) -> None:
    """Catches a text lost because a document that the recipe does not want has it, too."""
    with open("web/3.jsonl", "a") as stream:
        stream.write(json.dumps({"id": "copy", "text": text_of(7), "set": "A"}) + "\n")
    subset = {**WEB, "drop_duplicates": True, "where": {"set": ["A"]}}
    found = entries(encode_all(tokenizer, {"web": subset}), "web")
    assert [(entry[3], list(entry[4])) for entry in found] == [
        ("copy", [*tokenizer.encode(text_of(7)), EOS_ID])
    ]


def test_documents_that_share_their_id_are_counted(tokenizer: Tokenizer) -> None:
    """Catches repeated ids that are missed, and counts across passes, files or the share."""
    with open("web/3.jsonl", "a") as stream:
        for name in ("d90", "d91", "d91", "d0"):
            stream.write(json.dumps({"id": name, "text": f"again {name}"}) + "\n")

    subsets = {
        "web": {**WEB, "repeat": 3},
        "half": {**WEB, "documents": [0, 0.5]},
        "none": {**WEB, "paths": ["web/0.jsonl"], "id_key": None},
    }
    workspace = encode_all(tokenizer, subsets)
    chosen = [
        drawn_position(5, "web/3.jsonl", name) < POSITIONS // 2 for name in ("d90", "d91", "d91")
    ]
    expected = {"web": 3, "half": sum(chosen), "none": 0}
    assert {name: counts(workspace, name)["repeated_ids"] for name in subsets} == expected
    assert counts(workspace, "web")["documents"] == 184
    texts = encode_all(tokenizer, {"texts": {**WEB, "drop_duplicates": True}}, "texts")
    assert counts(texts, "texts")["repeated_ids"] == 3
    outside = {"web": {**WEB, "split_by": "source", "drop_duplicates": True, "share": [0, 0.0001]}}
    assert counts(encode_all(tokenizer, outside, "outside"), "web")["repeated_ids"] == 0


# Broken documents


def test_rejected_lines_are_listed(tokenizer: Tokenizer) -> None:
    """Catches rejections without file, line or reason, and good documents lost beside them."""
    with open("web/2.jsonl", "a") as stream:
        stream.write('{"id": "x"}\n{\n')
    workspace = encode_all(tokenizer, {"web": WEB, "also": {**WEB, "documents": [0, 0.5]}})
    lines = (workspace.run_folder(0) / REJECTED_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "web/2.jsonl", "line": 31, "subsets": ["web", "also"], "why": "'text' is missing"},
        {
            "file": "web/2.jsonl",
            "line": 32,
            "subsets": ["web", "also"],
            "why": "not JSON (Expecting property name enclosed "
            "in double quotes: line 1 column 2 (char 1))",
        },
    ]
    for name in ("web", "also"):
        assert counts(workspace, name)["rejected"] == 2
        assert counts(workspace, name)["documents_read"] == 180


def test_a_wrong_recipe_stops_soon(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a misspelt key reported after a terabyte was read, and files left by the stop."""
    monkeypatch.setattr(encode, "MIN_REJECTED", 20)
    workspace = make_workspace(tokenizer, {"web": {**WEB, "text_key": "body"}})
    words = (
        r"subsets.web: 21 of the first 21 documents are broken, "
        r"lastly .*web/0.jsonl:21: 'body' is missing; check"
    )
    with pytest.raises(DataError, match=words):
        encode_task(workspace, 0)
    assert list(workspace.run_folder(0).iterdir()) == []


def test_a_file_without_one_good_document_is_an_error(tokenizer: Tokenizer) -> None:
    """Catches a file of another kind that is counted as a few broken lines and forgotten."""
    broken = '{"id": "d90", "body": "x"}\n'
    Path("web/3.jsonl").write_text(10 * broken)
    words = (
        r"subsets.web: (.*/web/3.jsonl) holds no document: all 10 are broken, the first at \1:1: "
    )
    with pytest.raises(DataError, match=words + "'text' is missing; check kind, text_key and id_k"):
        encode_all(tokenizer, {"web": WEB})
    # Whoever forgives everything is not stopped, and the file is counted.
    workspace = encode_all(tokenizer, {"web": WEB}, "forgiven", max_rejected_share=1.0)
    counted = counts(workspace, "web")
    assert (counted["files"], counted["broken_files"], counted["documents"]) == (6, 1, 150)
    # One good document is enough, and so is one without text.
    for beside in ('{"id": "x", "text": "good"}', '{"id": "x", "text": " "}'):
        Path("web/3.jsonl").write_text('{"id": "d90", "body": "x"}\n' + beside)
        assert counts(encode_all(tokenizer, {"web": WEB}, beside[12:25]), "web")["rejected"] == 1


def test_a_small_broken_file_counts_as_one_file(tokenizer: Tokenizer) -> None:
    """Catches one damaged file of a line that stops a corpus, whatever share of files may be."""
    Path("web/3.jsonl").write_text(9 * '{"id": "d90", "body": "x"}\n')
    workspace = encode_all(tokenizer, {"web": WEB}, "small", max_rejected_share=0.2)
    counted = counts(workspace, "web")
    assert (counted["files"], counted["broken_files"], counted["rejected"]) == (6, 1, 9)
    check_rejected(workspace)
    strict = encode_all(tokenizer, {"web": WEB}, "strict", max_rejected_share=0.1)
    with pytest.raises(DataError, match=r"1 of 6 files are broken, a share of 0.1667"):
        check_rejected(strict)


def test_a_file_without_any_line_is_counted(tokenizer: Tokenizer) -> None:
    """Catches a file of which nobody hears that it holds nothing."""
    Path("web/7.jsonl").write_text("\n\n")
    Path("web/8.jsonl").write_bytes(gzip.compress(b""))
    Path("web/9.jsonl").write_text("")
    counted = counts(encode_all(tokenizer, {"web": WEB}), "web")
    assert (counted["bare_files"], counted["files"], counted["rejected"]) == (2, 6, 0)


def test_documents_without_text_are_counted_and_left_out(tokenizer: Tokenizer) -> None:
    """Catches an empty file of code called broken, and one that nobody counts."""
    with open("web/3.jsonl", "a") as stream:
        for text in ("", " \n", "\u3000"):
            stream.write(json.dumps({"id": "none", "text": text}) + "\n")
    workspace = encode_all(tokenizer, {"web": WEB})
    counted = counts(workspace, "web")
    assert (counted["empty"], counted["rejected"], counted["documents_read"]) == (3, 0, 183)
    assert counted["documents"] == 180
    assert (workspace.run_folder(0) / REJECTED_NAME).read_bytes() == b""


def test_documents_are_chosen_by_their_fields(tokenizer: Tokenizer) -> None:
    """Catches a condition that is not looked at, files read once for each subset of them, and
    documents that vanish without being counted.
    """
    lines = [
        {"text": text_of(i), "id": f"d{i}", "meta": {"set": "ABC"[i % 3], "n": i % 2}}
        for i in range(60)
    ]
    for file in range(6):
        part = lines[10 * file : 10 * file + 10]
        Path(f"web/{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    subsets = {
        "a": {**WEB, "where": {"meta.set": ["A"]}},
        "b": {**WEB, "where": {"meta.set": ["B", "C"], "meta.n": [1]}},
        "none": {**WEB, "where": {"meta.n": [True]}},
    }
    workspace = encode_all(tokenizer, subsets)
    assert [task.subsets for task in workspace.tasks] == [("a", "b", "none")]

    names = {name: {entry[3] for entry in entries(workspace, name)} for name in subsets}
    assert names["a"] == {f"d{i}" for i in range(60) if i % 3 == 0}
    assert names["b"] == {f"d{i}" for i in range(60) if i % 3 and i % 2}
    assert names["none"] == set()

    left = [i for i in range(60) if i % 3]
    counted = counts(workspace, "a")
    assert (counted["filtered"], counted["documents_read"]) == (len(left), 60)
    assert counted["filtered_bytes"] == sum(len(text_of(i).encode()) for i in left)


# Kills


KILLED = """
import os, sys
from pathlib import Path
from k2train.data.prepare.encode import encode, run_writer
from k2train.data.prepare.workspace import Workspace
where, after = sys.argv[2], int(sys.argv[3])
done = []
def die(function):
    def dying(*arguments, **names):
        done.append(1)
        if len(done) > after:
            os.kill(os.getpid(), 9)
        return function(*arguments, **names)
    return dying
module = {"write_json": encode, "_write_slices": run_writer}[where]
setattr(module, where, die(getattr(module, where)))
encode.encode_task(Workspace.open(Path(sys.argv[1])), 0)
"""


@pytest.mark.parametrize(
    ("where", "after"), [("_write_slices", 0), ("_write_slices", 5), ("write_json", 0)]
)
def test_killed_anywhere_and_done_again(tokenizer: Tokenizer, where: str, after: int) -> None:
    """Catches half a run taken for complete, a task taken for done, and other bytes at the second
    start.
    """
    undivided = encode_all(tokenizer, {"web": WEB}, run_tokens=1024)
    other = make_workspace(tokenizer, {"web": WEB}, "killed", run_tokens=1024)
    program = [sys.executable, "-c", KILLED, str(other.folder), where, str(after)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not other.encode_record(0).exists()
    left = [path.name for path in other.run_folder(0).iterdir()]
    assert any(name.endswith(".tmp") for name in left) or where == "write_json"
    encode_task(other, 0)
    files = {
        path.name: path.read_bytes()
        for path in other.run_folder(0).iterdir()
        if path.name != "record.json"
    }
    assert files == {
        p.name: p.read_bytes() for p in undivided.run_folder(0).iterdir() if p.name != "record.json"
    }
    (again,), (first,) = records(other), records(undivided)
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_what_another_attempt_left(tokenizer: Tokenizer) -> None:
    """Catches stale runs of an attempt with other sizes, and removal of a living process's file."""
    workspace = make_workspace(tokenizer, {"web": WEB})
    folder = workspace.run_folder(0)
    folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        "000_000_00007.safetensors": False,
        f"x.safetensors.{socket.gethostname()}.{dead.pid}.tmp": False,
        f"x.safetensors.{socket.gethostname()}.{os.getppid()}.tmp": True,
        f"x.safetensors.elsewhere.{dead.pid}.tmp": True,
    }
    for name in names:
        (folder / name).write_bytes(b"half")
    encode_task(workspace, 0)
    assert {name: (folder / name).exists() for name in names} == names


# Identity


def test_identity_is_names_and_contents(tokenizer: Tokenizer) -> None:
    """Catches changed documents with the same identity, and an identity that depends on paths."""
    before = sources_identity(records(encode_all(tokenizer, {"web": WEB})))
    Path("moved").mkdir()
    os.rename("web", "moved/web")
    moved = {"web": {**WEB, "paths": ["moved/web/*.jsonl"]}}
    assert sources_identity(records(encode_all(tokenizer, moved, "b"))) == before
    assert (
        sources_identity(
            records(
                encode_all(tokenizer, {"a": moved["web"], "b": {**moved["web"], "repeat": 3}}, "c")
            )
        )
        == before
    )
    with open("moved/web/1.jsonl", "a") as stream:
        stream.write(" ")
    after = records(encode_all(tokenizer, moved, "d"))
    assert sources_identity(after) != before
    with pytest.raises(DataError, match=r"web/0.jsonl: changed while it was prepared"):
        sources_identity([*after, {"sources": [{"key": "web/0.jsonl", "sha256": "other"}]}])


def test_changed_sources_are_found(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missed change of equal size, and a touched file reported as changed."""
    monkeypatch.setattr(stdlib, "topics", {"a": "page a", "b": "page b"})
    workspace = encode_all(tokenizer, {"web": WEB, "prose": {"kind": "stdlib_topics"}})
    known = {
        source["key"]: SourceFile.parse(source)
        for record in records(workspace)
        for source in record["sources"]
    }
    listed = [source for sources in list_sources(workspace.recipe).values() for source in sources]
    assert changed_sources(listed, known) == []
    os.utime("web/0.jsonl", ns=(1, 1))
    content = Path("web/1.jsonl").read_bytes()
    Path("web/1.jsonl").write_bytes(content.replace(b"d30", b"d3x"))
    os.utime("web/1.jsonl", ns=(1, 1))
    Path("web/2.jsonl").write_bytes(content + b"\n")
    Path("web/3.jsonl").unlink()
    Path("web/new.jsonl").write_bytes(content)
    monkeypatch.setattr(stdlib, "topics", {"a": "page A", "b": "page b"})
    assert changed_sources(listed, known) == [
        "topics/a",
        "web/1.jsonl",
        "web/2.jsonl",
        "web/3.jsonl",
    ]

    listed = [source for sources in list_sources(workspace.recipe).values() for source in sources]
    assert "web/new.jsonl" in changed_sources(listed, known)
    assert "web/3.jsonl" in changed_sources(listed, known)


def encode_small_batches(folder: str) -> Callable[[], None]:
    """The first task of a work folder, to be called in a process of its own."""
    encode.BATCH_CHARACTERS = 20_000
    return functools.partial(encode_task, Workspace.open(Path(folder)), 0)


def test_memory_does_not_grow_with_the_corpus(tokenizer: Tokenizer) -> None:
    """Catches documents, ids or rejections that pile up over a task."""
    peaks: list[float] = []
    for size in (10, 100):
        lines = [
            json.dumps({"id": f"{i}", "text": text_of(i % 50) * 8}) + "\n{\n"
            for i in range(60 * size)
        ]
        Path("web/0.jsonl").write_text("".join(lines))
        web = {"web": {**WEB, "paths": ["web/0.jsonl"]}}
        workspace = make_workspace(tokenizer, web, f"work{size}", run_tokens=20_000)
        assert workspace.tokenizer.vocab_size == 338
        limit = 1.1 * peaks[0] if peaks else math.inf
        peaks.append(traced_peak(encode_small_batches, workspace.folder, limit_bytes=limit))

    assert peaks[1] < 1.1 * peaks[0], peaks
