"""Data loader: batches of each rank against chunk files read plainly."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.data.chunk import Manifest, verify_chunk
from k2train.data.held_out import HeldOutSet
from k2train.data.loader import HeldOutLoader, Loader, MicroBatch, Share
from k2train.data.order import ChunkOrder, make_order
from k2train.errors import DataError
from tests.support.data_folder import add_chunk, edit, finish, flip

LENGTH, VOCAB, BATCH = 6, 1000, 4
ROWS = {"chunk_000": 9, "chunk_001": 8}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    random = np.random.default_rng(1)
    infos = [
        add_chunk(tmp_path, name, random.integers(0, VOCAB, (rows, LENGTH)), VOCAB)
        for name, rows in {**ROWS, "held_out": 10}.items()
    ]
    return finish(tmp_path, infos, LENGTH, VOCAB)


@pytest.fixture
def order(manifest: Manifest) -> ChunkOrder:
    return make_order(manifest, [1, 0], BATCH)


def rows_of(manifest: Manifest, name: str, rows: range) -> torch.Tensor:
    return torch.from_numpy(np.load(manifest.folder / f"{name}.npy")[rows].astype(np.int64))


@pytest.mark.parametrize(("data", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_together_read_the_step(
    manifest: Manifest, order: ChunkOrder, data: int, micro: int
) -> None:
    """Catches a rank reading another's rows, micro-batches out of order, and a prefetched step
    handed out wrongly.
    """
    loaders = [
        Loader(manifest, order, Share(dp, data, micro), VOCAB, verify=True) for dp in range(data)
    ]
    for step in range(1, order.total_steps + 1):
        batches = [[part.tokens for part in loader.step(step)] for loader in loaders]
        assert all(
            part.shape == (micro, LENGTH) and part.dtype == torch.int64
            for b in batches
            for part in b
        )
        expected = rows_of(manifest, order.position(step).name, order.rows_of(step))
        assert torch.equal(torch.cat([part for batch in batches for part in batch]), expected)

    for loader in loaders:
        loader.close()


def test_any_step_may_be_asked_next(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches a prefetch that answers with what it has instead of what was asked, as after a
    rollback.
    """
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB) as loader:
        for step in (3, 1, 1, 4, 2, 3):
            expected = rows_of(manifest, order.position(step).name, order.rows_of(step))
            assert torch.equal(loader.step(step)[0].tokens, expected), step
            assert len(loader._pending) <= 2


def test_batches_are_copies(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches a batch that is a view of the file: writing to it must not change what is read
    again.
    """
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB) as loader:
        first = loader.step(1)[0].tokens
        kept = first.clone()
        first.zero_()
        assert torch.equal(loader.step(1)[0].tokens, kept)


def held_out_of(manifest: Manifest, limit: int | None = None) -> HeldOutSet:
    return HeldOutSet.of("held_out", manifest, limit)


@pytest.mark.parametrize("limit", (None, 1, 4, 9, 50))
@pytest.mark.parametrize(("ranks", "micro", "most"), ((1, 1, 4), (2, 1, 2), (2, 2, 1), (3, 2, 9)))
def test_every_held_out_row_is_read_once(
    manifest: Manifest, ranks: int, micro: int, most: int, limit: int | None
) -> None:
    """Catches rows that are left out because the batch does not divide them, rows that are scored
    twice, and ranks that read another number of micro-batches.
    """
    held_out = held_out_of(manifest, limit)
    assert held_out.rows == min(10, limit or 10) and held_out.total_rows == 10
    loaders = [HeldOutLoader(held_out, Share(dp, ranks, micro), most) for dp in range(ranks)]
    seen = []
    for index, batch in enumerate(loaders[0].batches):
        parts = [loader.read(index) for loader in loaders]
        assert {len(part) for part in parts} == {batch.num_microbatches} <= set(range(most + 1))
        assert all(micro_batch.tokens.shape == (micro, LENGTH) for p in parts for micro_batch in p)
        rows = torch.cat([micro_batch.tokens for part in parts for micro_batch in part])
        seen.append(rows[: len(batch.rows)])
        # No micro-batch of padding alone, but for the ranks beside the last row.
        assert len(rows) - len(batch.rows) < ranks * micro
    assert torch.equal(torch.cat(seen), rows_of(manifest, "held_out", range(held_out.rows)))


def test_a_set_of_chunks_is_all_of_them(manifest: Manifest) -> None:
    """Catches a set of data without a held-out chunk whose first chunk alone is scored."""
    data = edit(manifest, lambda content: content.update(held_out=None))
    loader = HeldOutLoader(held_out_of(data, 14), Share(0, 1, 2), 2)
    read = [loader.read(i) for i in range(len(loader.batches))]
    names = [loader.opens(i) for i in range(len(loader.batches))]
    assert names == ["chunk_000", "", "", "chunk_001", ""]
    found = torch.cat(
        [
            torch.cat([part.tokens for part in parts])[: len(batch.rows)]
            for parts, batch in zip(read, loader.batches, strict=True)
        ]
    )
    chunks = (("chunk_000", 9), ("chunk_001", 5))
    expected = [rows_of(data, name, range(count)) for name, count in chunks]
    assert torch.equal(found, torch.cat(expected))


def corrupt(manifest: Manifest, name: str, value: int) -> None:
    path = manifest.folder / f"{name}.npy"
    ids = np.load(path)
    ids[5, 3] = value
    np.save(path, ids)


def test_bad_id_is_raised_where_it_is_used(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches an id beyond the vocabulary reaching the model when whole chunks are not verified."""
    corrupt(manifest, "chunk_001", VOCAB)
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB) as loader:
        loader.step(1)
        with pytest.raises(
            DataError, match=r"chunk_001 .*row 5, position 3: id 1000 is not below vocab_size 1000"
        ):
            loader.step(2)

    with (
        Loader(manifest, order, Share(0, 2, 2), VOCAB) as other,
        pytest.raises(DataError, match="row 5, position 3"),
    ):
        other.step(2)


