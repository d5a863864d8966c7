"""Replay against runs that were trained, and against runs that were tampered with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train import fault_injection
from k2train.checkpoint.manifest import read_manifest
from k2train.errors import CheckpointError, RunError, UserError
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid
from k2train.record.events import CheckpointSaved
from k2train.record.jsonl import encode_line
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.line_check import with_check
from k2train.replay.begin import Place, begin_of
from k2train.replay.leave_out import items, write_without
from k2train.replay.program import replay_on
from k2train.replay.recorded_run import RecordedRun
from k2train.replay.replay import Replay
from k2train.replay.request import Request
from k2train.replay.table import rows
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    make_corpus(folder / "data", 2)
    return folder


def trained(base: Path, pool: GlooPool, name: str, world: int, **changes: Any) -> Path:
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        name,
        audit__root_every_steps=2,
        **changes,
    )
    assert pool.run(world, trainer_job, tree) == [0] * world
    return base / "runs" / name


@pytest.fixture(scope="module")
def alone(base: Path, pool: GlooPool) -> Path:
    """A run on one process, in bf16: its master weights hold bits that the weights do not."""
    return trained(base, pool, "alone", 1, precision="bf16")


@pytest.fixture(scope="module")
def grid_run(base: Path, pool: GlooPool) -> Path:
    """A run on tp 2 x dp 2, in fp32."""
    return trained(base, pool, "grid", 4, parallel__tensor=2)


def grid_of(launch: Launch, run: RecordedRun, place: Place) -> ProcessGrid:
    newest = run.manifest(run.checkpoints[-1])
    layout = begin_of(run, newest.config, place).layout
    return ProcessGrid(layout, launch.rank, torch.device("cpu"))


def replay_job(launch: Launch, directory: Path, request: Request) -> tuple[list[str], bool]:
    """A replay in the pool; the lines of a user's mistake."""
    fault_injection.arm("", launch.rank)
    threads = torch.get_num_threads()
    try:
        run = RecordedRun.read(directory)
        place = Place(launch.world_size, same_layout=launch.world_size > 1)
        return replay_on(grid_of(launch, run, place), run, request, place)
    except UserError as error:
        return [f"{type(error).__name__}: {error}"], False
    finally:
        torch.set_num_threads(threads)


def replayed(pool: GlooPool, run: Path, world: int = 1, **request: Any) -> tuple[str, bool]:
    found = pool.run(world, replay_job, run, Request(**request))
    assert all(part == found[0] or world > 1 for part in found)
    return "\n".join(found[0][0]), found[0][1]


def copy_of(run: Path, name: str) -> Path:
    other = run.with_name(name)
    shutil.copytree(run, other)
    return other


def test_the_same_layout_is_replayed_to_the_bit(alone: Path, pool: GlooPool) -> None:
    """Steps, roots and the whole state at the end."""
    text, good = replayed(pool, alone, chunk=2)
    assert good and text.startswith("verified: ckpt_002 from ckpt_001, steps 6 to 10: 5 steps, 4")
    assert "to the bit" in text
    text, good = replayed(pool, alone, resume_drill=1)
    assert good and "the 2 steps after ckpt_001: as recorded, to the bit" in text
    assert replayed(pool, alone, steps=(3, 4))[1]


def test_another_pipeline_degree_is_replayed_to_the_bit(base: Path, pool: GlooPool) -> None:
    """The first law: three pipeline ranks and a split backward change no bit."""
    run = trained(base, pool, "pipeline", 2, parallel__pipeline=2, parallel__schedule="zb-h1")
    text, good = replayed(pool, run, chunk=2)
    assert good and "to the bit" in text, text


def test_an_exact_run_is_replayed_to_the_bit_on_fewer_ranks(base: Path, pool: GlooPool) -> None:
    """Catches a bound, where the run's sums do not depend on the data-parallel degree."""
    run = trained(base, pool, "exact", 2, run__exact=True)
    text, good = replayed(pool, run, chunk=2)
    assert good and "to the bit" in text, text


def test_one_process_replays_a_grid_within_rounding(grid_run: Path, pool: GlooPool) -> None:
    text, good = replayed(pool, grid_run, chunk=2)
    assert good and "within rounding (tensor 2 -> 1" in text and "data 2 -> 1" in text


def test_as_many_processes_replay_a_grid_to_the_bit(grid_run: Path, pool: GlooPool) -> None:
    text, good = replayed(pool, grid_run, 4, chunk=2)
    assert good and "to the bit" in text


def without_job(launch: Launch, directory: Path, number: int, item: str, into: Path) -> str:
    """Save checkpoint `number` without an item into `into`, hashes and digests made anew."""
    run, place = RecordedRun.read(directory), Place(1)
    with Replay(run, grid_of(launch, run, place), place, lambda text: None) as replaying:
        source = run.checkpoint(number)
        session, _ = replaying.session_after(source, read_manifest(source).step + 1)
        (wanted,) = [part for part in items() if part.name == item]
        return str(write_without(session, source, into, wanted))


