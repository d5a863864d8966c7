"""`tools/verify_data.py`: every kind of damage is found and named, and the rest is still read."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from k2train.data.chunk import ChunkInfo, Manifest, read_manifest, write_chunk
from k2train.data.document_boundaries import write_borders
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.data.verify.chunks import verify_chunks, verify_files
from k2train.data.verify.folder import differing, verify_folder
from k2train.errors import DataError, UserError
from k2train.files import sha256_file
from tests.support.command_line import load_tool
from tests.support.data_folder import (
    add_chunk,
    edit,
    finish,
    flip,
    rehash,
    rewrite,
    with_files,
    write_pieces,
)

ROWS, LENGTH = 40, 16
REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools/verify_data.py"
Pieces = dict[str, list[Any]]


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("verify_data")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"the value of {i} is a list\n" for i in range(200)], 300)


def make_pieces(seed: int) -> Pieces:
    """Documents laid over the rows, cut where a row ends; every row is of one subset."""
    rng = np.random.default_rng(seed)
    pieces: Pieces = {key: [] for key in ("row", "start", "length", "subset")}
    for row in range(ROWS):
        start = 0
        while start < LENGTH:
            length = min(int(rng.integers(1, 12)), LENGTH - start)
            values = (row, start, length, "code" if row % 3 else "text")
            for column, value in zip(pieces.values(), values, strict=True):
                column.append(value)
            start += length
    return pieces


def starts_of(pieces: Pieces) -> list[int]:
    return [
        row * LENGTH + start
        for row, start in zip(pieces["row"], pieces["start"], strict=True)
        if start
    ]


def make_chunk(folder: Path, name: str, seed: int, vocab: int) -> ChunkInfo:
    ids = np.random.default_rng(seed).integers(0, vocab, (ROWS, LENGTH))
    pieces = make_pieces(seed)
    counts = {
        key: LENGTH * sum(1 for row in range(ROWS) if bool(row % 3) == (key == "code"))
        for key in ("code", "text")
    }
    return add_chunk(folder, name, ids, vocab, counts, pieces=pieces, borders=starts_of(pieces))


@pytest.fixture
def manifest(tmp_path: Path, tokenizer: Tokenizer) -> Manifest:
    """Three chunks and a held-out one, with all that may lie beside them."""
    folder = tmp_path / "data"
    folder.mkdir()
    vocab = tokenizer.vocab_size
    infos = [
        make_chunk(folder, name, i, vocab)
        for i, name in enumerate(("chunk_000", "chunk_001", "chunk_002", "held_out"))
    ]
    tokenizer.save(folder / "tokenizer.model")
    (folder / "sources.json").write_text('{"training": ["a"], "held_out": ["b"]}')
    (folder / "rejected.jsonl").write_text('{"file": "a", "line": 3}\n')
    counts = infos[0].tokens_per_subset

    facts = {
        "sources_sha256": sha256_file(folder / "sources.json"),
        "rejected_sha256": sha256_file(folder / "rejected.jsonl"),
        "tokenizer": {"file": "tokenizer.model", "specials": list(tokenizer.specials)},
        "account": {
            name: {
                "used_tokens": 3 * n,
                "used_samples": 3 * n // LENGTH,
                "held_out_tokens": n,
                "documents": 9,
            }
            for name, n in counts.items()
        },
    }

    return finish(folder, infos, LENGTH, vocab, tokenizer.sha256, facts)


def problems_of(manifest: Manifest) -> list[str]:
    found = [
        line
        for report in verify_chunks(manifest, manifest.all_chunks(), 2)
        for line in report.problems
    ]
    assert not [line for line in found if "\n" in line]
    return found + verify_folder(manifest)


def test_a_whole_folder_is_whole(
    manifest: Manifest, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that finds fault with what is right, and a last line whose numbers are not
    the folder's.
    """
    assert problems_of(manifest) == []
    assert tool.main([str(manifest.folder), "--workers", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[1:3] for line in lines[:4]] == [
        [info.name, "ok"] for info in manifest.all_chunks()
    ]
    assert lines[4].startswith(f"ok: 4 chunks, one held out, {4 * ROWS * LENGTH:,} tokens, ")
    assert (len(lines), err) == (5, "")
    pieces = parquet.read_metadata(manifest.folder / "chunk_001.parquet").num_rows
    assert f"{pieces} pieces, borders" in lines[1]


FILES = [
    "chunk_001.npy",
    "chunk_001.parquet",
    "chunk_001.borders.npy",
    "held_out.npy",
    "sources.json",
    "rejected.jsonl",
    "tokenizer.model",
]


@pytest.mark.parametrize("location", [3, -3])
@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found(manifest: Manifest, file: str, location: int) -> None:
    """Catches a file that is not read to both its ends, and damage laid at the door of another
    file.
    """
    flip(manifest.folder / file, location)
    found = problems_of(manifest)
    assert len(found) == 1, found
    assert str(manifest.folder / file) in found[0]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(
    manifest: Manifest, file: str, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that ends at the first thing missing: the other chunks are still wanted."""
    (manifest.folder / file).unlink()
    flip(manifest.folder / "chunk_002.npy", -1)
    assert tool.main([str(manifest.path)]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 3, lines
    assert [
        line for line in lines if str(manifest.folder / file) in line and "No such file" in line
    ]
    assert [line for line in lines if line.startswith("chunk_002 (") and "sha256 is" in line]
    assert lines[-1].startswith("2 problems, ")
    assert "ok:" not in out
    assert "chunk_000  ok" in out


def test_a_wrong_id_is_named(manifest: Manifest) -> None:
    """Catches an id that the hash vouches for and the vocabulary does not have."""
    path = manifest.folder / "chunk_002.npy"
    ids = np.load(path)
    ids[ROWS - 1, 5] = manifest.vocab_size
    np.save(path, ids)
    (line,) = problems_of(rehash(manifest))
    assert line.startswith("chunk_002 (")
    assert f"row {ROWS - 1}, position 5: id {manifest.vocab_size}" in line


def test_swapped_rows_are_found(manifest: Manifest) -> None:
    """Catches a check of what is in a chunk that forgets where."""
    path = manifest.folder / "chunk_000.npy"
    ids = np.load(path)
    ids[[3, 20]] = ids[[20, 3]]
    np.save(path, ids)
    (line,) = problems_of(manifest)
    assert "chunk_000.npy" in line


def swap(pieces: Pieces, i: int, k: int) -> None:
    for column in pieces.values():
        column[i], column[k] = column[k], column[i]


def put(pieces: Pieces, key: str, i: int, change: Callable[[Any], Any]) -> None:
    pieces[key][i] = change(pieces[key][i])


def drop(pieces: Pieces, positions: slice) -> None:
    for column in pieces.values():
        del column[positions]


def repeat(pieces: Pieces, i: int) -> None:
    for column in pieces.values():
        column.insert(i, column[i])


def from_next_row(pieces: Pieces) -> None:
    i = pieces["row"].index(1) - 1
    pieces["row"][i], pieces["start"][i] = 1, pieces["start"][i] - LENGTH


WRONG: list[tuple[str, Callable[[Pieces], object], str]] = [
    ("two pieces swapped", lambda p: swap(p, 60, 61), "piece 60 is row"),
    ("one dropped", lambda p: drop(p, slice(70, 71)), "piece 70 is row"),
    (
        "the last one dropped",
        lambda p: drop(p, slice(-1, None)),
        f"ends at row {ROWS - 1}, the chunk has {ROWS} rows",
    ),
    ("all dropped", lambda p: drop(p, slice(None)), f"ends at row 0, the chunk has {ROWS} rows"),
    ("one twice", lambda p: repeat(p, 5), "piece 6 is row"),
    (
        "too long",
        lambda p: put(p, "length", 50, lambda n: n + 1),
        "comes next: a row is not covered exactly",
    ),
    (
        "over the row's end",
        lambda p: put(p, "length", -1, lambda n: n + 1),
        "a row is not covered exactly",
    ),
    ("empty", lambda p: put(p, "length", 9, lambda _: 0), "piece 9 is row .*, length 0"),
    ("another row", lambda p: put(p, "row", 30, lambda n: n + 1), "piece 30 is row"),
    ("told from the next row", lambda p: from_next_row(p), "a row is not covered exactly"),
    (
        "another subset",
        lambda p: put(p, "subset", 0, lambda _: "code"),
        "tokens of subset code, the manifest says",
    ),
    (
        "unknown subset",
        lambda p: put(p, "subset", 0, lambda _: "new"),
        "tokens of subset new, the manifest says 0",
    ),
    ("no subset", lambda p: put(p, "subset", 0, lambda _: None), "has no subset"),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=name) for name, c, w in WRONG])
def test_provenance_that_is_not_of_the_chunk(
    manifest: Manifest, change: Callable[..., object], words: str
) -> None:
    """Catches provenance believed because it has its hash: a wrong preparation hashes what it
    wrote.
    """
    pieces = make_pieces(1)
    change(pieces)
    write_pieces(manifest.folder / "chunk_001.parquet", pieces)
    found = problems_of(rehash(manifest))
    assert [
        line for line in found if line.startswith("chunk_001 (") and "chunk_001.parquet" in line
    ]
    assert re.search(words, " ".join(found)), found


def test_provenance_that_is_no_parquet(manifest: Manifest) -> None:
    """Catches a traceback out of the Parquet reader, and other columns taken for ours."""
    path = manifest.folder / "chunk_001.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    (line,) = problems_of(rehash(manifest))
    assert line.startswith(f"chunk_001 ({path}): is not the provenance of a chunk")
    parquet.write_table(arrow.table({"other": [1]}), path)
    (line,) = problems_of(rehash(manifest))
    assert line.startswith(f"chunk_001 ({path}): is not the provenance of a chunk")


@pytest.mark.parametrize(
    "change", ["one more", "one behind", "one less", "moved", "the first less"]
)
def test_borders_are_the_beginnings_of_pieces(manifest: Manifest, change: str) -> None:
    """Catches borders that are well formed and stand where no document begins."""
    positions = starts_of(make_pieces(1))
    if change == "one more":
        positions = sorted(
            {*positions, next(i for i in range(200, 999) if i not in positions and i % LENGTH)}
        )
    elif change == "one behind":
        positions.append(positions[-1] + 1)
    elif change == "moved":
        i = next(
            i
            for i in range(9, 99)
            if positions[i] + 1 not in positions and (positions[i] + 1) % LENGTH
        )
        positions[i] += 1
    else:
        del positions[-1 if change == "one less" else 0]

    write_borders(manifest.folder / "chunk_001.borders.npy", positions)
    (line,) = problems_of(rehash(manifest))
    assert line.startswith("chunk_001 (")
    assert "border" in line


MANIFEST_MISTAKES: list[tuple[str, Callable[[dict[str, Any]], object], list[str]]] = [
    (
        "tokens of a subset",
        lambda c: c["chunks"][1]["tokens_per_subset"].update(code=LENGTH),
        [
            "of subset code, the manifest says 16",
            "tokens_per_subset add up to",
            "account of subset code: used_tokens",
            "account of subset code: used_samples",
        ],
    ),
    (
        "used tokens",
        lambda c: c["facts"]["account"]["text"].update(used_tokens=1),
        ["account of subset text: used_tokens is 1"],
    ),
    (
        "samples",
        lambda c: c["facts"]["account"]["text"].update(used_samples=1),
        ["subset text: used_samples is 1 of 16"],
    ),
    (
        "held out",
        lambda c: c["facts"]["account"]["code"].update(held_out_tokens=7),
        ["held_out_tokens is 7, the held-out"],
    ),
    (
        "subset gone",
        lambda c: c["facts"]["account"].pop("code"),
        ["code: used_tokens is 0", "code: held_out_tokens is 0"],
    ),
    (
        "rows",
        lambda c: c["chunks"][0].update(rows=39, tokens=39 * LENGTH),
        ["chunk_000.npy", "chunk_000.parquet", "add up"],
    ),
    ("a hash", lambda c: c["held_out"].update(sha256="0" * 64), ["held_out.npy"]),
    (
        "specials",
        lambda c: c["facts"]["tokenizer"]["specials"].pop(),
        ["tokenizer.model: model and specials have the hash"],
    ),
    (
        "elsewhere",
        lambda c: c["facts"]["tokenizer"].update(file="../t.model"),
        ["'../t.model' is outside"],
    ),
    (
        "tokenizer hash",
        lambda c: c.update(tokenizer_sha256="0" * 64),
        ["the manifest says 0000000000000000"],
    ),
    (
        "vocabulary",
        lambda c: c.update(vocab_size=318 - 1),
        ["has 318 ids, vocab_size of the manifest is 317"],
    ),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in MANIFEST_MISTAKES]
)
def test_manifest_that_tells_another_story(
    manifest: Manifest, change: Callable[..., object], words: list[str]
) -> None:
    """Catches numbers that are written in the manifest and looked at by nobody."""
    found = problems_of(edit(manifest, change))
    missing = [word for word in words if not [line for line in found if word in line]]
    assert not missing, (missing, found)
    if "vocab" not in words[0] and "ids" not in words[0]:
        assert len(found) == len(words), found


def prepared(manifest: Manifest) -> Manifest:
    """The facts that a preparation records: the recipe, its hash, and an account whose sums are
    right.
    """

    def change(content: dict[str, Any]) -> None:
        facts, infos = content["facts"], content["chunks"]
        repeats = {"code": 0.29, "text": 2.0}

        for name, repeat in repeats.items():
            used = sum(info["tokens_per_subset"][name] for info in infos)
            # 0.29 of 5700 is 1653, and one less by way of the nearest binary fraction.
            tokens = {"code": 5700, "text": 1001}[name]
            asked = {"code": 1653, "text": 2002}[name]
            facts["account"][name] = {
                "documents_read": 21,
                "rejected_documents": 7,
                "short_documents": 1,
                "not_chosen_documents": 2,
                "outside_documents": 3,
                "duplicate_documents": 4,
                "training_documents": 5,
                "held_out_documents": 6,
                "training_tokens": tokens,
                "repeat": repeat,
                "passes": int(-(-repeat // 1)),
                "asked_tokens": asked,
                "used_samples": used // LENGTH,
                "used_tokens": used,
                "tail_tokens": asked % LENGTH,
                "unused_tokens": asked - asked % LENGTH - used,
                "left_by_repeat_tokens": int(-(-repeat // 1)) * tokens - asked,
                "held_out_tokens": content["held_out"]["tokens_per_subset"][name],
                "held_out_unused_tokens": 0,
            }

        facts |= {"name": "données", "seed": 3}
        facts["dropped_tail_tokens"] = {
            name: item["tail_tokens"] for name, item in facts["account"].items()
        }

        facts["recipe"] = {
            "subsets": {name: {"repeat": repeat} for name, repeat in repeats.items()},
            "name": "données",
            "seed": 3,
            "sequence_length": LENGTH,
            "chunks": 3,
            "rows_per_chunk": ROWS,
        }

        facts["recipe_sha256"] = hash_of(facts["recipe"])

    return edit(manifest, change)


def hash_of(recipe: Any) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def of_recipe(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    """A change to the recipe after which its hash is right again."""

    def changed(content: dict[str, Any]) -> None:
        change(content["facts"]["recipe"])
        content["facts"]["recipe_sha256"] = hash_of(content["facts"]["recipe"])

    return changed


def of_account(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["facts"]["account"][name].update(values)


FACTS: list[tuple[str, Callable[[dict[str, Any]], object], list[str]]] = [
    (
        "recipe",
        lambda c: c["facts"]["recipe"].update(document_borders=True),
        ["facts.recipe has the hash .*recipe_sha256 is "],
    ),
    ("seed", lambda c: c["facts"].update(seed=4), ["facts.seed is 4, facts.recipe has 3"]),
    (
        "name",
        of_recipe(lambda r: r.update(name="x")),
        ["facts.name is 'données', facts.recipe has 'x'"],
    ),
    (
        "length",
        of_recipe(lambda r: r.update(sequence_length=8)),
        ["sequence_length 8, the manifest 16"],
    ),
    ("chunks", of_recipe(lambda r: r.update(chunks=4)), ["has chunks 4, the manifest 3"]),
    (
        "rows",
        of_recipe(lambda r: r.update(rows_per_chunk=39)),
        [f"rows_per_chunk 39, chunk_00{i} has 40" for i in range(3)],
    ),
    (
        "subsets",
        of_recipe(lambda r: r["subsets"].update(new={})),
        ["the subsets code, text, facts.recipe code, new, text"],
    ),
    (
        "repeat",
        of_recipe(lambda r: r["subsets"]["text"].update(repeat=1.5)),
        ["text: repeat is 2.0, facts.recipe has 1.5"],
    ),
    (
        "asked",
        of_account("code", asked_tokens=1652),
        ["code: asked_tokens is 1652, 0.29 of 5700 tokens are 1653", "tail_tok"],
    ),
    (
        "passes",
        of_account("text", passes=3),
        ["text: passes is 3, repeat 2.0 makes 2", "are 2002, 3 x 1001 .* are 3003"],
    ),
    (
        "tail",
        of_account("text", tail_tokens=3),
        ["tail_tokens is 3, asked_tokens leave 2", "do not add up", "dropped_tail"],
    ),
    (
        "dropped",
        lambda c: c["facts"]["dropped_tail_tokens"].pop("text"),
        ["dropped_tail_tokens of subset text is None, .* 2"],
    ),
    (
        "unused",
        of_account("code", unused_tokens=0),
        ["code: tokens do not add up: .*, 1 x 5700 training_tokens are 5700"],
    ),
    (
        "left",
        of_account("text", left_by_repeat_tokens=1),
        ["text: tokens do not add up: used, unused, tail and left"],
    ),
    (
        "documents",
        of_account("code", short_documents=2),
        ["code: documents do not add up: documents_read is 21, .* are 22"],
    ),
    (
        "a later kind",
        of_account("text", empty_documents=2, held_out_copy_documents=0),
        ["text: documents do not add up: documents_read is 21, .*empty, held_out_copy are 23"],
    ),
    (
        "negative",
        of_account("code", unused_tokens=-5),
        ["code: unused_tokens is -5, must be a whole number from 0"],
    ),
    (
        "a fraction",
        of_account("text", used_samples=9.5),
        ["text: used_samples is 9.5, must be a whole number"],
    ),
    (
        "no repeat",
        of_account("text", repeat=0),
        ["text: repeat is 0, must be a number above 0"],
    ),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=name) for name, c, w in FACTS])
def test_facts_that_contradict_each_other(
    manifest: Manifest, change: Callable[..., object], words: list[str]
) -> None:
    """Catches facts of a manifest that nothing is held against, so that an edited one passes for
    the preparation's own.
    """
    manifest = prepared(manifest)
    assert problems_of(manifest) == []
    found = problems_of(edit(manifest, change))
    assert len(found) == len(words), found
    assert not [word for word in words if not [line for line in found if re.search(word, line)]], (
        found
    )
    assert all(str(manifest.path) in line for line in found)


MISTYPED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "no account",
        lambda c: c["facts"].update(account=[1]),
        "facts: key 'account' must be an object, is [1]",
    ),
    (
        "no specials",
        lambda c: c["facts"]["tokenizer"].pop("specials"),
        "facts.tokenizer: key 'specials' is missing",
    ),
    (
        "no recipe",
        lambda c: c["facts"].update(recipe=[]),
        "facts: key 'recipe' must be an object, is []",
    ),
    (
        "dropped list",
        lambda c: c["facts"].update(dropped_tail_tokens=[]),
        "facts: key 'dropped_tail_tokens' must be an object, is []",
    ),
    (
        "a truth",
        of_account("code", documents_read=True),
        "facts.account.code: key 'documents_read' must be a number, is True",
    ),
    (
        "words",
        of_account("text", used_samples="9"),
        "facts.account.text: key 'used_samples' must be a number, is '9'",
    ),
    (
        "no number",
        of_account("text", repeat="2"),
        "facts.account.text: key 'repeat' must be a number, is '2'",
    ),
    (
        "a key of two lines",
        lambda c: c["facts"]["account"].update({"a\nok: 4 chunks": {"b": "c"}}),
        r"facts.account.a\nok: 4 chunks: key 'b' must be a number, is 'c'",
    ),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in MISTYPED]
)
def test_mistyped_facts_are_refused(
    manifest: Manifest,
    change: Callable[..., object],
    words: str,
    tool: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a fact of the wrong type that ends in a traceback, or passes for no fact at all."""
    prepared(manifest)
    with pytest.raises(DataError, match=re.escape(f"{manifest.path}: {words}")):
        edit(manifest, change)
    assert tool.main([str(manifest.folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_other_files_that_look_like_chunks(manifest: Manifest) -> None:
    """Catches chunks of other data in the folder, which all that lists files would take for chunks
    of this one.
    """
    strangers = [
        "chunk_003.npy",
        "chunk_000.extra.npy",
        "chunk_1.parquet",
        "chunk_003.borders.npy",
        "held_out.bin",
    ]

    for name in (*strangers, "notes.npy", "README.md", "chunk_list.txt"):
        (manifest.folder / name).write_text("")
    found = problems_of(manifest)
    assert [line.split(":")[0] for line in found] == sorted(
        str(manifest.folder / name) for name in strangers
    )
    assert all("looks like a chunk's and is not in manifest.json" in line for line in found)


@pytest.mark.parametrize(
    "file", ["chunk_001.npy", "chunk_001.parquet", "chunk_001.borders.npy", "sources.json"]
)
def test_hashes_are_shown_to_where_they_differ(manifest: Manifest, file: str) -> None:
    """Catches a line that says two equal things differ."""
    digest = sha256_file(manifest.folder / file)
    other = digest[:40] + ("0" if digest[40] != "0" else "1") + digest[41:]
    path = manifest.path
    path.write_text(path.read_text().replace(digest, other))
    (line,) = problems_of(read_manifest(path))
    assert (
        f"sha256 is {digest[:41]}, the manifest says {other[:41]}; fetch it again, or prepare the "
        "data anew" in line
    )
    assert differing("a" * 64, "b" * 64) == ("a" * 16, "b" * 16)
    assert differing(digest, digest[:60]) == (digest[:61], digest[:60])


def test_what_a_folder_does_not_have_is_not_missed(manifest: Manifest) -> None:
    """Catches an older or plainer folder called damaged."""

    def change(content: dict[str, Any]) -> None:
        content["facts"] = {}
        for entry in [*content["chunks"], content["held_out"]]:
            for key in ("provenance", "provenance_sha256", "borders", "borders_sha256"):
                del entry[key]

    for path in manifest.folder.iterdir():
        if (
            path.name.endswith((".parquet", ".borders.npy", ".model", ".jsonl"))
            or path.name == "sources.json"
        ):
            path.unlink()

    assert problems_of(edit(manifest, change)) == []


def test_only_the_named_chunks(
    manifest: Manifest, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a quick look at one chunk that reads them all, and a name that is silently not
    there.
    """
    flip(manifest.folder / "chunk_001.npy", -1)
    assert tool.main([str(manifest.path), "--chunks", "chunk_002", "held_out"]) == 0
    assert "ok: 2 chunks" in capsys.readouterr().out
    assert tool.main([str(manifest.path), "--chunks", "chunk_001"]) == 2
    capsys.readouterr()
    assert tool.main([str(manifest.path), "--chunks", "chunk_009"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert (
        "there is no chunk 'chunk_009'; there are chunk_000, chunk_001, chunk_002 and held_out"
        in err
    )
    assert tool.main([str(manifest.path), "--chunks", "2", "chunk_002", "held_out"]) == 0
    assert "ok: 2 chunks, one held out" in capsys.readouterr().out
    assert tool.main([str(manifest.path), "--chunk", "1"]) == 2


def test_a_manifest_that_cannot_be_read_is_one_line(manifest: Manifest) -> None:
    """Catches a traceback from the command line itself."""
    manifest.path.write_bytes(manifest.path.read_bytes()[:-20])
    done = subprocess.run(
        [sys.executable, str(TOOL), str(manifest.path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=manifest.folder,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not valid JSON" in done.stderr


def test_a_file_that_is_no_manifest(
    manifest: Manifest, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches advice to prepare data again whose manifest was only not the file that was named."""
    folder = manifest.folder
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder / "flow.yaml").write_text("{name: x}\n")

    for name in ("recipe.yaml", "flow.yaml", "chunk_000.npy", "sources.json", "rejected.jsonl"):
        assert tool.main([str(folder / name)]) == 2
        expected = (
            f"{folder / name}: is not a manifest; give the manifest.json of a data folder, "
            "or the folder itself\n"
        )
        assert capsys.readouterr() == ("", expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tool,
            "read_manifest",
            lambda path: pytest.fail("a chunk was read whole to learn that it is one"),
        )
        assert tool.main([str(folder / "chunk_000.npy")]) == 2

    capsys.readouterr()
    manifest.path.rename(folder / "copy.json")
    assert tool.main([str(folder / "copy.json")]) == 0
    capsys.readouterr()
    (folder / "copy.json").write_bytes((folder / "copy.json").read_bytes()[:-20])
    assert tool.main([str(folder / "copy.json")]) == 2
    assert "not valid JSON" in capsys.readouterr().err
    assert tool.main([str(folder)]) == 2
    assert "cannot be read (No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--workers", "0"], ["--workers", "x"], ["--chunks"], ["--unknown"], []]
)
def test_mistakes_of_usage_are_one_line(
    manifest: Manifest, tool: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a screen of usage around the one thing that is wrong."""
    with pytest.raises(SystemExit) as leaving:
        tool.main([str(manifest.path), *words] if words else [])
    out, err = capsys.readouterr()
    assert (leaving.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("verify_data: ") and err.endswith("; see --help\n")


def test_rates_are_told_where_there_is_one(
    manifest: Manifest,
    tool: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches `0.0 s` and a rate worked out from it."""
    assert (tool.rate(10**9, 0.09), tool.rate(10**9, 0.5), tool.rate(10**4, 0.5)) == (
        "",
        ", 1.86 GiB/s",
        "",
    )
    clock = iter((0.0, 0.0123))
    monkeypatch.setattr(tool.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tool, "verify_chunks", lambda *_: [])
    assert tool.main([str(manifest.path)]) == 0
    assert capsys.readouterr().out.endswith(" bytes in 12 ms\n")


@pytest.mark.parametrize("damaged", [False, True])
def test_nobody_listens_any_more(manifest: Manifest, damaged: bool) -> None:
    """Catches a traceback behind `| head`, and a folder called whole because nobody heard that it
    is not.
    """
    if damaged:
        flip(manifest.folder / "chunk_002.npy", -1)
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    assert reader.stdin is not None and reader.wait() == 0
    command = [sys.executable, str(TOOL), str(manifest.path)]
    done = subprocess.run(
        command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False
    )
    message = ["chunk_002", "1 problem,"] if damaged else []
    assert (done.returncode, len(done.stderr.splitlines())) == (
        2 if damaged else 0,
        len(message),
    ), done.stderr
    done = subprocess.run(command, stdout=reader.stdin, stderr=reader.stdin, check=False)
    assert done.returncode == (2 if damaged else 0)


def test_many_batches(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a position, a count of borders or a sum of tokens that starts anew with every
    batch.
    """
    monkeypatch.setattr("k2train.data.verify.chunks.BATCH_PIECES", 7)
    assert problems_of(manifest) == []
    pieces = make_pieces(1)
    write_pieces(manifest.folder / "chunk_001.parquet", pieces, 3)
    assert problems_of(rehash(manifest)) == []
    swap(pieces, 80, 81)
    write_pieces(manifest.folder / "chunk_001.parquet", pieces, 3)
    (line,) = problems_of(rehash(manifest))
    assert "piece 80 is row" in line


def test_a_problem_of_ours_is_not_told_as_damage(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an except that takes every mistake for a broken file."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("k2train.data.verify.chunks.verify_chunk", broken)
    with pytest.raises(ZeroDivisionError):
        verify_files(manifest, manifest.chunks[0])


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """Catches a chunk, or its provenance, taken into memory whole: 120 MB of ids and a million
    pieces in one group.
    """
    rows, length, per_row = 30000, 2000, 40
    block = np.arange(1000 * length, dtype=np.uint32).reshape(1000, length) % 500

    info = write_chunk(
        tmp_path,
        "chunk_000",
        (block for _ in range(rows // 1000)),
        rows,
        500,
        {"code": rows * length},
    )

    start = np.tile(np.arange(per_row, dtype=np.int32) * (length // per_row), rows)

    columns = {
        "row": np.repeat(np.arange(rows, dtype=np.int32), per_row),
        "start": start,
        "length": np.full(rows * per_row, length // per_row, dtype=np.int32),
        "subset": arrow.DictionaryArray.from_arrays(
            arrow.array(np.zeros(rows * per_row, np.int32)), ["code"]
        ),
    }

    positions = (columns["row"].astype(np.uint64) * length + start)[start > 0]
    info = with_files(tmp_path, info, columns, positions, group_rows=rows * per_row)
    finish(tmp_path, [info], length, 500)

    # Not `ru_maxrss`: that of a child begins at its parent's.
    program = (
        f"import runpy, sys; sys.argv = [{str(TOOL)!r}, {str(tmp_path)!r}]\n"
        f"sys.path[0] = {str(TOOL.parent)!r}\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        f"except SystemExit as end: code = end.code\n"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1]); "
        "sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) * 1024 < 400 * 2**20


def test_without_pyarrow_nothing_is_called_whole(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an installation without pyarrow that passes every folder as whole."""
    monkeypatch.setattr("k2train.data.verify.chunks.parquet", None)
    with pytest.raises(UserError, match="pip install"):
        list(verify_chunks(manifest, manifest.all_chunks()))


def test_loss_masks_are_verified(manifest: Manifest, capsys: Any, tool: Any) -> None:
    """Catches a mask that is not read, one whose hash alone is, and a file that counts as stray."""
    mask = np.zeros((ROWS, LENGTH), dtype=bool)
    mask[:, 3:9] = True
    here = manifest.folder
    infos = [with_files(here, info, mask=mask) for info in manifest.all_chunks()]
    masked = rewrite(here, chunks=infos[:-1], held_out=infos[-1])
    assert problems_of(masked) == []
    assert tool.main([str(here)]) == 0
    assert capsys.readouterr().out.count(f"{ROWS * 6} targets of its loss mask") == 4

    path = here / "chunk_001.mask.npy"
    whole = path.read_bytes()
    flip(path)
    assert [line.split(" (")[0] for line in problems_of(masked)] == ["chunk_001"]
    path.write_bytes(whole)
    stored = np.load(path)
    stored[7] = 0
    np.save(path, stored)
    (problem,) = problems_of(rehash(masked))
    assert problem.startswith("chunk_001 ") and "row 7 of the loss mask has no target" in problem
    path.write_bytes(whole)
    (here / "chunk_007.mask.npy").write_bytes(whole)
    assert ["chunk_007.mask.npy" in line for line in problems_of(masked) if "like a" in line] == [
        True
    ]
