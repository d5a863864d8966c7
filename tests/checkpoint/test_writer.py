"""Checkpoint writer on several ranks: retries, disk space, lost leases, damage, order of saves."""

import errno
import os
import re
import subprocess
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train import fault_injection
from k2train.checkpoint import disk_space, read_back, writer
from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.host_digest import host_digest_sums
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.verify import verify_checkpoint
from k2train.checkpoint.writer import CheckpointWriter, SaveError, snapshot
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.launch.environment import Launch
from k2train.parallel.device_digest import StateDigest
from tests.support.command_line import HANG_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, save_facts, shapes_of, tiny_config


class Recorded(SaveEvents):
    """All that rank 0 is told; `instead` replaces methods by name."""

    def __init__(self, instead: dict[str, Any]):
        self.lines, self.whole, self.problems = [], [], []
        self.commits: list[tuple[str, int]] = []
        vars(self).update(instead)

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        self.commits.append((path.name, manifest.step))

    def verified(self, path: Path) -> None:
        self.whole.append(path.name)

    def damaged(self, path: Path, problem: str) -> None:
        self.problems.append(problem)

    def message(self, text: str) -> None:
        self.lines.append(text)


class RecordingWriter:
    """A writer on this rank's engine that records all that rank 0 is told."""

    def __init__(
        self,
        launch: Launch,
        directory: str,
        world: int = 2,
        policy: SavePolicy | None = None,
        **instead: Any,
    ):
        config = tiny_config(model__num_layers=2, parallel__tensor=world)
        self.grid = grid_of(launch, config)
        self.engine = engine_of(config, self.grid)
        self.events = Recorded(instead)
        self.writer = CheckpointWriter(Path(directory), self.grid, policy, self.events)
        self.writer.retry_every_seconds = 0.1

    def save(self, name: str, step: int = 2, **facts: Any) -> None:
        engine = self.engine
        state = self.writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        self.writer.save(name, state, save_facts(step, 0, **facts))

    def end(self) -> str:
        """What `wait` raises, or ""."""
        try:
            self.writer.wait()
        except (SaveError, RunError, CheckpointError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            fault_injection.arm("", self.grid.rank)
        return ""


def retry_job(launch: Launch, directory: str, fault: str) -> dict[str, Any]:
    """The disk refuses the last rank once; training changes the state until the retry."""
    recording = RecordingWriter(launch, directory, policy=SavePolicy(retry_seconds=60.0))
    before = {state: line.clone() for state, line in recording.engine.optimizer.flat_shards.items()}
    fault_injection.arm(fault, launch.rank)
    recording.save("ckpt_001")
    recording.engine.optimizer.master.add_(1.0)
    ended = recording.end()
    path, _ = agree_on_checkpoint([Path(directory) / "ckpt_001"], recording.grid)
    assert path is not None
    engine = recording.engine
    load_states(
        path,
        engine.gradients.shard_layout,
        engine.optimizer.flat_shards,
        recording.grid,
        engine.dtype,
    )
    same = all(
        torch.equal(
            engine.gradients.shard_layout.local(line, slot),
            engine.gradients.shard_layout.local(before[state], slot),
        )
        for state, line in engine.optimizer.flat_shards.items()
        for slot in engine.gradients.shard_layout.slots
    )
    return {
        "ended": ended,
        "logged": recording.events.lines,
        "same": same,
        "verified": recording.events.whole,
    }


@pytest.mark.parametrize(
    "fault",
    (
        "save.optimizer@rank=1:error=ENOSPC",
        "save.model@rank=0:error=EDQUOT",
        "save.hashed@rank=1:error=EIO",
        "save.synced@rank=0:error=EROFS",
    ),
)
def test_a_save_the_disk_refuses_is_tried_again(pool: GlooPool, tmp_path: Path, fault: str) -> None:
    """Catches a retry that saves the state of a later step instead of the snapshot."""
    first, second = pool.run(2, retry_job, str(tmp_path), fault)
    assert first["ended"] == second["ended"] == "" and first["same"] and second["same"]
    assert len(first["logged"]) == 1 and "ckpt_001 could not be saved" in first["logged"][0]
    assert "retried every 0.1 s" in first["logged"][0] and second["logged"] == []
    assert first["verified"] == ["ckpt_001"]
    assert not list(tmp_path.glob("*.tmp"))


def no_room_job(
    launch: Launch, directory: str, retry_seconds: float, free_after: int | None
) -> dict[str, Any]:
    """Rank 0 sees a full disk; after `free_after` looks there is room (None: never).

    Rank 1 sees room all the time.

    A look takes a tenth of a second by the writer's clock, however long it takes.
    """
    recording = RecordingWriter(launch, directory, policy=SavePolicy(retry_seconds=retry_seconds))
    recording.save("ckpt_001")
    assert recording.end() == ""
    looks, gone_on, held = [], Event(), []

    def free(path: Path) -> int:
        looks.append(path)
        if len(looks) == 2 and not gone_on.wait(HANG_SECONDS):
            held.append("training waited for room")
        return (
            1000
            if launch.rank == 0 and (free_after is None or len(looks) <= free_after)
            else 10**12
        )

    kept, disk_space.free_bytes = disk_space.free_bytes, free  # type: ignore[assignment]
    writer.time = SimpleNamespace(monotonic=lambda: 0.1 * len(looks))  # type: ignore[assignment]
    try:
        recording.save("ckpt_002")
        gone_on.set()
        ended = recording.end()
    finally:
        disk_space.free_bytes, writer.time = kept, time
    return {"ended": ended, "logged": recording.events.lines, "looks": len(looks), "held": held}


def test_no_room_for_a_while(pool: GlooPool, tmp_path: Path) -> None:
    """Training continues, the message names bytes and directory, and a retry succeeds."""
    first, second = pool.run(2, no_room_job, str(tmp_path), 60.0, 3)
    assert first["ended"] == second["ended"] == "" and first["looks"] == 4
    (line,) = first["logged"]
    assert re.match(
        r"no space for ckpt_002: needs [\d.]+ KiB, 1000 B are free in "
        rf"{re.escape(str(tmp_path))}; ",
        line,
    )
    assert first["held"] == []
    verify_checkpoint(tmp_path / "ckpt_002")


def test_no_room_at_all(pool: GlooPool, tmp_path: Path) -> None:
    """After retry_seconds it is one error on every rank.

    Earlier checkpoints stay intact and no partial one is left.
    """
    first, second = pool.run(2, no_room_job, str(tmp_path), 0.5, None)
    assert first["ended"] == second["ended"] and first["ended"].startswith(
        "DiskRefused: no space for ckpt_002: needs "
    )
    assert first["looks"] == 5 and second["looks"] == 0, "rank 0's word counts"
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_001"]
    verify_checkpoint(tmp_path / "ckpt_001")


def hurry_job(launch: Launch, directory: str) -> dict[str, Any]:
    recording = RecordingWriter(launch, directory, policy=SavePolicy(retry_seconds=600.0))
    fault_injection.arm(";".join(["save.model:error=ENOSPC"] * 300), launch.rank)
    recording.save("ckpt_001")
    time.sleep(0.5)
    if launch.rank == 0:
        recording.writer.skip_verification()
    ended = recording.end()
    recording.save("ckpt_002")
    return {"ended": ended, "then": recording.end(), "verified": recording.events.whole}


def test_a_process_that_must_end_gives_up(pool: GlooPool, tmp_path: Path) -> None:
    """Only rank 0 skips verification: every rank stops retrying.

    The next save is committed but not read back.
    """
    first, second = pool.run(2, hurry_job, str(tmp_path))
    assert first["ended"] == second["ended"] and "ckpt_001 could not be saved" in first["ended"]
    assert first["then"] == second["then"] == "" and first["verified"] == []
    verify_checkpoint(tmp_path / "ckpt_002")


def lost_job(launch: Launch, directory: str) -> tuple[str, list[str]]:
    def lost() -> None:
        assert launch.rank == 0, "only rank 0 has the lease"
        left = [path.name for path in Path(directory).iterdir()]
        raise RunError(f"the lease of the run is another's; {left}")

    recording = RecordingWriter(
        launch, directory, check_owner=lost, policy=SavePolicy(retry_seconds=60.0)
    )
    recording.save("ckpt_001", fencing_token=12 + launch.rank)
    return recording.end(), [name for name, _ in recording.events.commits]


def test_a_lost_lease_renames_nothing(pool: GlooPool, tmp_path: Path) -> None:
    """Another owner's unfinished checkpoint of the same name is not touched either."""
    other = tmp_path / "ckpt_001.13.tmp"
    other.mkdir()
    (other / "mine").write_text("")
    first, second = pool.run(2, lost_job, str(tmp_path))
    assert first == second and first[0].startswith("RunError: the lease of the run is another's")
    assert "ckpt_001.12.tmp" in first[0], "it was asked before anything was written"
    assert first[1] == [] and [path.name for path in tmp_path.iterdir()] == [other.name]
    assert (other / "mine").exists()


def damaged_job(
    launch: Launch, directory: str, always: bool, unrecorded: bool = False
) -> dict[str, Any]:
    """Change the files between commit and verification, once or every time."""
    recording = RecordingWriter(
        launch,
        directory,
        **({"damaged": raising(OSError(28, "No space left on device"))} if unrecorded else {}),
    )
    flips: list[str] = []

    def committed(path: Path, manifest: CheckpointManifest) -> None:
        if always or not flips:
            file = sorted((path / "optimizer").iterdir())[1]
            content = bytearray(file.read_bytes())
            content[-3] ^= 64
            file.write_bytes(bytes(content))
            flips.append(file.name)

    engine = recording.engine
    state = recording.writer.snapshot(
        engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
    )
    vars(recording.events)["committed"] = committed
    recording.writer.save("ckpt_001", state, save_facts(2, 0))
    ended = recording.end()
    counted = "ckpt_001" in recording.writer.verified
    return {
        "ended": ended,
        "logged": recording.events.lines,
        "verified": recording.events.whole,
        "damaged": recording.events.problems,
        "flips": len(flips),
        "counted": counted,
    }


def raising(error: Exception) -> Any:
    """A callback that does nothing but raise."""

    def callback(*_: Any) -> None:
        raise error

    return callback


def test_one_that_comes_back_damaged_is_written_again(pool: GlooPool, tmp_path: Path) -> None:
    first, second = pool.run(2, damaged_job, str(tmp_path), False)
    assert first["flips"] == 1 and len(first["logged"]) == 1 and second["logged"] == []
    assert "came back damaged" in first["logged"][0] and ": tensor " in first["logged"][0]
    assert first["verified"] == ["ckpt_001"] and first["damaged"] == []
    assert first["ended"] == second["ended"] == "" and first["counted"]
    verify_checkpoint(tmp_path / "ckpt_001")


@pytest.mark.parametrize("unrecorded", (False, True))
def test_one_that_stays_damaged_is_an_error_and_not_counted(
    pool: GlooPool, tmp_path: Path, unrecorded: bool
) -> None:
    """An error on every rank that names file and tensor, whether the ledger can record it or not.

    A run whose newest state is not on the disk has not finished.
    """
    first, second = pool.run(2, damaged_job, str(tmp_path), True, unrecorded)
    assert first["flips"] == 2 and first["verified"] == [] and not first["counted"]
    assert first["ended"] == second["ended"]
    assert first["ended"].startswith("SaveError: ckpt_001 came back damaged from the disk twice: ")
    assert "optimizer/shard-00002" in first["ended"] and ": tensor " in first["ended"]
    if unrecorded:
        assert (
            first["logged"][-1]
            == "ckpt_001 is damaged, but this could not be recorded: No space left on device"
        )
    else:
        assert len(first["damaged"]) == 1 and "optimizer/shard-00002" in first["damaged"][0]


def away_job(launch: Launch, directory: str) -> dict[str, Any]:
    """Save while rank 1 cannot read back what is written."""

    def away(*_: Any, **__: Any) -> None:
        raise UnavailableError("a shard: Stale file handle, for 2m00s", errno.ESTALE)

    real = read_back.verify_files
    if launch.rank == 1:
        read_back.verify_files = away  # type: ignore[assignment]
    try:
        recording = RecordingWriter(launch, directory)
        engine = recording.engine
        state = recording.writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        recording.writer.save("ckpt_001", state, save_facts(2, 0))
        ended = recording.end()
    finally:
        read_back.verify_files = real
    return {
        "ended": ended,
        "logged": recording.events.lines,
        "verified": recording.events.whole,
        "counted": "ckpt_001" in recording.writer.verified,
    }


def test_one_that_nobody_can_read_back_stays(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a good checkpoint withdrawn and written again because its server was away, one that
    counts as verified, and a run that ends over it.
    """
    first, second = pool.run(2, away_job, str(tmp_path))
    assert first["ended"] == second["ended"] == ""
    assert first["logged"] == [
        "ckpt_001 is saved, but not verified, since it could not be read: a shard: Stale file "
        "handle, for 2m00s"
    ]
    assert first["verified"] == [] and not first["counted"]
    verify_checkpoint(tmp_path / "ckpt_001")


def callback_job(
    launch: Launch, directory: str, which: str, error: Exception, fault: str
) -> dict[str, Any]:
    """A callback of rank 0 raises in a save; a second save shows that the ranks are in step."""
    recording = RecordingWriter(
        launch, directory, policy=SavePolicy(retry_seconds=60.0), **{which: raising(error)}
    )
    fault_injection.arm(fault, launch.rank)
    recording.save("ckpt_001")
    ended = recording.end()
    recording.save("ckpt_002")
    recording.end()
    return {"ended": ended, "logged": recording.events.lines}


@pytest.mark.parametrize(
    ("which", "fault"), (("verified", ""), ("message", "save.model@rank=1:error=ENOSPC"))
)
def test_a_callback_the_disk_refuses_ends_nothing(
    pool: GlooPool, tmp_path: Path, which: str, fault: str
) -> None:
    """The ledger's disk is full: the checkpoint is intact, and no rank waits for another."""
    error = OSError(28, "No space left on device")
    first, second = pool.run(2, callback_job, str(tmp_path), which, error, fault)
    assert first["ended"] == second["ended"] == "" and second["logged"] == []
    if which == "verified":
        assert (
            first["logged"][0]
            == "ckpt_001 is whole, but this could not be recorded: No space left on device"
        )
    for name in ("ckpt_001", "ckpt_002"):
        verify_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "error", (RunError("the ledger is another's"), KeyError("a mistake")), ids=("user", "bug")
)
def test_any_other_error_of_a_callback_is_every_ranks(
    pool: GlooPool, tmp_path: Path, error: Exception
) -> None:
    first, second = pool.run(2, callback_job, str(tmp_path), "verified", error, "")
    assert first["ended"] == second["ended"]
    words = (
        "RunError: the ledger is another's"
        if isinstance(error, RunError)
        else "SaveError: a checkpoint could not"
    )
    assert first["ended"].startswith(words)


def thinning_job(launch: Launch, directory: str, fault: str) -> dict[str, Any]:
    """Four saves; thinning begins with the third, and the fault is in it."""
    recording = RecordingWriter(launch, directory)
    recording.writer._retention.keep = 2
    fault_injection.arm(fault, launch.rank)
    found = []
    for number in range(1, 5):
        recording.save(f"ckpt_{number:03d}")
        recording.writer.wait()
        found.append(
            [
                path.name
                for path in list_checkpoints(Path(directory))
                if not (path / "optimizer").exists()
            ]
        )
    return {"ended": recording.end(), "logged": recording.events.lines, "thinned": found}


@pytest.mark.parametrize(
    "fault", ("retire.marked@rank=0:error=ENOSPC", "retire.done@rank=0:error=EACCES")
)
def test_trouble_while_thinning_is_told_and_tried_again(
    pool: GlooPool, tmp_path: Path, fault: str
) -> None:
    """A disk that is full is where thinning would help; a healthy run is not ended for it."""
    first, second = pool.run(2, thinning_job, str(tmp_path), fault)
    assert first["ended"] == second["ended"] == "" and second["logged"] == []
    (line,) = first["logged"]
    assert "is saved, but older checkpoints in" in line and "retried after the next save" in line
    assert first["thinned"][3] == ["ckpt_001", "ckpt_002"], "it was not tried again"
    for path in list_checkpoints(tmp_path):
        verify_checkpoint(path)


def order_job(launch: Launch, directory: str) -> dict[str, Any]:
    """The first save is slow on one rank; the second is asked for at once."""
    recording = RecordingWriter(launch, directory)
    fault_injection.arm("save.begin@rank=1:sleep=1", launch.rank)
    buffers = []
    for number in (1, 2, 3):
        recording.engine.optimizer.master.fill_(float(number))
        recording.save(f"ckpt_{number:03d}", step=number)
        buffers.append(
            {state: line.data_ptr() for state, line in recording.writer._buffers.buffers.items()}
        )
    ended = recording.end()
    return {
        "committed": recording.events.commits,
        "ended": ended,
        "kept": buffers[0] == buffers[1] == buffers[2],
    }


def test_a_second_save_never_overtakes_the_first(pool: GlooPool, tmp_path: Path) -> None:
    """Committed in order, each with the values of its own step, although all share one buffer."""
    first, second = pool.run(2, order_job, str(tmp_path))
    assert first["ended"] == second["ended"] == "" and first["kept"] and second["kept"]
    assert first["committed"] == [("ckpt_001", 1), ("ckpt_002", 2), ("ckpt_003", 3)]
    roots = set()
    for path in list_checkpoints(tmp_path):
        manifest = verify_checkpoint(path)
        assert (
            len((path / MANIFEST).read_text().splitlines()) == len(manifest.model_fields_set) + 2
        ), "a line for each key"
        roots.add(manifest.state.digests["norm.weight.master"])
        assert manifest.step == int(path.name[-3:])
        assert verify_root(path, manifest) == manifest.state.root, (
            "the state changed while it was written"
        )
    assert len(roots) == 3


def unrecorded_job(launch: Launch, directory: str) -> str:
    recording = RecordingWriter(launch, directory, policy=SavePolicy(retry_seconds=60.0))
    fault_injection.arm("save.committed@rank=0:error=ENOSPC", launch.rank)
    recording.save("ckpt_001")
    return recording.end()


def test_after_the_rename_nothing_is_tried_again(pool: GlooPool, tmp_path: Path) -> None:
    """It is there and whole; what failed is its record, and that is said."""
    first, second = pool.run(2, unrecorded_job, str(tmp_path))
    assert (
        first == second
        and first.startswith("SaveError: ckpt_001 is in ")
        and "could not be recorded" in first
    )
    verify_checkpoint(tmp_path / "ckpt_001")


def small_disk_job(launch: Launch, directory: str) -> dict[str, Any]:
    """The room check is told a lie, so that the disk fills up in the middle of a file."""
    recording = RecordingWriter(launch, directory, world=1, policy=SavePolicy(retry_seconds=0.3))
    kept, disk_space.free_bytes = disk_space.free_bytes, lambda path: 10**12
    try:
        recording.save("ckpt_001")
        return {
            "ended": recording.end(),
            "logged": recording.events.lines,
            "left": os.listdir(directory),
        }
    finally:
        disk_space.free_bytes = kept


def test_a_disk_that_is_really_full(pool: GlooPool, tmp_path: Path) -> None:
    """On a file system of 200 kB: refused midway with the system's message, no file left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        (answer,) = pool.run(1, small_disk_job, str(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left on device" in answer["ended"] and len(answer["logged"]) == 1
    assert answer["left"] == []


def free_snapshot_job(launch: Launch, directory: str) -> bool:
    recording = RecordingWriter(launch, directory, world=1)
    lines = recording.engine.optimizer.flat_shards
    copy = snapshot(recording.engine.gradients.shard_layout, lines, recording.engine.dtype)
    lines["master"].add_(1.0)
    return not torch.equal(copy.flat_shards["master"], lines["master"])


def test_a_snapshot_is_a_copy(pool: GlooPool, tmp_path: Path) -> None:
    assert pool.run(1, free_snapshot_job, str(tmp_path)) == [True]


def root_job(launch: Launch, directory: str, tensor: int) -> str:
    recording = RecordingWriter(launch, directory, world=tensor)
    recording.save("ckpt_001")
    assert recording.end() == ""
    root: str = read_manifest(Path(directory) / "ckpt_001").state.root
    return root


def test_the_root_does_not_depend_on_the_layout(pool: GlooPool, tmp_path: Path) -> None:
    """One process, two tensor-parallel or two data-parallel ranks: same state, same root."""
    roots = set()
    for number, (world, tensor) in enumerate(((1, 1), (2, 2), (2, 1))):
        (tmp_path / str(number)).mkdir()
        roots |= set(pool.run(world, root_job, str(tmp_path / str(number)), tensor))
    assert len(roots) == 1


def sums_job(launch: Launch, directory: str) -> bool:
    recording = RecordingWriter(launch, directory)
    engine = recording.engine
    for state, line in engine.optimizer.flat_shards.items():
        line.add_(0.01 * len(state))
    names = sorted(shapes_of(tiny_config(model__num_layers=2)))
    digest = StateDigest(
        engine.gradients.shard_layout, names, list(engine.optimizer.flat_shards), recording.grid.tp
    )
    expected = digest.sums(engine.optimizer.flat_shards)
    return all(
        torch.equal(host_digest_sums(digest, engine.optimizer.flat_shards, threads=n), expected)
        for n in (1, 4)
    )


def test_sums_of_the_host_are_those_of_torch(pool: GlooPool, tmp_path: Path) -> None:
    assert pool.run(2, sums_job, str(tmp_path)) == [True, True]