def put_without(pool: GlooPool, run: Path, number: int, item: str, tmp_path: Path) -> None:
    (path,) = pool.run(1, without_job, run, number, item, tmp_path / "made")
    there = run / "checkpoints" / Path(path).name
    shutil.rmtree(there)
    shutil.copytree(path, there)


@pytest.mark.parametrize(
    "item", ("optimizer state exp_avg", "optimizer state exp_avg_sq", "TrainState.adam_steps")
)
def test_the_bound_of_rounding_rejects_lost_moments(
    grid_run: Path, pool: GlooPool, tmp_path: Path, item: str
) -> None:
    """Catches a bound so wide that a run whose moments were zeroed passes on another layout."""
    run = copy_of(grid_run, f"lost-{tmp_path.name}")
    # A record that was rewritten, too: only the steps can tell.
    put_without(pool, run, 1, item, tmp_path)
    forget_hashes(run)
    text, good = replayed(pool, run, chunk=2)
    assert not good and "step 7 has" in text and "rounding explains" in text, text
    assert "step 6 has" not in text


def forget_hashes(run: Path) -> None:
    """Take the hashes of the checkpoints out of the ledger and chain it anew, as a forger."""
    path = run / "ledger.jsonl"
    entries = read_ledger(path)
    for file in run.glob("ledger*"):
        file.unlink()
    ledger = Ledger(path)
    for entry in entries:
        if not isinstance(entry.event, CheckpointSaved):
            ledger.append(entry.event)


