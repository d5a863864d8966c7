"""Loading in one pass: every byte is checked where it lies, and nothing is read twice.

Catches a flipped bit that a load lets pass, damage between disk and memory, weights that are read
for nothing, and a rank that reads what belongs to others.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.checkpoint import manifest as manifest_module
from k2train.checkpoint import piece_check, shards, side_files
from k2train.checkpoint.load import RefusedCheckpointError, agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.shards import read_header
from k2train.checkpoint.writer import CheckpointWriter, snapshot
from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, save_facts, tiny_config

SMALL_PIECE = 64


def config_of(tensor: int) -> Any:
    return tiny_config(model__num_layers=2, parallel__tensor=tensor)


def filled(launch: Launch, tensor: int) -> tuple[Any, Any]:
    """Grid and engine with states that differ in every element."""
    config = config_of(tensor)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for number, line in enumerate(engine.optimizer.flat_shards.values()):
        line.copy_(torch.arange(line.numel()) * 0.5 + number + 7 * launch.rank)
    return grid, engine


def save_job(launch: Launch, directory: str, tensor: int, piece_bytes: int) -> None:
    """Save with pieces of so many bytes."""
    real, shards.PIECE_BYTES = shards.PIECE_BYTES, piece_bytes
    try:
        grid, engine = filled(launch, tensor)
        writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False))
        state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
        writer.save("ckpt_001", state, save_facts(2, 0))
    finally:
        shards.PIECE_BYTES = real


@pytest.fixture(scope="module")
def saved(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by two tensor-parallel ranks, in pieces of 64 bytes."""
    directory = tmp_path_factory.mktemp("pieces")
    pool.run(2, save_job, str(directory), 2, SMALL_PIECE)
    return directory / "ckpt_001"


def load(launch: Launch, path: str, tensor: int) -> str:
    """Load on tensor-parallel ranks; the refusal, or ""."""
    config = config_of(tensor)
    grid = grid_of(launch, config)
    agreed = agree_on_checkpoint([Path(path)], grid, to_load=True)
    assert agreed.taken is not None, str(agreed)
    engine = engine_of(config, grid, fill=False)
    layout, lines = engine.gradients.shard_layout, engine.optimizer.flat_shards
    try:
        load_states(agreed.taken, layout, lines, grid, engine.dtype)
    except RefusedCheckpointError as error:
        return str(error)
    return ""


