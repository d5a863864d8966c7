"""Loading checkpoints: low memory, nothing loaded that was not saved, and earlier formats."""

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from k2train.checkpoint import load as load_module
from k2train.checkpoint import reshard_read
from k2train.checkpoint.load import ChosenCheckpoint, agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    THINNED,
    mark_thinned,
    read_manifest,
    seal,
)
from k2train.checkpoint.piece_check import ShardReader
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.shards import THREADS
from k2train.checkpoint.side_files import side_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.checkpoint.writer import CheckpointWriter, snapshot
from k2train.errors import CheckpointError, UnavailableError
from k2train.launch.environment import Launch
from k2train.state_digest import state_root
from tests.support.command_line import HANG_SECONDS, soon
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import ROOT, environment, make_corpus, manifest_of, trainer_job
from tests.support.tiny_model import engine_of, grid_of, save_facts, shapes_of, tiny_config

sys.path.insert(0, str(ROOT / "tools"))
import verify_checkpoint as verify_tool

GOLDEN = ROOT / "tests" / "golden"


def config_of(tensor: int, precision: str = "fp32") -> Any:
    return tiny_config(model__num_layers=2, parallel__tensor=tensor, precision=precision)


def save_job(
    launch: Launch, directory: str, tensor: int, precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    config = config_of(tensor, precision)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for state, line in engine.optimizer.flat_shards.items():
        line.add_(0.1 * len(state))
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    writer.save("ckpt_001", state, save_facts(2, 0))
    return {
        slot.param_slice.name: engine.optimizer.view("master", slot).clone()
        for slot in engine.gradients.shard_layout.slots
    }


@pytest.fixture(scope="module")
def saved(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by two tensor-parallel ranks."""
    directory = tmp_path_factory.mktemp("saved")
    pool.run(2, save_job, str(directory), 2)
    return directory / "ckpt_001"


def load_job(launch: Launch, path: str, tensor: int, precision: str = "fp32") -> Any:
    """The master weights after loading, or what was refused."""
    config = config_of(tensor, precision)
    grid = grid_of(launch, config)
    agreed = agree_on_checkpoint([Path(path)], grid)
    if agreed.taken is None:
        return str(agreed)
    engine = engine_of(config, grid, fill=False)
    try:
        load_states(
            agreed.taken,
            engine.gradients.shard_layout,
            engine.optimizer.flat_shards,
            grid,
            engine.dtype,
        )
    except CheckpointError as error:
        return str(error)
    return {
        slot.param_slice.name: engine.optimizer.view("master", slot).clone()
        for slot in engine.gradients.shard_layout.slots
    }


def change(path: Path, to: Path, changed: dict[str, Any]) -> Path:
    """A copy whose manifest says something else, sealed again."""
    shutil.copytree(path, to)
    manifest = {
        key: value for key, value in (manifest_of(path) | changed).items() if key != "self_sha256"
    }
    (to / MANIFEST).write_text(json.dumps(seal(manifest)))
    return to


def test_another_state_than_was_saved_is_refused(
    pool: GlooPool, saved: Path, tmp_path: Path
) -> None:
    """Files, names and shapes fit, one digest differs: all ranks refuse and name the tensor.

    On another layout than the saved one, where no hash of a piece proves its place.
    """
    state = manifest_of(saved)["state"]
    name = "layers.1.mlp.up.weight.exp_avg"
    state["digests"][name] = "0" * 32
    state["root"] = state_root(state["digests"], 2, 0)
    path = change(saved, tmp_path / "ckpt_001", {"state": state})
    verify_checkpoint(path)
    answers = pool.run(2, load_job, str(path), 1)
    assert answers[0] == answers[1] and f"{name} as loaded is not what was saved" in answers[0]
    assert verify_tool.main(["--root", str(path)]) == 2


def test_a_tensor_that_is_not_all_there_is_refused(
    pool: GlooPool, saved: Path, tmp_path: Path
) -> None:
    """Catches a shard removed together with its manifest entry, so that every hash still fits."""
    manifest = manifest_of(saved)
    gone = "optimizer/shard-00002-model-00001-of-00001.safetensors"
    parts = {"files": {n: f for n, f in manifest["files"].items() if n != gone}}
    path = change(saved, tmp_path / "ckpt_001", parts)
    (path / gone).unlink()
    verify_checkpoint(path)
    for answers in (pool.run(2, load_job, str(path), 2), pool.run(1, load_job, str(path), 1)):
        assert all("are not there" in answer for answer in answers)


def test_a_shard_twice_is_refused(pool: GlooPool, saved: Path, tmp_path: Path) -> None:
    manifest = manifest_of(saved)
    name, twin = (f"optimizer/shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 3))
    parts = {"files": {**manifest["files"], twin: manifest["files"][name]}}
    path = change(saved, tmp_path / "ckpt_001", parts)
    shutil.copy(path / name, path / twin)
    shutil.copy(path / side_name(name), path / side_name(twin))
    verify_checkpoint(path)
    assert "are twice there" in pool.run(1, load_job, str(path), 1)[0]
    # On the saved layout each rank finds its values in its own file; the sizes tell.
    answers = pool.run(2, load_job, str(path), 2)
    assert all("the files of optimizer hold" in answer for answer in answers)


def test_weights_in_bf16_come_back_rounded(pool: GlooPool, tmp_path: Path) -> None:
    """Thinned, saved as bf16 by two ranks, loaded by one: master weights are the rounded ones."""
    pool.run(2, save_job, str(tmp_path), 2, "bf16")
    (whole,) = pool.run(1, load_job, str(tmp_path / "ckpt_001"), 1, "bf16")
    mark_thinned(tmp_path / "ckpt_001", read_manifest(tmp_path / "ckpt_001"))
    shutil.rmtree(tmp_path / "ckpt_001" / "optimizer")
    assert (tmp_path / "ckpt_001" / THINNED).exists()
    (thinned,) = pool.run(1, load_job, str(tmp_path / "ckpt_001"), 1, "bf16")
    assert set(whole) == set(shapes_of(config_of(1)))
    rounded = 0
    for name, values in whole.items():
        assert torch.equal(thinned[name], values.bfloat16().float()), name
        rounded += not torch.equal(thinned[name], values)
    assert rounded > 5, "nothing was rounded, so it shows nothing"


def test_others_read_it_too(pool: GlooPool, saved: Path) -> None:
    """torch.distributed.checkpoint's reader finds the same weights: the format stays theirs."""
    (mine,) = pool.run(1, load_job, str(saved), 1)
    wanted = {f"{name}.master": torch.zeros_like(values) for name, values in mine.items()}
    dcp.load(
        wanted, storage_reader=dcp.HuggingFaceStorageReader(str(saved / "optimizer")), no_dist=True
    )
    assert all(torch.equal(wanted[f"{name}.master"], values) for name, values in mine.items())


def traffic_job(launch: Launch, path: str, note: str) -> list[str]:
    """What each rank's traffic says while rank 1 hashes, and how many exchanges a load was.

    Rank 1 hashes until rank 0, which notes that, has been in one exchange for ten looks in a row.
    """
    config = config_of(2)
    grid = grid_of(launch, config)
    inside: list[str] = []
    verify = load_module.verify_files

    def slow(*given: Any, **more: Any) -> None:
        if launch.rank == 1:
            soon(Path(note).exists)
            inside.append(grid.comm.current)
        verify(*given, **more)

    load_module.verify_files = slow  # type: ignore[assignment]
    ended = Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.append(grid.comm.current)
            if launch.rank == 0 and seen[-1] and seen[-10:] == seen[-1:] * 10:
                Path(note).write_text(seen[-1])

    seen: list[str] = []
    thread = Thread(target=look)
    thread.start()
    try:
        before = grid.comm.count
        agreed = agree_on_checkpoint([Path(path)], grid)
        counts = [grid.comm.count - before]
    finally:
        load_module.verify_files = verify
        ended.set()
        thread.join()
    assert agreed.taken is not None
    engine = engine_of(config, grid, fill=False)
    before = grid.comm.count
    load_states(
        agreed.taken,
        engine.gradients.shard_layout,
        engine.optimizer.flat_shards,
        grid,
        engine.dtype,
    )
    counts.append(grid.comm.count - before)
    return (
        [*map(str, counts), *inside]
        if launch.rank == 1
        else [*map(str, counts), Path(note).read_text()]
    )


def test_a_rank_that_hashes_long_is_not_the_one_that_waits(
    pool: GlooPool, saved: Path, tmp_path: Path
) -> None:
    """Catches a waiting rank that the watchdog would blame.

    Rank 0 waits in a named exchange; rank 1, which is slow, is in none.
    """
    assert pool.run(2, traffic_job, str(saved), str(tmp_path / "note")) == [
        ["2", "4", "agree on a checkpoint"],
        ["2", "4", ""],
    ]


def test_what_was_searched_is_told() -> None:
    assert str(ChosenCheckpoint(Path("a/ckpt_002"), ["rank 1: bad"])) == (
        "searched 2 checkpoints, took ckpt_002, refused 1: rank 1: bad"
    )
    assert str(ChosenCheckpoint(None, [])) == "searched 0 checkpoints, took none"


MEMORY = """
import sys
sys.path[:0] = [{tools!r}, {root!r}]
from pathlib import Path
import torch
import bench_checkpoint as bench
from k2train.processes import peak_resident_bytes
bench.start_process_group(bench.Launch(0, 1, 0, launched=False), torch.device("cpu"))
folder, what = Path(sys.argv[1]), sys.argv[2]
if what == "save":
    bench.Bench(folder, 400, torch.bfloat16)
else:
    grid = bench.ProcessGrid(bench.Layout(), 0, torch.device("cpu"))
    table = bench.shard_layout(400 * 10**6 // 14, 8)
    lines = {{state: torch.zeros(table.elements) for state in bench.STATES}}
    for line in lines.values():
        line.fill_(1.0)
    before = peak_resident_bytes()
    taken, refused = bench.agree_on_checkpoint([folder / "ckpt_000"], grid)
    assert bench.load_states(taken, table, lines, grid, torch.bfloat16)
    print(peak_resident_bytes() - before)
bench.stop_process_group()
"""


@pytest.mark.slow
def test_loading_takes_no_copy_of_the_state(tmp_path: Path) -> None:
    """Loading 343 MB of optimizer states adds less than a tenth of that to the peak size."""
    script = tmp_path / "memory.py"
    script.write_text(MEMORY.format(tools=str(ROOT / "tools"), root=str(ROOT)))
    for what in ("save", "load"):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), what],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 34e6, f"{int(done.stdout) / 1e6:.0f} MB beside the state"


