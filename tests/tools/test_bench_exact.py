"""`tools/bench_exact.py` on real, tiny processes: its table, and losses that differ."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from benchmarks.blocked_products import Results, column, measure, row
from tests.support.command_line import load_tool
from tests.tools.test_bench_schedules import TINY


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("bench_exact")


def test_it_compares_the_losses_of_all_processes(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row left out, a price of another engine, and losses that nobody compares."""
    monkeypatch.setattr(tool, "EXACT", ((1, 1),))
    tiny = ["--steps", "2", "--precisions", "fp32", *TINY]
    assert tool.main(tiny) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert [row[:4] for row in cells] == [
        ["fp32", count, *kind] for count in ("1", "2") for kind in (["plain", ""], ["1", "1"])
    ]
    assert [row[5].endswith("%") for row in cells] == [False, True] * 2


def test_losses_that_differ_are_a_failure(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks(runs: list[list[str]], processes: int, *given: int, **named: int) -> list[object]:
        return [[[{"cpu_seconds": 1.0, "loss": 0.5 * processes}] for _ in runs]] * processes

    monkeypatch.setattr(tool, "run_ranks", ranks)
    assert tool.main(["--steps", "1", "--precisions", "bf16"]) == 1
    assert "losses of bf16 on 2 processes differ from those on 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        tool.main(["--processes", "0"])
    assert refused.value.code == 2


def test_blocks_have_the_same_bits_on_every_degree() -> None:
    """Catches a sum over ranks that is not the upper part of the tree over blocks."""
    rows = measure(32, 64, 8, 1)
    assert [(row[:2], row[4]) for row in rows] == [
        ([name, str(blocks)], ", ".join(str(n) for n in (1, 2, 4, 8) if n <= blocks))
        for name in ("fp32", "bf16")
        for blocks in (4, 8)
    ]


@pytest.mark.parametrize("kind", (column, row))
def test_blocks_are_the_product(kind: Callable[..., Results]) -> None:
    """Catches a block left out, against fp64. Tolerance: sums of 64 products in fp32."""
    generator = torch.Generator().manual_seed(1)
    x, dy, w = (torch.randn(*s, generator=generator) for s in ((8, 64), (8, 32), (32, 64)))
    found = kind(x, dy, w, 8, 2)
    wide = (x.double() @ w.double().t(), dy.double() @ w.double(), dy.double().t() @ x.double())
    for value, exact in zip(found, wide, strict=True):
        assert torch.allclose(value.double(), exact, rtol=0, atol=64 * 2.0**-22)