def flip_job(launch: Launch, path: str, tensor: int, flips: list[tuple[str, int]]) -> list[str]:
    """Flip one bit after the other; what each load says."""
    found = []
    for name, at in flips:
        file = Path(path) / name
        if launch.rank == 0:
            flip(file, at)
        torch.distributed.barrier()
        found.append(load(launch, path, tensor))
        torch.distributed.barrier()
        if launch.rank == 0:
            flip(file, at)
        torch.distributed.barrier()
    return [*found, load(launch, path, tensor)]


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(("world", "tensor"), ((2, 2), (1, 1), (2, 1)), ids=str)
def test_every_flipped_bit_is_found_by_every_rank(
    pool: GlooPool, saved: Path, tmp_path: Path, world: int, tensor: int
) -> None:
    """First, middle and last byte of blocks, on the saved layout and two others: the file and the
    tensor are named, all ranks refuse alike, and without the flip the load succeeds.
    """
    path = tmp_path / "ckpt_001"
    shutil.copytree(saved, path)
    flips, names = [], []
    for name in sorted(read_manifest(path).files):
        if not name.startswith("optimizer/"):
            continue
        extents = read_header(path / name)[1]
        for extent in (extents[0], extents[len(extents) // 2], extents[-1]):
            for at in (extent.start, (extent.start + extent.stop) // 2, extent.stop - 1):
                flips.append((name, at))
                names.append(f"{name}: tensor {extent.name} does not match its hash")
    answers = pool.run(world, flip_job, str(path), tensor, flips)
    assert len(flips) == 18 and all(answer == answers[0] for answer in answers)
    for said, expected in zip(answers[0][:-1], names, strict=True):
        assert expected in said and str(path) in said
    assert answers[0][-1] == ""


def test_weights_are_not_read(pool: GlooPool, saved: Path, tmp_path: Path) -> None:
    """A load needs the optimizer's files only: another flipped byte ends nothing."""
    path = tmp_path / "ckpt_001"
    shutil.copytree(saved, path)
    name = next(name for name in read_manifest(path).files if name.startswith("model/"))
    flip(path / name, (path / name).stat().st_size - 3)
    assert pool.run(2, load, str(path), 2) == ["", ""]


def memory_job(launch: Launch, path: str, tensor: int, times: int) -> str:
    """Rank 1's memory changes one bit of what a read has filled, so often in the same place."""
    real, reads = piece_check.ShardReader._read_once, Counter[tuple[str, int]]()

    def changing(self: Any, view: memoryview, start: int) -> int:
        count = real(self, view, start)
        place = (str(self.file), start)
        if "optimizer" in place[0] and next(iter(reads), place) == place:
            reads[place] += 1
            if reads[place] <= times:
                view[count // 2] ^= 16
        return count

    if launch.rank == 1:
        piece_check.ShardReader._read_once = changing  # type: ignore[method-assign]
    try:
        return load(launch, path, tensor)
    finally:
        piece_check.ShardReader._read_once = real  # type: ignore[method-assign]


@pytest.mark.parametrize("tensor", (2, 1))
def test_what_lies_in_memory_is_checked(pool: GlooPool, saved: Path, tensor: int) -> None:
    """Catches a check of what the disk delivered, or of a second read, in place of the state."""
    first, second = pool.run(2, memory_job, str(saved), tensor, 2)
    assert first == second and "rank 1: " in first and "does not match its hash" in first
    # What was an accident on the way is read again, and is no reason to go back by hours.
    assert pool.run(2, memory_job, str(saved), tensor, 1) == ["", ""]


def reads_job(launch: Launch, path: str, tensor: int) -> dict[str, int]:
    """How often a start reads each manifest and side file, and opens each shard for its values."""
    found: Counter[str] = Counter()
    plain, reader = side_files.read_plain_file, piece_check.ShardReader.__init__

    def counting(file: Path, *rest: Any) -> bytes:
        found[file.name] += 1
        return plain(file, *rest)

    def opening(self: Any, file: Path) -> None:
        found[f"{file.parent.name}/{file.name}"] = 1
        reader(self, file)

    side_files._known_side_files = side_files._KnownSideFiles()
    manifest_module._known_manifests = manifest_module._KnownManifests()
    settled, manifest_module.SETTLED_SECONDS = manifest_module.SETTLED_SECONDS, -60.0
    side_files.read_plain_file = manifest_module.read_plain_file = counting
    piece_check.ShardReader.__init__ = opening  # type: ignore[method-assign]
    try:
        assert load(launch, path, tensor) == ""
    finally:
        piece_check.ShardReader.__init__ = reader  # type: ignore[method-assign]
        side_files.read_plain_file = manifest_module.read_plain_file = plain
        manifest_module.SETTLED_SECONDS = settled
    return dict(found)


def test_a_rank_reads_its_own_files_once(pool: GlooPool, saved: Path) -> None:
    """On the saved layout: the manifest and each side file once, and the values of its own shard.

    The second tensor-parallel rank also needs what only the first one wrote (norms).
    """

    def own(rank: int, folder: str) -> str:
        return f"{folder}-shard-{rank + 1:05d}-model-00001-of-00001.json"

    def shard(rank: int) -> str:
        return f"optimizer/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"

    first, second = pool.run(2, reads_job, str(saved), 2)
    both = {"manifest.json": 1, own(0, "optimizer"): 1}
    assert first == {**both, own(0, "model"): 1, shard(0): 1}
    assert second == {
        **both,
        own(1, "model"): 1,
        own(1, "optimizer"): 1,
        shard(0): 1,
        shard(1): 1,
    }


def other_updates_job(launch: Launch, path: str) -> str:
    return str(agree_on_checkpoint([Path(path)], grid_of(launch, config_of(1)), to_load=True))


@pytest.mark.parametrize("key", ("step", "adam_steps"))
def test_another_number_of_updates_is_refused(
    pool: GlooPool, saved: Path, tmp_path: Path, key: str
) -> None:
    """Catches a manifest with its own right hash that trains on with other bits: the state's root
    covers the step and the updates.
    """
    from tests.checkpoint.test_load import change

    path = change(saved, tmp_path / "ckpt_001", {key: 9})
    (said,) = pool.run(1, other_updates_job, str(path))
    assert f"{key} 9" in said and "took none" in said


class Noted(SaveEvents):
    """Damage that was reported."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def damaged(self, path: Path, problem: str) -> None:
        self.problems.append(f"{path.name}: {problem}")


def weights_job(launch: Launch, directory: str) -> tuple[list[str], bool, bool]:
    """Go on from ckpt_001 and save: is it counted as verified before and after?"""
    grid, engine = filled(launch, 2)
    events = Noted()
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False), events)
    writer.mark_loaded(Path(directory) / "ckpt_001")
    before = "ckpt_001" in writer.verified
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    writer.save("ckpt_002", state, save_facts(3, 1))
    return events.problems, before, "ckpt_001" in writer.verified


@pytest.mark.parametrize("damage", (False, True))
def test_weights_that_nobody_read_are_not_verified(
    pool: GlooPool, saved: Path, tmp_path: Path, damage: bool
) -> None:
    """Catches older checkpoints that are thinned because of one whose weights are damaged."""
    path = tmp_path / "ckpt_001"
    shutil.copytree(saved, path)
    if damage:
        name = sorted(name for name in read_manifest(path).files if name.startswith("model/"))[1]
        flip(path / name, (path / name).stat().st_size - 3)
    (problems, before, after), _ = pool.run(2, weights_job, str(tmp_path))
    assert not before and after == (not damage)
    assert len(problems) == damage and all("model/shard-00002" in text for text in problems)


def cached_job(launch: Launch, path: str) -> str:
    """Rank 1's memory holds one page of a file wrong, until it is told to forget it."""
    preadv, fadvise, wrong = os.preadv, os.posix_fadvise, [True]

    def reading(descriptor: int, buffers: Any, start: int) -> int:
        count = preadv(descriptor, buffers, start)
        if wrong and "/optimizer/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            buffers[0][count // 2] ^= 16
        return count

    def advising(descriptor: int, start: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            wrong.clear()
        fadvise(descriptor, start, size, advice)

    if launch.rank == 1:
        os.preadv, os.posix_fadvise = reading, advising
    try:
        return load(launch, path, 2)
    finally:
        os.preadv, os.posix_fadvise = preadv, fadvise


def test_a_page_that_memory_holds_wrong_is_read_again_from_the_disk(
    pool: GlooPool, saved: Path
) -> None:
    """Catches a good checkpoint that is set aside because both tries came from the same memory."""
    assert pool.run(2, cached_job, str(saved)) == ["", ""]