def changed_metric(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    index = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 8)
    row = json.loads(lines[index])
    del row["check"]
    row["loss"] += 1e-6
    lines[index] = with_check(encode_line(row)).rstrip()
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def changed_line(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_text(path.read_text().replace('"step": 5', '"step": 4', 1))


def changed_weight(run: Path) -> None:
    file = next((run / "checkpoints" / "ckpt_001" / "optimizer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("tamper", "words"),
    (
        (changed_metric, "differs: ckpt_002 from ckpt_001, steps 6 to 10: step 8 has loss"),
        (changed_line, "ledger.jsonl: line"),
        (changed_weight, "does not match its hash"),
    ),
)
def test_what_was_tampered_with_is_named(
    alone: Path, pool: GlooPool, tamper: Callable[[Path], None], words: str
) -> None:
    run = copy_of(alone, tamper.__name__)
    tamper(run)
    text, good = replayed(pool, run, chunk=2)
    assert not good and words in text, text


def test_a_changed_row_of_a_chunk_is_named(alone: Path, base: Path, pool: GlooPool) -> None:
    """By its hash; and where the data's manifest was made anew, by the ids of the step."""
    data = base / "other"
    shutil.copytree(base / "data", data)
    tokens = np.load(data / "chunk_001.npy", mmap_mode="r+")
    tokens[14, 3] = (int(tokens[14, 3]) + 1) % 200
    tokens.flush()
    run = copy_of(alone, "other-data")
    for path in (run / "checkpoints").glob("*/manifest.json"):
        assert str(base / "data") in path.read_text()

    def job(place_data: Path) -> tuple[list[str], bool]:
        (found,) = pool.run(1, moved_job, run, place_data)
        return found

    lines, good = job(data / "manifest.json")
    assert not good and "chunk_001" in lines[0]


def moved_job(launch: Launch, directory: Path, data: Path) -> tuple[list[str], bool]:
    run, place = RecordedRun.read(directory), Place(1, data)
    try:
        return replay_on(grid_of(launch, run, place), run, Request(chunk=2), place)
    except UserError as error:
        return [str(error)], False


@pytest.mark.parametrize("folder", ("model", "optimizer"))
def test_the_files_at_the_end_are_read(alone: Path, pool: GlooPool, folder: str) -> None:
    """Catches a replay that takes the manifest's root for what the files beside it hold."""
    run = copy_of(alone, f"end-{folder}")
    file = next((run / "checkpoints" / "ckpt_002" / folder).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    text, good = replayed(pool, run, chunk=2)
    assert not good and "ckpt_002" in text and "hash" in text, text


def weights_job(launch: Launch, directory: Path) -> list[list[str]]:
    """Tensors whose weights differ from the master weights: as they are, and one element off."""
    run, place = RecordedRun.read(directory), Place(1)
    with Replay(run, grid_of(launch, run, place), place, lambda text: None) as replaying:
        path = run.checkpoint(1)
        session, _ = replaying.session_after(path, 6)
        optimizer = session.engine.optimizer
        master, slot = optimizer.master, optimizer.shard_layout.slots[0]
        found = [session.weight_sums(path, master)]
        optimizer.view("master", slot).view(-1)[-1] += 1.0
        found.append(session.weight_sums(path, master))
        (here,) = [part.name for part in session.distances(path) if part.relative]
        assert here == f"{slot.param_slice.name}.master"
    return [[name for name, sums in part.items() if sums[0]] for part in found] + [
        [f"{slot.param_slice.name}.weights"]
    ]


def test_weights_that_are_not_the_rounded_master_weights_are_named(
    alone: Path, pool: GlooPool
) -> None:
    """Catches forged weights beside moments and master weights that are whole."""
    ((whole, changed, name),) = pool.run(1, weights_job, alone)
    assert whole == [] and changed == name


def test_a_replaced_checkpoint_is_named(alone: Path, pool: GlooPool, tmp_path: Path) -> None:
    """Digests made anew: the ledger's hash of the manifest is another."""
    run = copy_of(alone, "replaced")
    put_without(pool, run, 2, "optimizer state exp_avg of one tensor", tmp_path)
    text, good = replayed(pool, run, chunk=2)
    assert not good and "ckpt_002: its manifest has sha256" in text

    # With a forged ledger, too, the tensor is named by the steps that make it.
    forget_hashes(run)
    text, good = replayed(pool, run, chunk=2)
    assert not good and "norm.weight.exp_avg" in text, text


def table_job(launch: Launch, directory: Path) -> list[Any]:
    run, place = RecordedRun.read(directory), Place(1)
    with Replay(run, grid_of(launch, run, place), place, lambda text: None) as replaying:
        return [tuple(row) for row in rows(replaying, 1)]


def test_leaving_out_any_item_is_found_in_two_steps(alone: Path, pool: GlooPool) -> None:
    """Catches an item of the state that no step and no record would miss."""
    (found,) = pool.run(1, table_job, alone)
    by_item = {item: (step, bool(record)) for item, step, _, record in found}
    assert by_item.pop("nothing") == (0, False)
    # This run has no stage before it.
    assert by_item.pop("TrainState.parent") == (0, False)
    assert by_item["weights of one tensor"][0] == 1
    for item in ("low bits of the master weights", "optimizer state exp_avg"):
        assert by_item[item][0] == 2, item
    assert by_item["TrainState.adam_steps"][0] == 2
    assert all(step or record for step, record in by_item.values()), by_item


def test_what_cannot_be_replayed_is_said(alone: Path) -> None:
    run = RecordedRun.read(alone)
    with pytest.raises(CheckpointError, match="no ckpt_009; there are: ckpt_000"):
        Request(chunk=9).segments(run)
    with pytest.raises(RunError, match=r"steps 8 to 12 are not on record: .* has 1 to 10"):
        Request(steps=(8, 12)).segments(run)
    with pytest.raises(RunError, match=r"--probe 3: .* has 2 chunks"):
        Request(probe=3).segments(run)
    drawn = Request(probe=1, seed=4)
    assert drawn.drawn(run, 1) == drawn.drawn(run, 1)
    with pytest.raises(RunError, match="is no run"):
        RecordedRun.read(alone.parent)


SPOTS = (
    ({"chunk": 2, "first_only": True}, "verified: from ckpt_001, step 6: 1 step"),
    ({"prompt": 2}, "verified: ckpt_002: 4 layers, logits"),
    ({"chunk": 2, "layer": 3}, "verified: layer 3 of ckpt_002 from ckpt_001"),
)


@pytest.mark.parametrize(("request_of", "words"), SPOTS, ids=("step", "micro-batch", "layer"))
def test_a_spot_checks_a_part(
    grid_run: Path, pool: GlooPool, request_of: dict[str, Any], words: str
) -> None:
    """On one process, from the shards of four."""
    text, good = replayed(pool, grid_run, **request_of)
    assert good and text.startswith(words), text


@pytest.mark.parametrize(
    ("item", "words"),
    (
        ("optimizer state exp_avg_sq", "a first moment is larger than its second moment allows"),
        ("weights of one tensor", ""),
    ),
)
def test_a_layer_that_no_update_could_make_is_found(
    grid_run: Path, pool: GlooPool, tmp_path: Path, item: str, words: str
) -> None:
    """Digests and ledger made anew: only what Adam allows tells."""
    run = copy_of(grid_run, f"layer-{tmp_path.name}")
    put_without(pool, run, 2, item, tmp_path)
    forget_hashes(run)
    text, good = replayed(pool, run, chunk=2, layer=0)
    if words:
        assert not good and words in text, text
    # The largest tensor is not of a layer: the forward check of the weights finds it.
    assert not replayed(pool, run, prompt=2)[1] or words
