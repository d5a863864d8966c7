"""`tools/bench_watch.py` at a tiny size: catches one that fails, or compares two different
works.
"""

import subprocess
import sys
from pathlib import Path

from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def test_it_prints_its_table() -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_watch.py", "--steps", "3", "--hidden", "32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and rows[1].endswith("| 1 |")
