"""TensorBoard mirror, read back by TensorBoard: no point twice, and none lost, across restarts."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from k2train.record.curves import Curves
from k2train.record.events import Resumed, Spike, Started
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.record.tensorboard import TOKENS, TensorBoardMirror

TOKENS_A_STEP = 64


def _started() -> Started:
    return Started(
        attempt=1,
        run="demo",
        run_id="r",
        world_size=4,
        layout="Layout(tensor=2, pipeline=1, data=2)",
        total_steps=20,
        chunks=2,
        parameters=1000,
        kernels="plain",
        data_manifest_sha256="0",
        environment={},
    )


def _resumed(attempt: int, step: int) -> Resumed:
    return Resumed(
        attempt=attempt,
        checkpoint="ckpt_001",
        step=step,
        refused=(),
        set_aside=(),
        layout="Layout(tensor=1, pipeline=1, data=4)",
        world_size=4,
        config_changes=(),
    )


def _train(folder: Path, attempt: int, steps: range, notes: list[str]) -> None:
    mirror = TensorBoardMirror(folder, attempt, "lr:\n  peak: 1", notes.append)
    before = steps.start - 1
    mirror.begin(TOKENS_A_STEP * before, float(before))
    mirror.event(_started() if attempt == 1 else _resumed(attempt, before))
    for step in steps:
        row = StepRecord(
            step,
            attempt,
            consumed_tokens=TOKENS_A_STEP * step,
            loss=attempt + 1 / step,
            seconds=1.0,
        )
        mirror.step(row)
    mirror.score(HeldOutRecord(steps[-1], attempt, "held_out", 3.0 + attempt))
    mirror.close()


def _read(folder: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = module.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return read.Reload()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """Catches steps that are there twice, or of the attempt that was undone, or lost."""
    notes: list[str] = []
    _train(tmp_path, 1, range(1, 13), notes)
    # Steps 9 to 12 are undone.
    _train(tmp_path, 2, range(9, 21), notes)
    assert notes == []
    found = _read(tmp_path)
    losses = found.Scalars("loss/train")
    assert [point.step for point in losses] == list(range(1, 21))
    wanted = [(1 if step < 9 else 2) + 1 / step for step in range(1, 21)]
    assert [point.value for point in losses] == pytest.approx(wanted)
    scores = found.Scalars("loss/held_out")
    assert [(point.step, point.value) for point in scores] == [(20, 5.0)]
    tokens = _read(tmp_path / TOKENS)
    assert set(tokens.Tags()["scalars"]) == {"loss_over_tokens/train", "loss_over_tokens/held_out"}
    over_tokens = tokens.Scalars("loss_over_tokens/train")
    assert [point.step for point in over_tokens] == [64 * step for step in range(1, 21)]
    assert not [tag for tag in found.Tags()["scalars"] if tag.startswith("loss_over")]


def test_names_are_groups_and_nothing_is_junk(tmp_path: Path) -> None:
    _train(tmp_path, 1, range(1, 3), [])
    found = _read(tmp_path)
    assert set(found.Tags()["scalars"]) == {
        "loss/train",
        "loss/held_out",
        "optimizer/grad_norm",
        "optimizer/lr",
        "optimizer/skipped",
        "speed/tokens_per_second",
        "speed/seconds_per_step",
    }


def test_config_facts_and_alerts_are_text(tmp_path: Path) -> None:
    """Catches a text that TensorBoard does not show, and a spike that leaves no mark."""
    mirror = TensorBoardMirror(tmp_path, 1, "lr:\n  peak: 1", curves=Curves(1e9))
    mirror.event(_started())
    mirror.event(Spike(attempt=1, policy="alert", kind="opened", step=7, loss=9.0, usual_loss=2.0))
    mirror.close()
    found = _read(tmp_path)
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }
    assert "peak: 1" in texts["run/config"]
    assert "data_parallel: 2" in texts["run/facts"] and "world_size: 4" in texts["run/facts"]
    assert texts["run/alerts"].startswith("**spike opened** step 7: loss 9.0000")
    plugins = {found.SummaryMetadata(tag).plugin_data.plugin_name for tag in texts}
    assert plugins == {"text"}


def test_no_file_names_the_host(tmp_path: Path) -> None:
    _train(tmp_path, 3, range(1, 3), [])
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"events.out.tfevents.0000000003.k2train"}


def test_a_missing_package_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends, or a folder that is made, without the package."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    notes: list[str] = []
    _train(tmp_path / "never", 1, range(1, 9), notes)
    assert len(notes) == 1 and "the package tensorboard is not installed" in notes[0]
    assert "pip install 'k2train[tracking]'" in notes[0] and "the run continues" in notes[0]
    assert not (tmp_path / "never").exists()


def test_a_disk_that_refuses_is_one_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    notes: list[str] = []
    _train(tmp_path / "file", 1, range(1, 9), notes)
    assert len(notes) == 1 and notes[0].startswith("TensorBoard mirror is off: ")


def test_a_stuck_disk_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that waits for TensorBoard's file."""
    go_on, notes = threading.Event(), list[str]()
    monkeypatch.setattr(TensorBoardMirror, "_open", lambda mirror: go_on.wait())
    mirror = TensorBoardMirror(tmp_path, 1, log=notes.append, close_seconds=0.1)
    # Whatever waited here would wait for ever: `go_on` comes last.
    for step in range(1000):
        mirror.step(StepRecord(step))
    mirror.close()
    assert len(notes) == 1 and "did not finish within 0.1 s" in notes[0]
    go_on.set()
