"""Bundles of spikes: written at the alarm on every layout, readable, bounded, and done again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from k2train.data.chunk import write_chunk, write_manifest
from k2train.data.order import ChunkOrder
from k2train.errors import RunError
from k2train.guard.spike_verdict import SpikeVerdict
from k2train.launch.environment import Launch
from k2train.record.metrics import StepRecord
from k2train.train import spike_bundle
from k2train.train.batch_again import Measured, jumps_of
from k2train.train.bundle_read import Bundle, find_bundle, report
from k2train.train.spike_bundle import batch_rows
from k2train.train.spike_names import EVENT, SEQUENCES, TENSORS, spike_folder
from k2train.train.trainer import Trainer
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import GLOBAL, SEQUENCE, VOCAB, config_tree, trainer_job

tool = load_tool("spike")
part = load_tool("spike_parts/batch_again")

STEPS, BAD = 10, 3
"""Steps of a chunk, and the chunk of random ids."""
ONSET = BAD * STEPS + 1


def make_data(folder: Path) -> Path:
    """Chunks in which an id follows from the one before. In the last one a row is one id over and
    over, and the others are random.
    """
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=5))
    infos = []
    for number in range(BAD + 1):
        rows = np.zeros((GLOBAL * STEPS, SEQUENCE), np.uint16)
        rows[:, 0] = rng.integers(0, VOCAB, len(rows))
        for at in range(1, SEQUENCE):
            rows[:, at] = (rows[:, at - 1] + 1) % VOCAB
        if number == BAD:
            rows = rng.integers(0, VOCAB, rows.shape).astype(np.uint16)
            rows[4] = 17
        infos.append(
            write_chunk(
                folder, f"chunk_{number:03d}", [rows], len(rows), VOCAB, {"made": rows.size}
            )
        )
    write_manifest(
        folder,
        tokenizer_sha256="t" * 64,
        sequence_length=SEQUENCE,
        vocab_size=VOCAB,
        chunks=infos,
        held_out=None,
    )
    return folder / "manifest.json"


def alarm(trainer: Trainer) -> None:
    """Raise an alarm at `ONSET` as the detector would; its baseline takes 64 steps to fill."""

    def spikes(state: Any, result: Any, lr: float) -> list[SpikeVerdict]:
        if state.step not in (ONSET, ONSET + 2):
            return []
        known = {"onset": ONSET, "step": state.step, "usual_loss": 3.0, "channels": ("loss",)}
        if state.step == ONSET:
            return [SpikeVerdict(kind="opened", steps=1, loss=result.loss, loss_z=9.0, **known)]
        return [SpikeVerdict(kind="benign", steps=3, recent_loss=3.0, **known)]

    trainer.report.spikes = spikes  # type: ignore[method-assign]


def spiked(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    tree = config_tree(
        folder / "data" / "manifest.json",
        folder / "runs",
        name,
        lr__kind="constant",
        lr__final=0.0,
        run__stop_after_steps=ONSET + 3,
        **changes,
    )
    tree["batch"]["micro_sequences"] = 3
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """A run on tp 2 x pp 2 with a bundle."""
    made = tmp_path_factory.mktemp("bundle")
    make_data(made / "data")
    grid = spiked(made, "grid", parallel__tensor=2, parallel__pipeline=2)
    assert pool.run(4, trainer_job, grid, alarm) == [75] * 4
    return made


def bundle_of(folder: Path) -> Bundle:
    return find_bundle(folder / "runs" / "grid", "1")


def test_what_a_bundle_holds(folder: Path) -> None:
    """Catches losses in another order than the rows, a bundle of another step, and one that never
    learns how the event ended.
    """
    bundle = bundle_of(folder)
    event = bundle.event
    assert (event["chunk"], event["rows"], event["order_index"]) == ("chunk_003", [0, GLOBAL], 3)
    assert (bundle.onset, event["checkpoint_before"]) == (ONSET, "ckpt_003")
    assert (event["closed"]["kind"], event["closed"]["step"]) == ("benign", ONSET + 2)

    sequences = bundle.lines_of(SEQUENCES)
    losses = [row["loss"] for row in sequences]
    assert losses == sorted(losses, reverse=True) and len(losses) == GLOBAL
    assert sorted(row["row"] for row in sequences) == list(range(GLOBAL))
    same = next(row for row in sequences if row["row"] == 4)
    assert (same["distinct_ids"], same["commonest_id"], same["commonest_share"]) == (1, 17, 1.0)
    # Of the weights after the step, which has lowered it a little.
    assert sum(losses) / GLOBAL == pytest.approx(event["loss"], rel=0.1)

    tensors = bundle.lines_of(TENSORS)
    norm = sum(row["gradient"]["norm"] ** 2 for row in tensors) ** 0.5
    assert norm == pytest.approx(event["grad_norm"], rel=1e-6)

    last = bundle.lines_of("steps.jsonl")
    assert [row["step"] for row in last][:2] == [ONSET + 2, ONSET + 1]
    batches = {row["step"]: row for row in bundle.lines_of("batches.jsonl")}
    assert batches[ONSET]["rows"] == [0, GLOBAL] and "ids" in batches[ONSET]
    assert batches[ONSET - 1]["chunk"] == "chunk_002" and "ids" not in batches[ONSET + 1]


def test_the_report_says_what_when_and_where(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "grid"
    assert tool.main([str(run)]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith(f"1: opened at step {ONSET}, benign at step {ONSET + 2}; chunk_003")
    assert tool.main([str(run), "spike_001"]) == 0
    shown = capsys.readouterr().out
    lines = "\n".join(report(bundle_of(folder)))
    assert "1 distinct ids, id 17 is 100% of it" in lines
    assert "attempt 1, layout tensor 2, pipeline 2, data 1\n" in lines
    assert "no text: the data folder has no tokenizer" in shown
    assert "layers with the largest part" in shown and "  layers.0." in shown
    assert tool.main([str(run), "7"]) == 2
    assert "has no bundle '7': it has 1" in capsys.readouterr().err


def again_job(launch: Launch, run: str, number: str) -> dict[str, Any]:
    """The batch again, as the tool does it."""
    bundle = find_bundle(Path(run), number)
    (text,) = part.lines_of(Path(run), bundle, None, True)
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_batch_again_with_an_older_state(folder: Path, pool: GlooPool) -> None:
    """Catches a state of the onset itself, another batch, and weights that move between batches.

    The run was trained on tp 2 x pp 2.
    """
    run = folder / "runs" / "grid"
    (found,) = pool.run(1, again_job, str(run), "1")
    assert (found["checkpoint"], found["checkpoint_step"]) == ("ckpt_001", STEPS)
    assert [one["step"] for one in found["controls"]] == list(range(ONSET - 8, ONSET))
    assert found["verdict"] == "data alone"
    (jump,) = found["jumps"]
    assert jump["older"] > 1.0
    # By then the run itself had measured what a batch of its chunks costs.
    rows = step_rows(run / "metrics.jsonl")
    then = next(row["loss"] for row in rows if row["step"] == STEPS + 1)
    # A batch of 12 rows is noisy; the state of the onset is 2 nats better, no state 1.5 worse.
    assert found["controls"][0]["loss"] == pytest.approx(then, abs=0.8)


def test_a_good_batch_is_bad_with_the_later_state_only(folder: Path, pool: GlooPool) -> None:
    """Catches a verdict that blames the data of every spike."""
    run, onset = folder / "runs" / "grid", ONSET - 1
    event = json.loads((spike_folder(run, 1) / EVENT).read_text())
    event["opened"] |= {"onset": onset, "step": onset, "loss": 9.0}
    rows = [(STEPS - 1) * GLOBAL, STEPS * GLOBAL]
    event |= {"number": 2, "chunk": "chunk_002", "order_index": 2, "rows": rows}
    spike_folder(run, 2).mkdir()
    (spike_folder(run, 2) / EVENT).write_text(json.dumps(event))

    (found,) = pool.run(1, again_job, str(run), "2")
    assert (found["checkpoint"], found["verdict"]) == ("ckpt_001", "data with this state")
    assert abs(found["jumps"][0]["older"]) < 1.5 < found["jumps"][0]["run"] / 2


def bundle(**opened: Any) -> Bundle:
    usual = {"usual_loss": 2.0, "usual_grad_norm": 1.0, "loss": 6.0, "grad_norm": 8.0}
    return Bundle(Path(), {"opened": {"onset": 9, "step": 9, **usual, **opened}})


@pytest.mark.parametrize(
    ("channels", "loss", "norm", "shares"),
    (
        (("loss",), 7.0, 1.0, [1.0]),
        (("loss",), 3.5, 99.0, [0.125]),
        (("grad_norm",), 3.0, 8.0, [1.0]),
        (("loss", "grad_norm"), 5.0, 1.0, [0.5, 0.0]),
        (("update_norm",), 3.0, 1.0, [0.0]),
    ),
)
def test_the_share_of_a_jump(
    channels: tuple[str, ...], loss: float, norm: float, shares: list[float]
) -> None:
    """Catches a comparison with the run's own usual loss, which a younger state never reaches."""
    controls = [Measured(step, 3.0, 1.0) for step in range(3)]
    jumps = jumps_of(bundle(channels=channels), Measured(9, loss, norm), controls)
    assert [jump.share for jump in jumps] == pytest.approx(shares)


