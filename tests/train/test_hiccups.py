"""Hiccups: one error of the file system in a read of any file, and a run that goes on as if nothing
had been.

Calls of the operating system are made to fail inside the process. What a real file system answers,
and when, is in docs/faults.md.
"""

import errno
import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import compare_runs
import pytest

import k2train.train.__main__ as train_command
from k2train import retry
from k2train.checkpoint import manifest, reshard_read, side_files
from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.checkpoint.shards import THREADS
from k2train.errors import DataError, UnavailableError
from k2train.launch.environment import Launch
from k2train.record.events import Resumed, Stopped, of_kind
from k2train.record.ledger import read_ledger
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job

CHUNKS = 3


class Strike(NamedTuple):
    """On one rank, opens of paths that contain `part` fail with `code`: after `skip` of them.

    With `looks` these are questions whether the path exists, and listings of it, and `part` is its
    end.
    """

    part: str
    code: int
    times: int
    skip: int = 0
    rank: int = 0
    looks: bool = False


@contextmanager
def struck(strike: Strike, launch: Launch) -> Iterator[None]:
    """Let opens, or looks at files and folders, fail in this process."""
    if launch.rank != strike.rank:
        yield
        return
    seen = [0]
    real = (os.open, io.open, retry.PATIENCE_SECONDS, retry.FIRST_PAUSE_SECONDS)
    asked = os.stat, os.lstat, os.listdir, os.scandir

    def fail(path: Any, looks: bool = False) -> None:
        struck = str(path).endswith(strike.part) if looks else strike.part in str(path)
        if struck and looks == strike.looks:
            seen[0] += 1
            if strike.skip < seen[0] <= strike.skip + strike.times:
                raise OSError(strike.code, os.strerror(strike.code), str(path))

    def os_open(path: Any, *rest: Any, **more: Any) -> int:
        fail(path)
        return real[0](path, *rest, **more)

    def io_open(path: Any, *rest: Any, **more: Any) -> Any:
        fail(path)
        return real[1](path, *rest, **more)

    def looking(real: Any) -> Any:
        def look(path: Any = ".", *rest: Any, **more: Any) -> Any:
            fail(path, looks=True)
            return real(path, *rest, **more)

        return look

    os.open, io.open = os_open, io_open  # type: ignore[assignment]
    os.stat, os.lstat, os.listdir, os.scandir = map(looking, asked)
    retry.PATIENCE_SECONDS = 30.0 if strike.times == 1 else 0.2
    retry.FIRST_PAUSE_SECONDS = 0.01
    try:
        yield
    finally:
        (os.open, io.open, retry.PATIENCE_SECONDS, retry.FIRST_PAUSE_SECONDS) = real  # type: ignore[assignment]
        os.stat, os.lstat, os.listdir, os.scandir = asked
    assert seen[0] > strike.skip, f"nothing opened, or looked at, a path with {strike.part}"


