"""Retention and scrubbing: two verified complete checkpoints remain at every moment."""

import errno
import os
import random
import shutil
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from k2train import fault_injection
from k2train.checkpoint import retention as module
from k2train.checkpoint import scrub as scrub_module
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    checkpoint_name,
    is_thinned,
    list_checkpoints,
    mark_thinned,
    read_manifest,
)
from k2train.checkpoint.retention import (
    KEEP,
    Retention,
    VerifiedCheckpoints,
    is_on_demand,
    remove_unfinished,
    set_aside_later,
)
from k2train.checkpoint.save_events import SaveEvents
from k2train.checkpoint.scrub import Scrubber
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, RunError, UnavailableError
from tests.checkpoint.test_shards import make_checkpoint, write_manifest
from tests.support.command_line import HANG_SECONDS
from tests.support.lanes import lanes
from tests.support.tiny_corpus import manifest_of


def complete(directory: Path) -> list[Path]:
    """Those that are whole on the disk and have their states, wherever they lie in the run."""
    found = []
    for path in [*list_checkpoints(directory), *directory.glob("set_aside_*/ckpt_*")]:
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        if not is_thinned(path):
            found.append(path)
    return found


@pytest.mark.parametrize(*lanes("seed", range(2), lambda seed: seed == 0))
def test_two_remain_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Counts the verified, intact checkpoints at every fault point of random saves and rollbacks.

    Saves are numbered or on demand; some were never read back, and do not count: they may be
    damaged. All are read to count them.
    """
    template = tmp_path / "made"
    make_checkpoint(template / "ckpt_000")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    rng, verified = random.Random(seed), VerifiedCheckpoints()
    retention = Retention(directory, 2, verified)
    seen = set()
    floor = 0

    def counted() -> list[str]:
        return [p.name for p in complete(directory) if p.name in verified or p.parent != directory]

    def look(name: str = "") -> None:
        seen.add(name)
        assert len(counted()) >= floor, f"{name}: {counted()}"

    monkeypatch.setattr(fault_injection, "point", look)
    consumed, attempt = 0, 1
    numbered: set[str] = set()
    for step in range(1, 41):
        consumed += rng.random() < 0.6
        name = checkpoint_name(consumed, step if checkpoint_name(consumed) in numbered else None)
        copy_as(template / "ckpt_000", directory / name)
        numbered |= set() if is_on_demand(directory / name) else {name}
        verified.forget(name)
        if rng.random() < 0.8:
            verified.add(name)
        floor = min(2, len(counted()))
        retention.retire()
        look("retired")
        if rng.random() < 0.15:
            paths = [path for path in list_checkpoints(directory) if not is_thinned(path)]
            back = rng.choice(paths)
            set_aside_later(back, attempt)
            attempt += 1
            look("set aside")
            consumed = int(back.name[5:8])
            numbered = {path.name for path in list_checkpoints(directory)}
    kept = {path.name for path in list_checkpoints(directory)}
    kept |= {path.name for path in directory.glob("set_aside_*/*")}
    assert {name for name in numbered if "step" not in name} <= kept, (
        "weights of a numbered checkpoint went"
    )
    assert {"retire.expire", "retire.marked", "retire.done", "start.aside"} <= seen, (
        "a path was not taken"
    )


def copy_as(source: Path, target: Path) -> None:
    """The checkpoint under another name, with a manifest of that name."""
    shutil.copytree(source, target)
    manifest = manifest_of(source)
    write_manifest(target, manifest | {"name": target.name})


def several(directory: Path, names: list[str]) -> None:
    make_checkpoint(directory.parent / "made" / "ckpt_000")
    directory.mkdir()
    for name in names:
        copy_as(directory.parent / "made" / "ckpt_000", directory / name)


def states_of(directory: Path) -> dict[str, bool]:
    return {path.name: not is_thinned(path) for path in list_checkpoints(directory)}


def test_only_verified_ones_make_another_go(tmp_path: Path) -> None:
    """Five numbered, two to keep: nothing is thinned until two newer ones were read back."""
    names = [f"ckpt_{n:03d}" for n in range(5)]
    several(tmp_path / "checkpoints", names)
    verified = VerifiedCheckpoints()
    retention = Retention(tmp_path / "checkpoints", 2, verified)
    retention.retire()
    assert all(states_of(tmp_path / "checkpoints").values())
    verified.add("ckpt_004")
    retention.retire()
    assert all(states_of(tmp_path / "checkpoints").values())
    verified.add("ckpt_002")
    retention.retire()
    left = {
        "ckpt_000": False,
        "ckpt_001": False,
        "ckpt_002": True,
        "ckpt_003": True,
        "ckpt_004": True,
    }
    assert states_of(tmp_path / "checkpoints") == left
    verified.add("ckpt_003")
    verified.mark_damaged("ckpt_004")
    retention.retire()
    assert states_of(tmp_path / "checkpoints") == left, "a damaged one was counted"


def test_a_save_on_demand_stays_until_two_newer_ones(tmp_path: Path) -> None:
    several(tmp_path / "checkpoints", ["ckpt_001", "ckpt_001_step_000007", "ckpt_002", "ckpt_003"])
    verified = VerifiedCheckpoints()
    retention = Retention(tmp_path / "checkpoints", 0, verified)
    verified.add("ckpt_002")
    retention.retire()
    assert len(states_of(tmp_path / "checkpoints")) == 4
    verified.add("ckpt_003")
    retention.retire()
    assert list(states_of(tmp_path / "checkpoints")) == ["ckpt_001", "ckpt_002", "ckpt_003"]


class Gone(SaveEvents):
    """Notes what was removed."""

    def __init__(self) -> None:
        self.gone: dict[str, str] = {}

    def removed(self, path: Path, why: str) -> None:
        assert not path.exists()
        self.gone[path.name] = why


def all_verified(directory: Path) -> VerifiedCheckpoints:
    verified = VerifiedCheckpoints()
    for path in list_checkpoints(directory):
        verified.add(path.name)
    return verified


def test_what_was_asked_for_stays(tmp_path: Path) -> None:
    """Catches a save that a person asked for and finds gone, states of it that are thinned, and
    one that goes without a word.
    """
    names = ["ckpt_000", "ckpt_000_step_000003", "ckpt_000_step_000004", "ckpt_001"]
    names += ["ckpt_001_step_000007", "ckpt_002", "ckpt_003"]
    directory = tmp_path / "checkpoints"
    several(directory, names)
    for name in ("ckpt_000", "ckpt_000_step_000003", "ckpt_001_step_000007"):
        (directory / name / KEEP).touch()
    verified, told = all_verified(directory), Gone()
    Retention(directory, 2, verified, events=told).retire()
    assert told.gone == {"ckpt_000_step_000004": "2 newer ones are verified"}
    left = {
        "ckpt_000": True,
        "ckpt_000_step_000003": True,
        "ckpt_001": False,
        "ckpt_001_step_000007": True,
        "ckpt_002": True,
        "ckpt_003": True,
    }
    assert states_of(directory) == left
    verify_checkpoint(directory / "ckpt_001_step_000007")

    Retention(directory, 2, verified, keep_asked=1, events=told).retire()
    assert set(told.gone) == {"ckpt_000_step_000004", "ckpt_000_step_000003"}
    assert "of those that were asked for the newest 1 are kept" in told.gone["ckpt_000_step_000003"]
    assert states_of(directory)["ckpt_000"] is False

    # Without the file it is one like the others.
    (directory / "ckpt_001_step_000007" / KEEP).unlink()
    Retention(directory, 2, verified, events=told).retire()
    assert "ckpt_001_step_000007" in told.gone


@pytest.mark.parametrize(("keep", "left"), ((None, 3), (0, 0), (2, 2), (9, 3)))
def test_how_many_that_were_asked_for(tmp_path: Path, keep: int | None, left: int) -> None:
    """Catches a count that keeps one more or less, the oldest, or none at all."""
    asked = [f"ckpt_000_step_00000{n}" for n in (1, 2, 3)]
    directory = tmp_path / "checkpoints"
    several(directory, [*asked, "ckpt_001", "ckpt_002"])
    for name in asked:
        (directory / name / KEEP).touch()
    Retention(directory, 0, all_verified(directory), keep).retire()
    assert list(states_of(directory)) == [*asked[3 - left :], "ckpt_001", "ckpt_002"]


def test_a_kill_in_the_middle_of_thinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the marker or between the files: it counts as thinned.

    The next run of the policy removes the rest.
    """
    several(tmp_path / "checkpoints", ["ckpt_001", "ckpt_002", "ckpt_003"])
    verified = VerifiedCheckpoints()
    for name in ("ckpt_002", "ckpt_003"):
        verified.add(name)

    def killed(name: str) -> None:
        if name == "retire.marked":
            raise KeyboardInterrupt

    monkeypatch.setattr(fault_injection, "point", killed)
    with pytest.raises(KeyboardInterrupt):
        Retention(tmp_path / "checkpoints", 2, verified).retire()
    path = tmp_path / "checkpoints" / "ckpt_001"
    next(iter((path / "optimizer").iterdir())).unlink()
    assert is_thinned(path)
    verify_checkpoint(path)
    monkeypatch.undo()
    Retention(tmp_path / "checkpoints", 2, VerifiedCheckpoints()).retire()
    assert not (path / "optimizer").exists()


