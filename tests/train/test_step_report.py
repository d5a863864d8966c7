"""What a step's metrics row says of speed: tokens and utilisation, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.config.load import Config
from k2train.record.metrics import StepRecord
from k2train.train.engine import StepResult
from k2train.train.preflight import prepare_start
from k2train.train.run_logger import RunLogger
from k2train.train.step_report import StepReport
from tests.support.tiny_corpus import GLOBAL, SEQUENCE, VOCAB, config_tree, make_corpus

H100_PCIE = {"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12}
"""FLOP/s by its data sheet."""


class Rows(RunLogger):
    """Keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.rows.append(record)


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
    start = prepare_start(Config.model_validate(tree), 3, verify=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    monkeypatch.setattr(StepReport, "_peak_memory_bytes", lambda _: 0)
    logger = Rows()
    report = StepReport(start, logger, torch.device("cuda", 0))
    report.done(1, StepResult(5.0, 1.0, {}, True, ()), 0.1, 0.25, "", None)

    (row,) = logger.rows
    tokens = GLOBAL * SEQUENCE
    assert row.tokens_per_second == tokens / 0.25
    assert row.mfu_peak == peak
    if peak is None:
        assert row.mfu is None and "mfu_peak" not in row.row()
        return
    # Four layers of 32, feed-forward 48: matrices of a layer, and of the head.
    weights = 4 * (4 * 32 * 32 + 3 * 32 * 48) + VOCAB * 32
    flops = tokens * (6 * weights + 12 * 4 * SEQUENCE * 32)
    assert row.mfu == pytest.approx(flops / 0.25 / (3 * H100_PCIE[peak]), rel=1e-12)
    assert row.row()["mfu_peak"] == peak
