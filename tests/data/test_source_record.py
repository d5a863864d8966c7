"""Record of source files: what two folders share is found, and a damaged record is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.data.manifest import Manifest
from k2train.data.source_record import Sources, common_data, read_sources
from k2train.errors import DataError
from k2train.files import sha256_file
from tests.data.test_chunk import make
from tests.support.data_folder import rewrite
from tests.support.tiny_corpus import make_corpus


def recorded(folder: Path, content: str, seed: int = 0) -> Manifest:
    """A data folder with this `sources.json`."""
    make_corpus(folder, 1, seed=seed)
    (folder / "sources.json").write_text(content)
    return rewrite(folder, facts={"sources_sha256": sha256_file(folder / "sources.json")})


def test_common_data_finds_the_shared_chunk(tmp_path: Path) -> None:
    """Catches a second stage that trains again on the first stage's data."""
    first, second = make(tmp_path / "a"), make(tmp_path / "b", vocab=400)
    assert common_data(first, second) == []
    shared = common_data(first, make(tmp_path / "c", chunks=1))
    assert [line.split(":")[0] for line in shared] == [
        "chunk_000 and chunk_000",
        "held_out and held_out",
    ]


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({"training": ["a"]}, {"held_out": ["a"]}, ["source a"]),
        ({"shares": {"a": [0.0, 0.8]}}, {"shares": {"a": [0.8, 1.0]}}, []),
        ({"shares": {"a": [0.0, 0.8]}}, {"shares": {"a": [0.7, 1.0]}}, ["source a"]),
        ({"shares": {"a": [0.0, 0.1]}}, {"training": ["a"]}, ["source a"]),
        ({"training": ["a"]}, {"shares": {"a": [0.9, 1.0]}}, ["source a"]),
        ({"text_shares": {"a": [0.0, 0.8]}}, {"text_shares": {"a": [0.8, 1.0]}}, []),
        ({"text_shares": {"a": [0.0, 0.8]}}, {"text_shares": {"a": [0.7, 1.0]}}, ["source a"]),
        ({"text_shares": {"a": [0.0, 0.8]}}, {"held_out": ["a"]}, ["source a"]),
        # Cut at other documents: the intervals cannot be compared.
        ({"shares": {"a": [0.0, 0.8]}}, {"text_shares": {"a": [0.8, 1.0]}}, ["source a"]),
        # The same content under another name: cut alike by text, not by name.
        (
            {"text_shares": {"a": [0.0, 0.8]}, "files": {"a": {"sha256": "1"}}},
            {"text_shares": {"b": [0.8, 1.0]}, "files": {"b": {"sha256": "1"}}},
            [],
        ),
        (
            {"shares": {"a": [0.0, 0.8]}, "files": {"a": {"sha256": "1"}}},
            {"shares": {"b": [0.8, 1.0]}, "files": {"b": {"sha256": "1"}}},
            ["source b is a of the earlier data"],
        ),
        (
            {"training": ["a"], "files": {"a": {"sha256": "1"}, "unused": {"sha256": "2"}}},
            {"training": ["b", "c"], "files": {"b": {"sha256": "1"}, "c": {"sha256": "2"}}},
            ["source b is a of the earlier data"],
        ),
    ],
)
def test_files_that_are_split_inside(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], shared: list[str]
) -> None:
    """Catches two stages that take the same documents of one file, and a refusal of two that take
    different ones.
    """
    manifests = [
        recorded(tmp_path / str(i), json.dumps({"training": [], "held_out": [], **parts}), seed=i)
        for i, parts in enumerate((first, second))
    ]
    assert common_data(*manifests) == shared


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be an object, is []"),
        ('{"training": []}', "key 'held_out' is missing"),
        ('{"training": 3, "held_out": []}', "key 'training' must be a list, is 3"),
        ('{"training": [3], "held_out": []}', r"training[0]: must be text, is 3"),
        (
            '{"training": [], "held_out": [], "shares": {"a\\nb": ["x", 1]}}',
            r"shares.a\nb[0]: must be a number, is 'x'",
        ),
        (
            '{"training": ["a"], "held_out": [], "files": {"a": {"bytes": 1}}}',
            "files.a: key 'sha256' is missing",
        ),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, words: str) -> None:
    """Catches a record that passes for an empty one, and a traceback where a line is due."""
    with pytest.raises(DataError) as refused:
        read_sources(recorded(tmp_path / "data", content))
    message = f"{tmp_path / 'data' / 'sources.json'}: is not a record of sources ({words}"
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_another_record_is_refused(tmp_path: Path) -> None:
    """Catches sources of other data, taken for those of this folder; and a required record."""
    manifest = recorded(tmp_path / "data", '{"training": ["a"], "held_out": []}')
    assert read_sources(manifest) == Sources(training=("a",), held_out=())
    (tmp_path / "data" / "sources.json").write_text('{"training": ["b"], "held_out": []}')
    with pytest.raises(DataError, match=r"not the file .* was written with"):
        read_sources(manifest)
    assert read_sources(make(tmp_path / "older")) == Sources(training=(), held_out=())