def test_verify_stops_before_the_first_row(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches rows of a damaged chunk handed out before it was hashed, and a mistake lost in the
    thread.
    """
    corrupt(manifest, "chunk_001", 1)
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"chunk_001 .*sha256"):
                loader.step(1)
        assert loader.verify_ahead("chunk_000").result() is None
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB) as unverified:
        unverified.step(1)
    corrupt(manifest, "held_out", 1)
    held_out = HeldOutLoader(held_out_of(manifest), Share(0, 1, BATCH), 1, verify=True)
    with pytest.raises(DataError, match=r"held_out .*sha256"):
        held_out.read(0)


def test_each_chunk_is_verified_once(
    manifest: Manifest, order: ChunkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hashing a chunk again at every step, or twice when it was verified ahead."""
    seen: list[str] = []
    monkeypatch.setattr(
        "k2train.data.chunk_reader.verify_chunk",
        lambda manifest, info, stopped: seen.append(info.name),
    )
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True) as loader:
        for step in range(1, order.total_steps + 1):
            loader.step(step)
    assert sorted(seen) == ["chunk_000", "chunk_001"]


def test_what_does_not_fit_is_refused_at_once(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches a run that finds out at its first, or hundredth, step."""
    with pytest.raises(DataError, match=r"model.vocab_size \(999\) must be at least .*\(1000"):
        Loader(manifest, order, Share(0, 1, 1), VOCAB - 1)
    with pytest.raises(DataError, match="nearest that are"):
        Loader(manifest, order, Share(0, 3, 1), VOCAB)
    (manifest.folder / "chunk_000.npy").write_bytes(b"short")
    with pytest.raises(DataError, match="chunk_000"):
        Loader(manifest, order, Share(0, 1, 1), VOCAB)


def test_close_ends_the_threads(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches threads that outlive the run and keep the process from ending."""
    before = set(threading.enumerate())
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True) as loader:
        loader.step(1)
        made = set(threading.enumerate()) - before
        assert any(thread.name.startswith("k2train-loader") for thread in made)
    loader.close()
    assert not any(thread.is_alive() for thread in made)


def reversed_rows(manifest: Manifest, name: str) -> None:
    """Put another file under the chunk's name: same size, valid ids, other rows."""
    path = manifest.folder / f"{name}.npy"
    np.save(path.with_name("other.npy"), np.load(path)[::-1])
    path.with_name("other.npy").replace(path)


def same_rows(manifest: Manifest, name: str) -> None:
    """The same content, copied again."""
    path = manifest.folder / f"{name}.npy"
    shutil.copy(path, path.with_name("other.npy"))
    path.with_name("other.npy").replace(path)


def test_a_chunk_exchanged_after_its_hash(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches training on rows that nobody hashed, after which everything says it is whole."""
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True) as loader:
        loader.verify_ahead("chunk_001").result()
        reversed_rows(manifest, "chunk_001")
        with pytest.raises(DataError, match=r"chunk_001 .*sha256"):
            loader.step(1)


def test_a_chunk_copied_again_after_its_hash(manifest: Manifest, order: ChunkOrder) -> None:
    """Catches a run that ends although its data are what the manifest says."""
    with Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True) as loader:
        loader.verify_ahead("chunk_001").result()
        same_rows(manifest, "chunk_001")
        (part,) = loader.step(1)
    assert torch.equal(part.tokens, rows_of(manifest, "chunk_001", range(BATCH)))


class Hashed:
    """The chunks that were hashed, and the progress that was reported meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loader: Loader) -> None:
        self.names: list[str] = []
        self.progress = 0
        monkeypatch.setattr("k2train.data.chunk_reader.verify_chunk", self)
        loader.report_to(self.gets_on)

    def __call__(self, manifest: Manifest, info: Any, stopped: Any) -> Any:
        self.names.append(info.name)
        return verify_chunk(manifest, info, stopped)

    def gets_on(self) -> None:
        self.progress += 1


