"""What a step's metrics row says of speed: tokens and utilisation, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.config.load import Config
from k2train.record.event import Event
from k2train.record.events import Spike
from k2train.record.metrics import StepRecord
from k2train.train.preflight import prepare_start
from k2train.train.run_logger import RunLogger
from k2train.train.state import TrainState
from k2train.train.step_report import Done, StepReport
from k2train.train.step_result import StepResult
from tests.support.tiny_corpus import GLOBAL, SEQUENCE, VOCAB, config_tree, make_corpus

H100_PCIE = {"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12}
"""FLOP/s by its data sheet."""


class Rows(RunLogger):
    """Keeps the rows, the events and the lines."""

    def __init__(self) -> None:
        self.rows: list[StepRecord] = []
        self.events: list[Event] = []
        self.lines: list[str] = []

    def step(self, record: StepRecord) -> None:
        self.rows.append(record)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def info(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("restart", (False, True))
def test_a_spike_is_recorded_and_told(tmp_path: Path, restart: bool) -> None:
    """Catches a verdict missing in the ledger, and an alarm that a new rate alone raises."""
    make_corpus(tmp_path / "data", 1)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path, "run")
    start = prepare_start(Config.model_validate(tree), 1, verify=False)
    logger, state = Rows(), TrainState()
    report = StepReport(start, logger, torch.device("cpu"))
    for step in range(1, 101):
        state.step, rate = step, 0.1 if step < 90 else 0.5
        result = StepResult(3.0 + step % 3 / 50, 1.0, {}, True, (), update_norm=2.0 * rate)
        assert report.spikes(state, result, rate) == []
    if restart:
        state.guard.spikes.attempt_began(101)
    state.step = 101
    (verdict,) = report.spikes(state, StepResult(9.0, 1.0, {}, True, (), update_norm=1.0), 0.5)
    kind = "restart" if restart else "opened"
    (event,) = logger.events
    assert isinstance(event, Spike) and event.row()["kind"] == verdict.kind == kind
    assert event.row()["channels"] == ("loss",) and event.onset == 101
    assert logger.lines[0].startswith(f"spike {kind} at step 101: loss 9.0000, grad_norm 1")
    assert ("no data" in logger.lines[0]) == restart


@pytest.mark.parametrize(
    ("device", "peak", "changes"),
    (
        ("NVIDIA H100 PCIe", "bf16", {"precision": "bf16"}),
        ("NVIDIA H100 PCIe", "fp8", {"precision": "bf16", "kernels__matmul": "fp8"}),
        ("NVIDIA H100 PCIe", "fp32", {"precision": "fp32"}),
        ("NVIDIA A100-SXM4-80GB", None, {"precision": "bf16", "kernels__matmul": "fp8"}),
        ("NVIDIA Made Up 1", None, {"precision": "bf16"}),
    ),
)
def test_utilisation_is_of_all_devices_at_their_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    peak: str | None,
    changes: dict[str, Any],
) -> None:
    """Catches the peak of one device, another precision's, a share of the FLOPs, and tokens of one
    rank.
    """
    make_corpus(tmp_path / "data", 1)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path, "run", **changes)
    tree["batch"]["micro_sequences"] = 2
    start = prepare_start(Config.model_validate(tree), 3, verify=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    monkeypatch.setattr(StepReport, "_peak_memory_bytes", lambda _: 0)
    logger = Rows()
    report = StepReport(start, logger, torch.device("cuda", 0))
    result = StepResult(5.0, 1.0, {}, True, ())
    report.done(Done(1, result, 0.1, 0.25, "", None, None, None))

    (row,) = logger.rows
    tokens = GLOBAL * SEQUENCE
    assert row.tokens_per_second == tokens / 0.25
    assert row.mfu_peak == peak and "update_norm" not in row.row()
    if peak is None:
        assert row.mfu is None and "mfu_peak" not in row.row()
        return
    # Four layers of 32, feed-forward 48: matrices of a layer, and of the head.
    weights = 4 * (4 * 32 * 32 + 3 * 32 * 48) + VOCAB * 32
    flops = tokens * (6 * weights + 12 * 4 * SEQUENCE * 32)
    assert row.mfu == pytest.approx(flops / 0.25 / (3 * H100_PCIE[peak]), rel=1e-12)
    assert row.row()["mfu_peak"] == peak
