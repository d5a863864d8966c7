"""A real headless Chromium: its DOM after the scripts, its console, and pictures of pages."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.command_line import HANG_SECONDS

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
)
"""Without what a browser asks the network for at its start."""


def chromium() -> str:
    """Path of the browser; without one the test is skipped, or fails where it is required."""
    found = shutil.which("chromium")
    if found is None:
        lacking = "chromium is not installed"
        assert os.environ.get("K2TRAIN_REQUIRE_CHROMIUM") != "1", lacking
        pytest.skip(lacking)
    return found


def open_page(path: Path, scratch: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM of a page after its scripts, and the lines of its console."""
    given = [chromium(), *QUIET, f"--user-data-dir={scratch}", *options, "--dump-dom"]
    done = subprocess.run(
        [*given, path.as_uri()], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