def test_rolling_back_moves_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between leaves a history without a gap; nothing is deleted."""
    names = [f"ckpt_{n:03d}" for n in range(5)]
    directory = tmp_path / "checkpoints"
    several(directory, names)
    moments = []
    monkeypatch.setattr(
        module.fault_injection,
        "point",
        lambda name: moments.append([p.name for p in list_checkpoints(directory)]),
    )
    assert set_aside_later(directory / "ckpt_001", 3) == names[2:]
    assert moments == [names, names[:4], names[:3]]
    assert sorted(p.name for p in (directory / "set_aside_by_attempt_3").iterdir()) == names[2:]


def test_unfinished_ones_are_removed_under_any_token(tmp_path: Path) -> None:
    for name in ("ckpt_001.tmp", "ckpt_002.12.tmp", "ckpt_002"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert remove_unfinished(tmp_path) == ["ckpt_001.tmp", "ckpt_002.12.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_002"]


class Told(SaveEvents):
    """Events whose methods are those that are given."""

    def __init__(self, **methods: Any):
        vars(self).update(methods)


def test_the_audit_takes_the_one_checked_longest_ago(tmp_path: Path) -> None:
    """Never checked ones come first.

    A damaged one is reported once, with file and tensor, and no longer counts.
    """
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001", "ckpt_002", "ckpt_003"])
    mark_thinned(directory / "ckpt_001", read_manifest(directory / "ckpt_001"))
    verified, reported = VerifiedCheckpoints(), []
    for name in ("ckpt_003", "ckpt_001"):
        verified.add(name)
    scrubber = Scrubber(
        directory,
        3600.0,
        verified,
        Told(damaged=lambda path, problem: reported.append((path.name, problem))),
    )
    assert [scrubber.check_next().name for _ in range(4)] == [
        "ckpt_002",
        "ckpt_003",
        "ckpt_001",
        "ckpt_002",
    ]  # type: ignore[union-attr]
    assert not reported and "ckpt_002" in verified
    file = sorted((directory / "ckpt_003" / "model").iterdir())[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert [scrubber.check_next().name for _ in range(4)] == [
        "ckpt_003",
        "ckpt_001",
        "ckpt_002",
        "ckpt_001",
    ]  # type: ignore[union-attr]
    assert [name for name, _ in reported] == ["ckpt_003"] and "tensor norm.weight" in reported[0][1]
    assert "ckpt_003" not in verified


def test_the_audit_runs_by_itself(tmp_path: Path) -> None:
    """In its thread, every period, until it is closed."""
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001"])
    (directory / "ckpt_001" / "model" / "x").write_text("stray")
    found = Event()
    scrubber = Scrubber(
        directory, 0.01, VerifiedCheckpoints(), Told(damaged=lambda path, problem: found.set())
    )
    scrubber.start()
    assert found.wait(HANG_SECONDS)
    scrubber.close()
    scrubber._thread.join(HANG_SECONDS)  # type: ignore[union-attr]
    assert not scrubber._thread.is_alive()  # type: ignore[union-attr]


def test_one_that_cannot_be_marked_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space for the marker of the oldest: it stays complete, and the next is thinned.

    The oldest is thinned later.
    """
    directory = tmp_path / "checkpoints"
    several(directory, [f"ckpt_{n:03d}" for n in range(1, 5)])
    verified = VerifiedCheckpoints()
    for name in ("ckpt_003", "ckpt_004"):
        verified.add(name)

    def full(path: Path, manifest: CheckpointManifest) -> None:
        if path.name == "ckpt_001":
            raise OSError(28, "No space left on device")
        mark_thinned(path, manifest)

    monkeypatch.setattr(module, "mark_thinned", full)
    with pytest.raises(OSError, match="No space left"):
        Retention(directory, 2, verified).retire()
    assert states_of(directory) == {
        "ckpt_001": True,
        "ckpt_002": False,
        "ckpt_003": True,
        "ckpt_004": True,
    }
    assert (directory / "ckpt_001" / "optimizer").exists(), "removed without its marker"
    verify_checkpoint(directory / "ckpt_001")
    monkeypatch.undo()
    Retention(directory, 2, verified).retire()
    assert states_of(directory) == {
        "ckpt_001": False,
        "ckpt_002": False,
        "ckpt_003": True,
        "ckpt_004": True,
    }