@pytest.mark.parametrize("version", (1, 2, 3))
def test_a_run_from_before_goes_on(
    pool: GlooPool, tmp_path: Path, version: int, capsys: Any
) -> None:
    """A checkpoint of an earlier format verifies, loads and continues to its run's own losses."""
    golden = GOLDEN / f"format_{version}"
    make_corpus(tmp_path / "data", 2, vocab=23)
    tree = yaml.safe_load((golden / "config.yaml").read_text())
    tree["run"]["directory"] = str(tmp_path / "runs")
    tree["data"]["manifest"] = str(tmp_path / "data" / "manifest.json")
    run = tmp_path / "runs" / tree["run"]["name"]
    shutil.copytree(golden / "ckpt_001", run / "checkpoints" / "ckpt_001")
    assert manifest_of(run / "checkpoints" / "ckpt_001")["format"] == version
    assert verify_tool.main(["--root", str(run)]) == 0
    assert ("no root" in capsys.readouterr().out) == (version == 1)
    assert pool.run(1, trainer_job, tree) == [0]
    expected = {row["step"]: row for row in json.loads((golden / "metrics.json").read_text())}
    rows = step_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [6, 7, 8, 9, 10]
    for row in rows:
        for what in ("loss", "grad_norm"):
            assert row[what] == pytest.approx(expected[row["step"]][what], rel=1e-5), row["step"]
    assert manifest_of(run / "checkpoints" / "ckpt_002")["format"] == FORMAT


