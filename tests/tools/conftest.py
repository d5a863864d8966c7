"""One dry run of the GPU benchmark for the tests of all tools that have its parts."""

import io
import sys
from pathlib import Path

import pytest

from tests.support.command_line import load_tool


@pytest.fixture(scope="session")
def bench_gpu_dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, table) of one dry run of everything in `tools/bench.py gpu`."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        arguments = ["gpu", "--dry-run", "--folder", str(folder), "--minutes", "8"]
        code = load_tool("bench").main(arguments)
    assert code == 0
    return folder, printed.getvalue()