def test_one_that_cannot_be_removed_whole_no_longer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its files stays (a stale handle): no error, because it has lost its name.

    The next start removes it.
    """
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001_step_000007", "ckpt_002", "ckpt_003"])
    verified = VerifiedCheckpoints()
    for name in ("ckpt_002", "ckpt_003"):
        verified.add(name)
    remove = os.unlink
    monkeypatch.setattr(
        os,
        "unlink",
        lambda name, **given: stale() if name == "manifest.json" else remove(name, **given),
    )
    Retention(directory, 0, verified).retire()
    assert list(states_of(directory)) == ["ckpt_002", "ckpt_003"]
    monkeypatch.undo()
    assert remove_unfinished(directory) == ["ckpt_001_step_000007.tmp"]


def stale() -> None:
    raise OSError(116, "Stale file handle")


@pytest.mark.parametrize("where", ("damaged", "listing", "log"))
def test_an_error_does_not_end_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Later rounds run although the ledger, the listing or the log fails for a while."""
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001", "ckpt_002"])
    for name in ("ckpt_001", "ckpt_002"):
        (directory / name / "model" / "x").write_text("stray")
    found, both, lines, listed = [], Event(), [], []

    def damaged(path: Path, problem: str) -> None:
        found.append(path.name)
        if len(found) == 2:
            both.set()
        if where == "damaged":
            raise RunError("the ledger is another's")

    def listing(path: Path) -> list[Path]:
        listed.append(path)
        if where != "damaged" and len(listed) <= 3:
            raise OSError(5, "Input/output error")
        return list_checkpoints(path)

    def reported(text: str) -> None:
        lines.append(text)
        if where == "log":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(scrub_module, "list_checkpoints", listing)
    scrubber = Scrubber(
        directory, 0.01, VerifiedCheckpoints(), Told(damaged=damaged, message=reported)
    )
    scrubber.start()
    try:
        assert both.wait(HANG_SECONDS), "the thread is gone"
        while where == "damaged" and len(lines) < 2:
            time.sleep(0.01)
    finally:
        scrubber.close()
    if where == "damaged":
        assert len(lines) == 2 and all(
            "is not in the manifest" in line and "ledger" in line for line in lines
        )
    else:
        assert len(lines) == 1 and "Input/output error" in lines[0], (
            "logged once, not at every round"
        )