def test_the_kept_ones_name_no_machine() -> None:
    """Nothing of where they were made is in them."""
    kept = [*(GOLDEN / "format_2").rglob("*.json"), *(GOLDEN / "format_3").rglob("*.json")]
    assert len(kept) == 6
    for path in kept:
        text = path.read_text()
        assert not any(
            word in text for word in ('"/', "Linux", "linux", "x86", "/home", "/tmp", "hostname")
        ), path


def test_the_first_read_that_fails_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reads that are begun after the first one has failed: each is patient for minutes."""
    begun = []

    def failing(read: Any, round_to: Any) -> None:
        begun.append(read)
        time.sleep(0.05)
        raise UnavailableError("stale")

    monkeypatch.setattr(reshard_read, "_execute", failing)
    reader = ShardReader(Path("shard"))
    reads: list[Any] = [SimpleNamespace(pieces=None, reader=reader) for _ in range(500)]
    with pytest.raises(UnavailableError):
        reshard_read.execute_reads(reads)
    assert 1 <= len(begun) <= THREADS


def away_job(launch: Launch, path: str, number: int) -> str:
    """Rank 1 cannot look at the checkpoint for now."""
    config = config_of(2)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    real = load_module.is_thinned

    def away(path: Path) -> bool:
        raise UnavailableError("the folder is away", number)

    if launch.rank == 1:
        load_module.is_thinned = away
    shards = engine.optimizer.flat_shards
    try:
        load_states(Path(path), engine.gradients.shard_layout, shards, grid, engine.dtype)
    except UnavailableError as error:
        return str(error)
    finally:
        load_module.is_thinned = real
    return "loaded"


def test_the_first_look_of_a_load_is_agreed_on(pool: GlooPool, saved: Path) -> None:
    """Catches a rank that leaves before the first exchange: the others would wait in it."""
    told = pool.run(2, away_job, str(saved), errno.ESTALE)
    assert told == ["rank 1: the folder is away"] * 2