def struck_job(launch: Launch, tree: dict[str, Any], strike: Strike) -> int | str:
    """A run in which one rank's file system fails; UnavailableError as `main` shows it."""
    try:
        with struck(strike, launch):
            return trainer_job(launch, tree)
    except UnavailableError as error:
        return f"unavailable: {error}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """Data, a run to its end, and one that stopped after the second chunk."""
    folder = tmp_path_factory.mktemp("hiccups")
    make_corpus(folder / "data", CHUNKS)
    assert pool.run(1, trainer_job, tree(folder, "whole")) == [0]
    assert pool.run(1, trainer_job, tree(folder, "half", run__stop_after_steps=10)) == [75]
    return folder


def tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


WHERE = {
    "data manifest": "data/manifest.json",
    "next chunk": "chunk_002.npy",
    "ledger": "ledger.jsonl",
    "newest checkpoint's manifest": "ckpt_002/manifest.json",
    "weights": "ckpt_002/model/",
    "moments": "ckpt_002/optimizer/",
}


READ_ONCE = ("data manifest", "ledger")


@pytest.mark.parametrize(
    ("where", "skip"),
    [(where, skip) for where in WHERE for skip in range(1 if where in READ_ONCE else 3)],
)
def test_one_error_costs_nothing(base: Path, pool: GlooPool, where: str, skip: int) -> None:
    """Catches an error that passes and ends the run, or that sends it back by a checkpoint: at the
    first, second and third time that a file is opened.
    """
    name, part = f"passing-{[*WHERE].index(where)}-{skip}", WHERE[where]
    run = base / "runs" / name
    shutil.copytree(base / "runs" / "half", run)
    # Several checks open a chunk, for its header, its hash and its rows.
    code, skip = [errno.ESTALE, errno.EIO][skip % 2], 3 * skip if ".npy" in part else skip
    strike = Strike(part, code, 1, skip)
    assert pool.run(1, struck_job, tree(base, name), strike) == [0]
    (resumed,) = of_kind(read_ledger(run / "ledger.jsonl"), Resumed)
    assert (resumed.checkpoint, resumed.refused, resumed.set_aside) == ("ckpt_002", (), ())
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []
    shutil.rmtree(run)


@pytest.mark.parametrize("part", WHERE.values(), ids=WHERE)
def test_one_that_stays_ends_with_1_and_touches_nothing(
    base: Path, pool: GlooPool, part: str
) -> None:
    """Catches an end that no launcher starts again, a checkpoint set aside because nobody could
    read it, and ranks that wait for the one that ended. The run then goes on as if nothing were.
    """
    name = f"stays-{[*WHERE.values()].index(part)}"
    run = base / "runs" / name
    shutil.copytree(base / "runs" / "half", run)
    # What every rank reads by itself ends a start alone, and the launcher ends the others. Here
    # rank 1 fails in what the ranks do together. It has looked at the chunk's header before.
    world = 2 if part.startswith(("ckpt", "chunk")) and "manifest" not in part else 1
    skip = 2 if part.startswith("chunk") else 0
    # Rank 0 hashes the weights, rank 1 the moments.
    rank = 0 if "model" in part else world - 1
    strike = Strike(part, errno.ESTALE, 10**9, skip, rank)
    found = pool.run(world, struck_job, tree(base, name), strike)
    for text in found:
        assert text.startswith("unavailable: ") and "Stale file handle" in text, found
        assert part.split("/")[0] in text
    assert [path.name for path in list_checkpoints(run / "checkpoints")][:3] == [
        "ckpt_000",
        "ckpt_001",
        "ckpt_002",
    ]
    if part.startswith("chunk"):
        (*_, stopped) = of_kind(read_ledger(run / "ledger.jsonl"), Stopped)
        assert stopped.reason == "unavailable"
    assert pool.run(1, trainer_job, tree(base, name)) == [0]
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []


LOOKS = {
    "ledger": ("/ledger.jsonl", 3),
    "metrics": ("/metrics.jsonl", 2),
    "folder of checkpoints": ("/checkpoints", 4),
    "newest checkpoint": ("/ckpt_002", 4),
    "mark of a thinned one": ("/ckpt_002/thinned.json", 2),
    "folder of its weights": ("/ckpt_002/model", 2),
    "chunk": ("/chunk_002.npy", 1),
    "folder of data": ("/data", 1),
    "request to stop": ("/STOP", 1),
}
"""End of a path, and how many looks at it, at least, may each be the one that fails."""


@pytest.mark.parametrize(
    ("what", "skip"), [(what, skip) for what, (_, looks) in LOOKS.items() for skip in range(looks)]
)
def test_one_look_that_fails_costs_nothing(
    base: Path, pool: GlooPool, what: str, skip: int
) -> None:
    """Catches a ledger or checkpoint that "is not there" because its server was away: the run would
    begin anew, or go back.
    """
    name = f"looked-{[*LOOKS].index(what)}-{skip}"
    run = base / "runs" / name
    shutil.copytree(base / "runs" / "half", run)
    part = LOOKS[what][0]
    strike = Strike(part, [errno.ESTALE, errno.EIO][skip % 2], 1, skip, looks=True)
    settings = tree(base, name)
    if part == "/data":
        # The manifest of a folder is the one in it.
        settings["data"] |= {"manifest": str(base / "data")}
    assert pool.run(1, struck_job, settings, strike) == [0]
    (resumed,) = of_kind(read_ledger(run / "ledger.jsonl"), Resumed)
    assert (resumed.checkpoint, resumed.refused, resumed.set_aside) == ("ckpt_002", (), ())
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []
    shutil.rmtree(run)


@pytest.mark.parametrize("what", LOOKS)
def test_a_look_that_always_fails_ends_with_1(base: Path, pool: GlooPool, what: str) -> None:
    """Catches a new run in the directory of an old one, and a mistake (2) that nobody made."""
    name = f"never-seen-{[*LOOKS].index(what)}"
    run = base / "runs" / name
    shutil.copytree(base / "runs" / "half", run)
    before = (run / "ledger.jsonl").read_bytes()
    settings = tree(base, name)
    part = LOOKS[what][0]
    if part == "/data":
        settings["data"] |= {"manifest": str(base / "data")}
    (text,) = pool.run(1, struck_job, settings, Strike(part, errno.ESTALE, 10**9, looks=True))
    assert text.startswith("unavailable: ") and part[1:] in text
    assert "Stale file handle" in text
    assert (run / "ledger.jsonl").read_bytes() == before
    assert len(list_checkpoints(run / "checkpoints")) == 3
    shutil.rmtree(run)


@pytest.mark.parametrize("part", ["ckpt_002/manifest.json", "ckpt_002/optimizer/"])
def test_a_bad_block_is_damage(base: Path, pool: GlooPool, part: str) -> None:
    """Catches a run that never starts again because one file of its newest checkpoint lies on a bad
    sector, which the system calls EIO like a server that is away.
    """
    name = f"bad-block-{len(part)}"
    run = base / "runs" / name
    shutil.copytree(base / "runs" / "half", run)
    few = tree(base, name, run__stop_after_steps=2)
    assert pool.run(1, struck_job, few, Strike(part, errno.EIO, 10**9)) == [75]
    (resumed,) = of_kind(read_ledger(run / "ledger.jsonl"), Resumed)
    assert (resumed.checkpoint, resumed.set_aside) == ("ckpt_001", ("ckpt_002",))
    assert len(resumed.refused) == 1 and "Input/output error" in resumed.refused[0]
    assert pool.run(1, trainer_job, tree(base, name)) == [0]
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []


def test_a_server_that_is_away_is_no_bad_block(base: Path, pool: GlooPool) -> None:
    """Catches good checkpoints set aside because all of them answer with EIO."""
    run = base / "runs" / "away"
    shutil.copytree(base / "runs" / "half", run)
    strike = Strike("away/checkpoints/", errno.EIO, 10**9)
    (text,) = pool.run(1, struck_job, tree(base, "away"), strike)
    assert text.startswith("unavailable: ") and "Input/output error" in text
    assert len(list_checkpoints(run / "checkpoints")) == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UnavailableError("the disk: stale"), 1, "k2train: the disk: stale"),
        (OSError(errno.EIO, "bad sector", "runs/r"), 1, "k2train: runs/r: bad sector"),
        (DataError("the data: not there"), 2, "k2train: the data: not there"),
    ],
)
def test_exit_codes(
    error: Exception,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an error of the environment that ends with 2, which no launcher starts again."""

    def raising(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train_command, "load_config", raising)
    assert train_command.main(["c.yaml"]) == code
    assert capsys.readouterr().err.splitlines() == [said]


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "k2train/lost.py")

    monkeypatch.setattr(train_command, "load_config", raising)
    with pytest.raises(FileNotFoundError):
        train_command.main(["c.yaml"])