def test_a_bundle_is_bounded_and_a_full_disk_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that grows with the batch, and a run that ends because of a report."""
    monkeypatch.setitem(spike_bundle.MOST_BYTES, SEQUENCES, 100)
    spike_bundle._write_lines(tmp_path / SEQUENCES, [{"row": n, "loss": 1.5} for n in range(99)])
    lines = (tmp_path / SEQUENCES).read_text().splitlines()
    assert sum(map(len, lines)) <= 140 and json.loads(lines[-1]) == {"left_out": 100 - len(lines)}

    told: list[str] = []
    bundles: Any = SimpleNamespace(logger=SimpleNamespace(info=told.append))
    verdict: Any = SimpleNamespace(onset=7)

    def full() -> None:
        raise OSError(28, "No space left on device")

    spike_bundle.SpikeBundles._told(bundles, full, verdict)
    assert told == ["the bundle of the spike at step 7: [Errno 28] No space left on device"]


def test_an_edited_bundle_is_one_line(tmp_path: Path) -> None:
    path = spike_folder(tmp_path, 1)
    path.mkdir(parents=True)
    for content in ("[]", "{", '{"opened": {"onset": 1, "step": "x"}, "rows": [], "chunk": "c"}'):
        (path / "event.json").write_text(content)
        with pytest.raises(RunError, match=r"event\.json") as refused:
            find_bundle(tmp_path, "1")
        assert "\n" not in str(refused.value)


def test_batches_at_the_ends_of_the_data() -> None:
    """Catches steps that do not exist."""
    order = ChunkOrder(("a", "b"), (4, 4), 2)
    rows = batch_rows(order, 2, [StepRecord(2, 1, ids="f")])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("ids") for row in rows] == [None, "f", None, None]
