"""Verification of a checkpoint's files: no changed bit passes, nothing outside is read.

Would catch a flipped bit in any byte, a header that leaves bytes out, and a name or a link that
leads out of the checkpoint.
"""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from k2train.checkpoint import shards as module
from k2train.checkpoint import verify
from k2train.checkpoint.manifest import MANIFEST, THINNED, mark_thinned, read_manifest
from k2train.checkpoint.shards import read_header
from k2train.checkpoint.side_files import side_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, UnavailableError
from tests.checkpoint.test_shards import make_checkpoint, write_manifest
from tests.support.tiny_corpus import manifest_of


def places_to_flip(path: Path, rng: random.Random) -> list[tuple[Path, int]]:
    """In every file each byte of the length, some of every kind of header byte, and any others."""
    found = []
    found += [
        (file, n) for file in sorted(path.glob("facts/*")) for n in range(file.stat().st_size)
    ]
    for file in [*path.glob("model/*"), *path.glob("optimizer/*")]:
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        found += [(file, n) for n in range(8)]
        for kind in sorted(set(content[8:header])):
            found.append((file, rng.choice([n for n in range(8, header) if content[n] == kind])))
        found += [(file, n) for n in range(header, len(content))]
    for file in (path / MANIFEST, path / THINNED):
        if file.exists():
            found += [(file, n) for n in range(file.stat().st_size)]
    return found


@pytest.mark.parametrize("thinned", (False, True), ids=("whole", "thinned"))
def test_400_flipped_bits_are_found_and_named(tmp_path: Path, thinned: bool) -> None:
    """Flip bits of model, optimizer, manifest and marker, and of every kind of header byte.

    Each is refused naming the file, and the tensor where the byte belongs to one.
    """
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    if thinned:
        mark_thinned(path, read_manifest(path))
        shutil.rmtree(path / "optimizer")
        for side in path.glob("facts/optimizer-*"):
            side.unlink()
    verify_checkpoint(path)
    rng = random.Random(5)
    every = places_to_flip(path, rng)
    by_file: dict[Path, list[int]] = {}
    for file, place in every:
        by_file.setdefault(file, []).append(place)
    chosen = [
        (file, place)
        for file, places in by_file.items()
        for place in rng.sample(places, min(90, len(places)))
    ]
    assert len(chosen) >= (300 if thinned else 400), "too few to say anything"
    for file, place in chosen:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(path)
        message = str(caught.value)
        assert len(message.splitlines()) == 1 and file.name in message, (file.name, place, message)
        if file.suffix == ".safetensors" and place >= 8 + int.from_bytes(content[:8], "little"):
            (name,) = [p.name for p in read_header(file)[1] if p.start <= place < p.stop]
            assert f"tensor {name} " in message
        file.write_bytes(content)
    verify_checkpoint(path)


def bad_name(path: Path, name: str) -> None:
    manifest = manifest_of(path)
    manifest["files"][name] = manifest["files"][
        "model/shard-00001-model-00001-of-00001.safetensors"
    ]
    write_manifest(path, manifest)


@pytest.mark.parametrize(
    "name",
    ("../x", "model/../../x", "/etc/passwd", "model//x", "a/x", "x", "model/..", "model/a/b"),
)
def test_names_outside_the_folders_are_refused(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "ckpt_001")
    bad_name(tmp_path / "ckpt_001", name)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify_checkpoint(tmp_path / "ckpt_001")


def test_links_out_are_refused(tmp_path: Path) -> None:
    """Also a link to the right bytes: changing its target changes the checkpoint."""
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    file = next(iter((path / "model").iterdir()))
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify_checkpoint(path)


def grown(file: Path) -> None:
    """Append bytes and adapt the manifest's size: the tensors no longer fill the file."""
    file.write_bytes(file.read_bytes() + b"more")
    manifest = manifest_of(file.parents[1])
    manifest["files"][f"model/{file.name}"]["bytes"] += 4
    write_manifest(file.parents[1], manifest)


def test_bytes_beyond_the_tensors_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "ckpt_001")
    grown(next(iter((tmp_path / "ckpt_001" / "model").iterdir())))
    with pytest.raises(CheckpointError, match="4 bytes after its last tensor"):
        verify_checkpoint(tmp_path / "ckpt_001")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A header, with its right hash in the manifest, that leaves a gap before its last tensor."""
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    file = sorted((path / "model").iterdir())[0]
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    moved = content[8 : 8 + size].replace(b"[48,60]", b"[44,56]")
    assert moved != content[8 : 8 + size]
    file.write_bytes(content[:8] + moved + content[8 + size :])
    manifest = manifest_of(path)
    side = path / side_name(f"model/{file.name}")
    told = json.loads(side.read_text())
    told["header_sha256"] = module.sha256(content[:8] + moved).hexdigest()
    side.write_text(json.dumps(told))
    facts = manifest["files"][f"model/{file.name}"]
    facts["facts_sha256"] = module.sha256(side.read_bytes()).hexdigest()
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match="it should begin at"):
        verify_checkpoint(path)


def test_the_disk_is_asked_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one piece is hashed the next are on their way; never beyond the end of the range."""
    content = os.urandom(3 * verify.READ_BYTES + 5)
    (tmp_path / "x").write_bytes(content)
    asked: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def noting(descriptor: int, start: int, count: int, how: int) -> None:
        if how == os.POSIX_FADV_WILLNEED:
            asked.append((start, start + count))
        advise(descriptor, start, count, how)

    monkeypatch.setattr(os, "posix_fadvise", noting)
    assert (
        verify.hash_range(tmp_path / "x", 7, len(content)) == module.sha256(content[7:]).hexdigest()
    )
    assert asked[0] == (7, len(content)) and all(stop == len(content) for _, stop in asked)


@pytest.mark.parametrize("number", (errno.EIO, errno.ESTALE))
def test_asking_for_a_bad_block_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Catches a rank that leaves an exchange alone, because its file system is away altogether."""
    asked: list[Path] = []

    def away(folder: Path) -> list[Path]:
        asked.append(folder)
        raise UnavailableError("the folder is away", number)

    monkeypatch.setattr(verify, "list_checkpoints", away)
    error = UnavailableError("a file is away", number)
    assert verify.has_bad_block(error, tmp_path / "ckpt_001") is False
    # Only EIO can be a bad sector, so nothing else is waited for a second time.
    assert len(asked) == (number == errno.EIO)