def slowly_job(launch: Launch, tree: dict[str, Any]) -> int | str:
    """A start whose disk is slow: each tensor is read in 0.8 s."""
    real = reshard_read._execute

    def execute(*given: Any) -> None:
        time.sleep(0.8)
        real(*given)

    reshard_read._execute = execute
    try:
        return trainer_job(launch, tree)
    finally:
        reshard_read._execute = real


@pytest.mark.slow
def test_a_start_that_gets_on_is_not_stuck(base: Path, pool: GlooPool) -> None:
    """Catches loading that the watchdog ends although every second brings more."""
    shutil.copytree(base / "runs" / "half", base / "runs" / "slow")
    changed = tree(base, "slow", watch__start_seconds=6.0, run__stop_after_steps=1)
    tensors = len(read_manifest(base / "runs/half/checkpoints/ckpt_002").tensors["optimizer"])
    assert 0.8 * tensors / THREADS > 2 * 6.0, "the load takes longer than its limit"
    assert pool.run(1, slowly_job, changed) == [75]


def opened_job(launch: Launch, tree: dict[str, Any], part: str) -> dict[str, int]:
    """How often a run opens each JSON file whose path contains `part`."""
    found: Counter[str] = Counter()
    real, settled = os.open, manifest.SETTLED_SECONDS

    def noting(path: Any, *rest: Any, **more: Any) -> int:
        if part in str(path) and str(path).endswith(".json"):
            found[Path(path).name] += 1
        return real(path, *rest, **more)

    # The copied run is new, and too young to be known by its times.
    manifest.SETTLED_SECONDS = -60.0
    manifest._known_manifests = manifest._KnownManifests()
    side_files._known_side_files = side_files._KnownSideFiles()
    os.open = noting  # type: ignore[assignment]
    try:
        assert trainer_job(launch, tree) == 75
    finally:
        os.open, manifest.SETTLED_SECONDS = real, settled
    return dict(found)


def test_a_start_reads_a_manifest_once(base: Path, pool: GlooPool) -> None:
    """Catches one more reader: a start looks at the manifest it takes in ten places. The save that
    follows reads the weights of that checkpoint, and for this the files from the disk.
    """
    shutil.copytree(base / "runs" / "half", base / "runs" / "once")
    changed = tree(base, "once", run__stop_after_steps=1)
    (found,) = pool.run(1, opened_job, changed, "once/checkpoints/ckpt_002/")
    name = "shard-00001-model-00001-of-00001.json"
    assert found == {"manifest.json": 2, f"optimizer-{name}": 1, f"model-{name}": 2}
