"""Side files and the table of shard files: groups, shares, damage by name, each read once."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.checkpoint import side_files
from k2train.checkpoint.gathered_files import GatheredFiles, pack_files, shard_name
from k2train.checkpoint.manifest import (
    FACTS,
    MANIFEST,
    CheckpointManifest,
    FileFacts,
    PieceFacts,
    read_manifest,
)
from k2train.checkpoint.side_files import FileTable, group_files, read_pieces, side_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from tests.checkpoint.test_shards import make_checkpoint, write_manifest
from tests.support.tiny_corpus import manifest_of

RANKS = 11


def facts_of(number: int) -> FileFacts:
    sha = [hashlib.sha256(bytes([number, part])).hexdigest() for part in range(2)]
    return FileFacts(bytes=number, sha256=sha[0], facts_sha256=sha[1])


def gathered() -> GatheredFiles:
    """Every rank wrote weights, and all but one moments, too."""
    rows = []
    for rank in range(RANKS):
        files = {shard_name("model", rank): facts_of(rank)}
        if rank != 4:
            files[shard_name("optimizer", rank)] = facts_of(100 + rank)
        rows.append(pack_files(files, rank))
    return GatheredFiles(torch.stack(rows))


def test_what_is_gathered_is_what_was_written() -> None:
    """Catches a hash or a size that changes on its way, and a file that a rank did not write."""
    found = gathered()
    assert len(found) == 2 * RANKS - 1
    assert dict(found.items("model")) == {
        f"model/shard-{rank + 1:05d}-model-00001-of-00001.safetensors": facts_of(rank)
        for rank in range(RANKS)
    }
    assert len(dict(found.items("optimizer"))) == RANKS - 1
    assert shard_name("optimizer", 4) not in dict(found.items("optimizer"))


def table_of(folder: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> FileTable:
    """A table of files, at most so many of them in one side file."""
    monkeypatch.setattr(side_files, "GROUP_FILES", at_most)
    (folder / FACTS).mkdir()
    files, groups = group_files(folder, len(gathered()), gathered().items)
    raw = manifest_of(Path(__file__).parents[1] / "golden/format_3/ckpt_001")
    content = {**raw, "files": files, "groups": groups}
    return FileTable(folder, CheckpointManifest.model_validate(content))


@pytest.mark.parametrize("at_most", (3, 4, 10, 100))
def test_shares_are_every_nth_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    """Whether files are in groups or not: shares are disjoint, and together all files."""
    table = table_of(tmp_path, monkeypatch, at_most)
    assert bool(table.manifest.groups) == (at_most < 100)
    assert table.manifest.total_files == 2 * RANKS - 1
    assert table.manifest.total_bytes == sum(f.bytes for f in map(facts_of, range(RANKS))) + sum(
        100 + rank for rank in range(RANKS) if rank != 4
    )
    for folder in ("model", "optimizer"):
        every = list(gathered().items(folder))
        assert list(table.all(folder).items()) == every and table.count(folder) == len(every)
        assert table.names(folder) == {name for name, _ in every}
        for step in (1, 2, 3, 7, 30):
            for first in range(step):
                assert list(table.share(folder, first, step).items()) == every[first::step]


def opened_side_files(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts reads of side files by name."""
    opened: Counter[str] = Counter()
    real = side_files.read_plain_file

    def counting(path: Path, *rest: Any) -> bytes:
        opened[path.name] += 1
        return real(path, *rest)

    monkeypatch.setattr(side_files, "read_plain_file", counting)
    return opened


