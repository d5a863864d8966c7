"""Loss masks: what is written is read, every bad file is one line, and labels are those learned."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.data.chunk import ChunkIdentity, check_files, verify_chunk
from k2train.data.chunk_reader import ChunkReader
from k2train.data.held_out import HeldOutSet
from k2train.data.loader import HeldOutLoader, Loader, Share
from k2train.data.loss_mask import (
    bad_row,
    count_targets,
    learned_in,
    learned_of_rows,
    masked_as_asked,
    open_mask,
    read_mask,
    verify_mask,
    write_mask,
)
from k2train.data.manifest import Manifest
from k2train.data.order import make_order
from k2train.errors import DataError
from k2train.parallel.cross_entropy import IGNORE
from tests.support.data_folder import add_chunk, edit, finish, rehash

VOCAB, ROWS = 97, 8
LENGTHS = (8, 13, 16)
"""Rows that fill their bytes, and rows that leave bits of the last one."""


def ids_of(length: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def mask_of(length: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Uneven: row r learns about one token of r + 1."""
    random = np.random.default_rng(100 + seed)
    learned = random.random((rows, length)) < 1 / (1 + np.arange(rows)[:, None])
    learned[:, 0] = False
    learned[~learned.any(axis=1), -1] = True
    return learned


def folder_of(tmp_path: Path, length: int = 13, masked: bool = True) -> Manifest:
    infos = []
    for seed, name in enumerate(("chunk_000", "chunk_001", "held_out")):
        mask = mask_of(length, seed=seed) if masked else None
        infos.append(add_chunk(tmp_path, name, ids_of(length, seed=seed), VOCAB, mask=mask))
    return finish(tmp_path, infos, length, VOCAB)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_file_is_numpys_and_reads_back(tmp_path: Path, length: int) -> None:
    """Catches another order of bits than NumPy's `little`, which another reader takes for it."""
    manifest, expected = folder_of(tmp_path, length), mask_of(length)
    info = manifest.chunks[0]
    path = tmp_path / "chunk_000.mask.npy"

    stored = np.load(path)
    assert stored.dtype == np.uint8 and stored.shape == (ROWS, -(-length // 8))
    assert np.array_equal(stored, np.packbits(expected, axis=1, bitorder="little"))
    for row, token in ((0, 1), (ROWS - 1, length - 1)):
        assert bool(stored[row, token // 8] >> (token % 8) & 1) == expected[row, token]

    assert info.loss_mask_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.targets == expected.sum()
    mask = open_mask(manifest, info)
    assert np.array_equal(learned_in(read_mask(mask, range(3, 6), length), length), expected[3:6])
    assert count_targets(read_mask(mask, range(ROWS), length)).tolist() == [*expected.sum(axis=1)]
    assert np.array_equal(learned_of_rows(manifest, info, range(5, 7)), expected[5:7])
    assert verify_mask(manifest, info) is not None


def test_blocks_are_one_file(tmp_path: Path) -> None:
    """Catches a header for each block, and a count that forgets the blocks before."""
    mask = mask_of(13)
    whole = write_mask(tmp_path / "whole.npy", [mask], ROWS)
    parts = write_mask(tmp_path / "parts.npy", [mask[:3], mask[3:4], mask[4:]], ROWS)
    assert whole == parts
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "parts.npy").read_bytes()


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_that_are_no_mask(length: int) -> None:
    """Catches a row that teaches nothing, a first token that is learned, and a bit behind."""
    packed = np.packbits(mask_of(length), axis=1, bitorder="little")
    assert bad_row(packed, 0, length) == ""
    empty, first, behind = packed.copy(), packed.copy(), packed.copy()
    empty[3] = 0
    first[4, 0] |= 1
    behind[5, -1] |= 1 << 7
    assert bad_row(empty, 10, length).startswith("row 13 of the loss mask has no target")
    assert bad_row(first, 10, length).startswith("row 14 of the loss mask learns the token at pos")
    expected = "" if length % 8 == 0 else "row 15 of the loss mask has a bit behind its last token"
    assert bad_row(behind, 10, length).startswith(expected)
    assert bool(bad_row(behind, 10, length)) == bool(expected)


def edited(change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        stored = np.load(path)
        np.save(path, found if (found := change(stored)) is not None else stored)

    return write


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing": (Path.unlink, "cannot be read", "cannot be read"),
    "cut": (cut, "truncated", "truncated"),
    "other rows": (edited(lambda m: m[1:]), r"\[7, 2\].* of 8 rows of 13 tokens is uint8", "uint8"),
    "columns": (edited(np.asfortranarray), "in column order", "in column order"),
    "bool": (edited(lambda m: m.astype(bool)), "holds bool", "holds bool"),
    "no target": (
        edited(lambda m: m.__setitem__(2, 0)),
        "row 2 of the loss mask has no target.*; its sha256 is not the manifest's either",
        "row 2 of the loss mask has no target.*; prepare the data anew",
    ),
    "first": (
        edited(lambda m: m.__setitem__((4, 0), m[4, 0] | 1)),
        "row 4 of the loss mask learns the token at position 0",
        "row 4 of the loss mask learns the token at position 0",
    ),
    "behind": (
        edited(lambda m: m.__setitem__((6, 1), m[6, 1] | 128)),
        "row 6 of the loss mask has a bit behind its last token, of 13",
        "row 6 of the loss mask has a bit behind its last token, of 13",
    ),
    "another count": (
        edited(lambda m: m.__setitem__((1, 0), m[1, 0] ^ 4)),
        r"has \d+ targets, the manifest says \d+; its sha256",
        r"has \d+ targets, the manifest says \d+; prepare",
    ),
}
EARLY = ("missing", "cut", "other rows", "columns", "bool")
"""What header and size tell, before a start."""


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_with_chunk_and_row(tmp_path: Path, name: str) -> None:
    """Catches a mask that is not the manifest's and is trained by, with its hash or without."""
    damage, message, hashed = DAMAGE[name]
    manifest = folder_of(tmp_path)
    damage(tmp_path / "chunk_001.mask.npy")
    info = manifest.chunks[1]

    with pytest.raises(DataError, match=f"^chunk_001 .*{message}") as told:
        verify_chunk(manifest, info)
    assert "\n" not in str(told.value)
    if name in EARLY:
        with pytest.raises(DataError, match=f"^chunk_001 .*{message}"):
            check_files(manifest)
    else:
        check_files(manifest)
    if name != "missing":
        # As a faulty preparation would leave it.
        manifest = rehash(manifest)
        with pytest.raises(DataError, match=f"^chunk_001 .*{hashed}"):
            verify_chunk(manifest, manifest.chunks[1])


def test_a_changed_bit_is_found_by_the_hash_alone(tmp_path: Path) -> None:
    """Catches a check of counts without the hash: a mask with as many ones, elsewhere."""
    manifest = folder_of(tmp_path)
    path = tmp_path / "chunk_000.mask.npy"
    stored = np.load(path)
    assert stored[0, 0] != stored[1, 0]
    stored[[0, 1]] = stored[[1, 0]]
    np.save(path, stored)
    with pytest.raises(DataError, match=r"chunk_000 .*: sha256 is .*, the manifest says"):
        verify_chunk(manifest, manifest.chunks[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["chunks"][1].pop("loss_mask"), "2 of 3 chunks have a loss mask.*: chunk_001;"),
        (lambda c: c["held_out"].pop("loss_mask"), "2 of 3 chunks .*: held_out; all must have one"),
        (lambda c: c["chunks"][0].pop("loss_mask_sha256"), "'loss_mask_sha256' is missing"),
        (lambda c: c["chunks"][0].pop("targets"), "chunk_000: targets is None, with a loss mask"),
        (lambda c: c["chunks"][0].update(targets=7), "targets is 7, .* 8 rows .* have 8 to 96"),
        (lambda c: c["chunks"][0].update(targets=97), "targets is 97"),
        (lambda c: c["chunks"][0].update(loss_mask="../m.npy"), "outside the folder"),
        (
            lambda c: c["chunks"][0].update(loss_mask="chunk_001.mask.npy"),
            "chunk loss_mask 'chunk_001.mask.npy' appears twice",
        ),
    ],
)
def test_manifests_that_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """Catches a folder that is masked in part, and a mask from somewhere else."""
    with pytest.raises(DataError, match=message):
        edit(folder_of(tmp_path), change)


def test_nobody_trains_in_silence(tmp_path: Path) -> None:
    """Catches masks that are left out unasked, or asked for and not there."""
    (tmp_path / "masked").mkdir()
    (tmp_path / "plain").mkdir()
    masked = folder_of(tmp_path / "masked")
    plain = folder_of(tmp_path / "plain", masked=False)
    assert masked.has_masks and not plain.has_masks
    with pytest.raises(DataError, match=r"use learns the masked tokens only.*ignore every token"):
        masked_as_asked(masked, "none")
    with pytest.raises(DataError, match=r"has no loss masks, but data.loss_mask is use"):
        masked_as_asked(plain, "use")
    assert masked_as_asked(masked, "use") is masked
    assert masked_as_asked(plain, "none") is plain
    ignored = masked_as_asked(masked, "ignore")
    assert not ignored.has_masks and ignored.held_out and ignored.held_out.loss_mask is None


def test_the_content_hash_knows_masks(tmp_path: Path) -> None:
    """Catches two masks with one name, and a folder without masks whose hash moves."""
    found = set()
    for name, seed in (("a", 0), ("b", 1), ("plain", None)):
        (tmp_path / name).mkdir()
        mask = None if seed is None else mask_of(13, seed=seed)
        info = add_chunk(tmp_path / name, "chunk_000", ids_of(13), VOCAB, mask=mask)
        info = info.model_copy(update={"provenance_content_sha256": "p" * 64})
        manifest = finish(tmp_path / name, [info], 13, VOCAB)
        found.add(manifest.content_sha256)
        if name == "b":
            bare = manifest.without_masks().content_sha256
    assert len(found) == 3 and manifest.content_sha256 == bare


# Reading


def loader_of(manifest: Manifest, rank: int = 0, ranks: int = 1, micro: int = 2) -> Loader:
    order = make_order(manifest, None, 4)
    return Loader(manifest, order, Share(rank, ranks, micro), VOCAB, verify=True)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_labels_are_the_learned_tokens_of_any_split(tmp_path: Path, ranks: int, micro: int) -> None:
    """Catches labels of other rows, a mask that is shifted, and targets counted per rank."""
    manifest = folder_of(tmp_path)
    loaders = [loader_of(manifest, rank, ranks, micro) for rank in range(ranks)]
    for step in range(1, 5):
        parts = [part for loader in loaders for part in loader.step(step)]
        chunk, first = divmod(step - 1, 2)
        rows = slice(4 * first, 4 * first + 4)
        ids, learned = ids_of(13, seed=chunk)[rows], mask_of(13, seed=chunk)[rows]
        assert np.array_equal(torch.cat([part.tokens for part in parts]), ids)
        labels = torch.cat([part.targets for part in parts])
        assert np.array_equal(labels, np.where(learned, ids, IGNORE))
        assert {part.row_targets for part in parts} == {tuple(learned.sum(axis=1))}
    for loader in loaders:
        loader.close()


def test_a_batch_of_its_own_each_time(tmp_path: Path) -> None:
    """Catches a mask that is kept and changed by a step: the next one would learn less."""
    with loader_of(folder_of(tmp_path)) as loader:
        first = [part.targets.clone() for part in loader.step(1)]
        for part in loader.step(1):
            part.targets.fill_(IGNORE)
            part.tokens.zero_()
        again = [part.targets for part in loader.step(1)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_held_out_rows_have_their_masks(tmp_path: Path) -> None:
    """Catches padding that counts as a target, and labels of a row beside."""
    manifest = folder_of(tmp_path)
    loader = HeldOutLoader(HeldOutSet.of("held_out", manifest, 5), Share(0, 1, 2), 2)
    ids, learned = ids_of(13, seed=2), mask_of(13, seed=2)
    for index, (rows, counted) in enumerate([([0, 1, 2, 3], 4), ([4, 4], 1)]):
        parts = loader.read(index)
        labels = torch.cat([part.targets for part in parts])
        assert np.array_equal(labels, np.where(learned, ids, IGNORE)[rows])
        targets = tuple(learned.sum(axis=1)[rows[:counted]])
        assert {part.row_targets for part in parts} == {targets}
    loader.close()


def test_a_mask_that_is_exchanged_is_hashed_again(tmp_path: Path) -> None:
    """Catches a look at the ids' file alone while a run reads."""
    manifest = folder_of(tmp_path)
    info = manifest.chunks[0]
    reader = ChunkReader(manifest, verify=True)
    chunk = reader.open(info)
    reader.confirm(chunk)
    identity = reader.identity("chunk_000")
    assert isinstance(identity, ChunkIdentity) and identity.mask is not None

    path = tmp_path / "chunk_000.mask.npy"
    with path.open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\xfe")
    with pytest.raises(DataError, match=re.escape(f"chunk_000 ({path})")):
        reader.confirm(chunk)
