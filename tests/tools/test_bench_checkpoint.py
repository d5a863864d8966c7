"""`tools/bench_checkpoint.py --manifests` on 16,384 ranks: what is read, and in how large texts.

Catches a text that grows with the world: one call of the JSON library over it would keep every
other thread of the process from running meanwhile.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import manifests
from k2train.checkpoint import manifest as manifest_module
from k2train.checkpoint import side_files

LARGEST_TEXT = 2**20
"""Bytes that the JSON library may get or return in one call: about 10 ms."""


class Texts(NamedTuple):
    """Lengths of the texts that the JSON library made and read."""

    made: list[int]
    read: list[int]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    found = Texts([], [])

    def noting(lengths: list[int], real: Any, length_of: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            result = real(*given, **more)
            lengths.append(len(length_of(given, result)))
            return result

        return call

    for module in (manifest_module, side_files):
        made = noting(found.made, module._dumps, lambda given, result: result)
        read = noting(found.read, module.parse_json, lambda given, result: given[0])
        monkeypatch.setattr(module, "_dumps", made)
        monkeypatch.setattr(module, "parse_json", read)
    return found


def test_no_text_grows_with_the_world(tmp_path: Path, texts: Texts) -> None:
    """Save, read back and start of 16,384 ranks; a rank other than the first reads five files."""
    world = manifests.World(tmp_path, 16384)
    world.write_side_files(world.rank)
    world.write_manifest()
    assert len(list(tmp_path.glob("*/facts/files-*"))) == 64
    world.read(all_files=True)
    assert max(*texts.made, *texts.read) < LARGEST_TEXT and len(texts.read) == 67

    small = manifests.World(tmp_path, 480)
    small.write_side_files(small.rank)
    small.write_manifest()
    sizes = []
    for each in (small, world):
        texts.read.clear()
        each.read(all_files=False)
        assert len(texts.read) == 5
        sizes.append(sum(texts.read))
    assert sizes[1] < 1.5 * sizes[0] < 2**21


def test_the_blocks_are_k2s(tmp_path: Path) -> None:
    """Each rank's blocks, counted one by one, are as many as is said, and hold the whole model."""
    world = manifests.World(tmp_path, 64)
    counted, size = 0, 0
    for rank in range(64):
        for folder in manifests.FOLDERS:
            blocks, held = manifests.blocks_of(world.layout, rank, folder)
            counted, size = counted + len(blocks), size + held
    assert counted == world.blocks()
    assert size == 65_286_184_960 * (2 + 12)


def test_it_prints_its_table(tmp_path: Path) -> None:
    lines = manifests.manifest_report(tmp_path, (32,))
    assert lines[0].startswith("32 ranks, 1 data-parallel: ")
    for work in ("machine alone", "save: side files of a rank", "save: manifest on rank 0"):
        assert any(work in line for line in lines)
    assert "start: a rank" in lines[-3] and "start: rank 0" in lines[-2]
    assert "one data-parallel rank more" in lines[-1]