def test_a_share_reads_its_groups_only_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that reads the table of all ranks, or reads a part of it again."""
    table = table_of(tmp_path, monkeypatch, 3)
    opened = opened_side_files(monkeypatch)
    for _ in range(3):
        assert list(table.share("optimizer", 7, 100)) == [shard_name("optimizer", 8)]
    assert list(opened.values()) == [1]
    FileTable(table.path, table.manifest, fresh=True).share("optimizer", 7, 100)
    assert list(opened.values()) == [2]
    table.share("model", 0, 100)
    assert sorted(opened.values()) == [1, 2]


def reseal(path: Path, name: str, content: dict[str, Any]) -> None:
    """Change a side file, and the hash that the manifest has of it."""
    text = json.dumps(content).encode()
    (path / side_name(name)).write_bytes(text)
    manifest = manifest_of(path)
    manifest["files"][name]["facts_sha256"] = hashlib.sha256(text).hexdigest()
    write_manifest(path, manifest)


NAME = "optimizer/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "key 'header_sha256' is missing"),
        ({"piece_bytes": 0}, "key 'piece_bytes' must be a whole number above 0"),
        ({"tensors": 3}, "key 'tensors' is not an object"),
        ({"tensors": {"a": {}}}, "lacks offsets, xxh3_128, shape of 'a'"),
    ],
)
def test_a_side_file_that_is_wrong_is_named(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    told = json.loads((path / side_name(NAME)).read_text())
    reseal(path, NAME, told | content if content else {})
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(path)
    message = str(caught.value)
    assert words in message and Path(side_name(NAME)).name in message and message.isprintable()


def test_pieces_that_are_too_few_are_refused(tmp_path: Path) -> None:
    """Catches a block of which a part has no hash, so that nobody would check it."""
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    told = json.loads((path / side_name(NAME)).read_text())
    told["tensors"]["embedding.weight.master"]["xxh3_128"] = []
    reseal(path, NAME, told)
    with pytest.raises(CheckpointError, match=r"tensor embedding\.weight\.master has no hash"):
        verify_checkpoint(path)


@pytest.mark.parametrize("what", ("missing", "a link", "another's"))
def test_a_side_file_is_the_one_that_was_written(tmp_path: Path, what: str) -> None:
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    side = path / side_name(NAME)
    if what == "another's":
        side.write_bytes(next(f for f in (path / FACTS).iterdir() if f != side).read_bytes())
    else:
        side.rename(tmp_path / "elsewhere")
    if what == "a link":
        side.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=side.name):
        verify_checkpoint(path)


def test_a_manifest_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second read of a file that did not change, and an old one after a change."""
    from k2train.checkpoint import manifest as module

    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    reads: list[Path] = []
    real = module.read_plain_file

    def counting(file: Path, *rest: Any) -> bytes:
        reads.append(file)
        return real(file, *rest)

    monkeypatch.setattr(module, "read_plain_file", counting)
    # A file that was just written may change again within one tick of the clock.
    first = read_manifest(path)
    assert read_manifest(path) == first and len(reads) == 2
    monkeypatch.setattr(module, "SETTLED_SECONDS", -60.0)
    for _ in range(3):
        assert read_manifest(path) == first
    assert len(reads) == 3
    assert read_manifest(path, fresh=True) == first and len(reads) == 4

    write_manifest(path, manifest_of(path) | {"consumed_tokens": 5})
    os.utime(path / MANIFEST, ns=(1, 1))
    assert read_manifest(path).consumed_tokens == 5 and len(reads) == 5


def test_a_rank_reads_its_own_side_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    manifest = read_manifest(path)
    opened = opened_side_files(monkeypatch)
    for _ in range(3):
        pieces = read_pieces(path, manifest, NAME, manifest.files[NAME])
    assert isinstance(pieces, PieceFacts) and opened == {Path(side_name(NAME)).name: 1}


def test_a_group_whose_files_have_no_side_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files of a large world that nothing describes, and so nothing checks."""
    table = table_of(tmp_path, monkeypatch, 3)
    name, group = next(iter(table.manifest.groups.items()))
    content = json.loads((tmp_path / name).read_text())
    del next(iter(content["files"].values()))["facts_sha256"]
    (tmp_path / name).write_text(json.dumps(content))
    sha = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    groups = {**table.manifest.groups, name: group.model_copy(update={"sha256": sha})}
    changed = table.manifest.model_copy(update={"groups": groups})
    with pytest.raises(CheckpointError, match="lists other files than it should"):
        FileTable(tmp_path, changed).names(group.folder)