def touched(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file, late enough for any clock of a file system to show it."""
    time.sleep(0.02)
    change(path)


def flipped(path: Path) -> None:
    """Change the last row in place, and put the time back."""
    times = os.stat(path)
    flip(path, -2)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("at", "verify"), [(1, True), (2, True), (3, True), (4, True), (2, False), (4, False)]
)
def test_a_chunk_that_changes_while_it_is_read(
    manifest: Manifest, order: ChunkOrder, at: int, verify: bool
) -> None:
    """Catches rows written after the hash, in place and with the time put back: at every step, the
    last one of a chunk and of the run too, and on ranks that leave the first hash to another.
    """
    assert order.total_steps == 4
    loader = Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=verify)
    for step in range(1, at):
        loader._read(step)
    name = order.position(at).name
    if at in (2, 4):
        loader._read(at)
    touched(manifest.folder / f"{name}.npy", flipped)
    with pytest.raises(DataError, match=rf"{name} .*sha256"):
        loader._read(at)
    loader.close()


def test_held_out_rows_that_change(manifest: Manifest) -> None:
    """Catches a loss of rows that nobody hashed."""
    loader = HeldOutLoader(held_out_of(manifest), Share(0, 1, BATCH), 1, verify=True)
    loader.read(0)
    touched(manifest.folder / "held_out.npy", flipped)
    with pytest.raises(DataError, match=r"held_out .*sha256"):
        loader.read(1)


@pytest.mark.parametrize(
    "change", [lambda path: path.chmod(0o400), os.utime, lambda path: same_rows_at(path)]
)
def test_a_touch_is_no_damage(
    manifest: Manifest, order: ChunkOrder, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    """Catches a run that ends because somebody protected, touched or copied its data, one that does
    not look, and one that looks at every step from then on.
    """
    loader = Loader(manifest, order, Share(0, 1, BATCH), VOCAB, verify=True)
    hashed = Hashed(monkeypatch, loader)
    loader._read(1)
    assert hashed.names == ["chunk_001"] and hashed.progress > 0
    touched(manifest.folder / "chunk_001.npy", change)
    for _ in range(2):
        (part,) = loader._read(2)
    assert hashed.names == ["chunk_001"] * 2
    expected = rows_of(manifest, "chunk_001", range(BATCH, 2 * BATCH))
    assert torch.equal(part.tokens, expected)
    loader.close()


def same_rows_at(path: Path) -> None:
    shutil.copy(path, path.with_name("other.npy"))
    path.with_name("other.npy").replace(path)


def test_ids_of_another_file_are_compared(manifest: Manifest, order: ChunkOrder) -> None:
    """What ranks of one machine tell each other says which file they opened."""
    loaders = [Loader(manifest, order, Share(dp, 2, 1), VOCAB) for dp in range(2)]
    loaders[0]._read(1)
    reversed_rows(manifest, "chunk_001")
    loaders[1]._read(1)
    one, other = (loader.identity("chunk_001") for loader in loaders)
    assert one is not None and other is not None and not other.has_content_of(one)
    assert loaders[0].identity("chunk_000") is None
    for loader in loaders:
        loader.close()


class Uploaded:
    """A tensor that notes how it is copied."""

    def __init__(self, memory: str = "pageable"):
        self.memory = memory

    def contiguous(self) -> "Uploaded":
        return Uploaded("contiguous")

    def pin_memory(self) -> "Uploaded":
        assert self.memory == "contiguous", "torch refuses memory that others share"
        return Uploaded("pinned")

    def to(self, device: torch.device, non_blocking: bool = False) -> str:
        return f"{self.memory} to {device.type}, {'queued' if non_blocking else 'waited for'}"


@pytest.mark.parametrize(("device", "memory"), (("cuda", "pinned"), ("cpu", "pageable")))
def test_a_batch_goes_to_a_device_from_pinned_memory(device: str, memory: str) -> None:
    """Catches an upload that blocks the host until the device has taken it."""
    batch: Any = MicroBatch(Uploaded(), None, Uploaded())  # type: ignore[arg-type]
    copied = f"{memory} to {device}, queued"
    assert batch.to(torch.device(device)) == (copied, None, copied, None, None)
