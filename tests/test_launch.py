"""The launcher's exit code: what a batch script decides on."""

import subprocess
import sys
from pathlib import Path

import pytest

from k2train.launch import verdict


@pytest.mark.parametrize(
    ("codes", "expected"),
    (
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15, 2: -15}, 75),
        ({0: 2, 1: -15}, 2),
        ({0: 2, 1: 75}, 2),
        ({0: 1, 1: 2}, 1),
        ({1: -9, 0: -15}, 1),
        ({0: -15, 1: -15}, 1),
        ({0: 75, 1: -9}, 1),
    ),
)
def test_verdict(codes: dict[int, int], expected: int) -> None:
    """A job that saved and stopped is started again, one with a mistake is not; a killed process is neither."""
    assert verdict(codes) == expected


def test_one_bad_process_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    verdict({0: -15, 3: -9})
    assert capfd.readouterr().err == "process 3 ended with signal 9\n"


def test_real_processes(tmp_path: Path) -> None:
    """Through the real torchrun: the processes' own code comes out, without a traceback."""
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(75)\n")
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", str(tmp_path / "leaves.py")]
    done = subprocess.run(
        [sys.executable, "-m", "k2train.launch", *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75
    assert "Traceback" not in done.stderr
