"""Shared fixtures: one pool of gloo workers for the whole run, and small configs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import forkserver
from tests.support.gloo_pool import GlooPool

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("k2train", settings(), deadline=None)
settings.load_profile("k2train")
pytest_plugins = ["tests.support.distribution"]


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    """Workers that run jobs on a process group of any size up to 8."""
    made = GlooPool()
    yield made
    made.close()


def pytest_sessionfinish() -> None:
    """End what this test process has started for all of its tests."""
    forkserver.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[GlooPool]:
    """Workers that run this project's Triton kernels on a CPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    made = GlooPool(TRITON_INTERPRET="1")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test run under a launcher must not take its ranks for its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in os.environ:
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a config text to `c.yaml` and give its path."""

    def _write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write