def test_the_audit_and_one_that_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expired while it is read: no damage. One that cannot be read and is still there: damage."""
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001", "ckpt_002"])
    reported: list[str] = []
    scrubber = Scrubber(
        directory,
        3600.0,
        VerifiedCheckpoints(),
        Told(damaged=lambda path, problem: reported.append(f"{path.name} {problem}")),
    )

    def reading(path: Path, threads: int) -> None:
        if path.name == "ckpt_001":
            shutil.rmtree(path)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(scrub_module, "verify_checkpoint", reading)
    assert [scrubber.check_next(), scrubber.check_next(), scrubber.check_next()] == [
        directory / "ckpt_001",
        directory / "ckpt_002",
        None,
    ]
    assert len(reported) == 1 and reported[0].startswith("ckpt_002")


def test_what_a_kill_left_half_named_goes_at_the_next_start(tmp_path: Path) -> None:
    """A directory that was never finished, and a marker that never got its name; nothing else."""
    whole = tmp_path / "ckpt_001"
    (tmp_path / "ckpt_002.7.tmp" / "model").mkdir(parents=True)
    whole.mkdir()
    for name in ("manifest.json", "thinned.json.tmp"):
        (whole / name).write_text("{}")
    assert remove_unfinished(tmp_path) == ["ckpt_002.7.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_001"]
    assert [path.name for path in whole.iterdir()] == ["manifest.json"]


def test_foreign_names_stay_and_stop_no_start(tmp_path: Path) -> None:
    """Catches a note of somebody, or a link, over which no run ever starts again."""
    (tmp_path / "ckpt_note.tmp").write_text("do not touch")
    (tmp_path / "ckpt_link.tmp").symlink_to(tmp_path)
    (tmp_path / "ckpt_gone.tmp").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ckpt_001" / "x.tmp").mkdir(parents=True)
    (tmp_path / "ckpt_001" / "y.tmp").symlink_to(tmp_path / "ckpt_note.tmp")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("**/*"))
    (tmp_path / "ckpt_002.tmp").mkdir()
    assert remove_unfinished(tmp_path) == ["ckpt_002.tmp"]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.glob("**/*")) == before


def test_the_scrub_of_one_that_nobody_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint called damaged because its server was away, one that keeps the others
    from their turn, and a bad block that is never told.
    """
    directory = tmp_path / "checkpoints"
    several(directory, ["ckpt_001", "ckpt_002"])
    reported: list[str] = []
    told = Told(damaged=lambda path, problem: reported.append(f"{path.name} {problem}"))
    scrubber = Scrubber(directory, 3600.0, VerifiedCheckpoints(), told)
    number = errno.ESTALE

    def reading(path: Path, threads: int) -> None:
        if path.name == "ckpt_001":
            raise UnavailableError("a shard: away", number)

    monkeypatch.setattr(scrub_module, "verify_checkpoint", reading)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            scrubber.check_next()
        assert scrubber.check_next() == directory / "ckpt_002"
    assert reported == [] and not scrubber.verified.is_damaged("ckpt_001")

    number = errno.EIO
    assert {scrubber.check_next(), scrubber.check_next()} == {
        directory / "ckpt_001",
        directory / "ckpt_002",
    }
    assert reported == ["ckpt_001 a shard: away"] and scrubber.verified.is_damaged("ckpt_001")


def test_side_files_stay_as_long_as_what_they_describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches states that could not be removed, and that then nothing knows any more."""
    several(tmp_path / "checkpoints", ["ckpt_001", "ckpt_002", "ckpt_003"])
    verified = VerifiedCheckpoints()
    for name in ("ckpt_002", "ckpt_003"):
        verified.add(name)
    path = tmp_path / "checkpoints" / "ckpt_001"
    facts = sorted(path.glob("facts/*optimizer*"))
    assert facts

    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
    Retention(tmp_path / "checkpoints", 2, verified).retire()
    assert is_thinned(path) and sorted(path.glob("facts/*optimizer*")) == facts
    monkeypatch.undo()
    Retention(tmp_path / "checkpoints", 2, verified).retire()
    assert not (path / "optimizer").exists() and not list(path.glob("facts/*optimizer*"))
