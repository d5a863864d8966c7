"""Shared fixtures: one pool of gloo workers for the whole run, and small configs."""

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support import forkserver, large_values, left_behind
from tests.support.gloo_pool import GlooPool

# That a test fails is known from one example: the smallest is for people, and takes long.
SMALLEST = os.environ.get("TEST_SMALLEST_EXAMPLE", "1") == "1"
# How long an example takes says how busy the machine is, not whether the code is right.
# The examples are the same everywhere: where the variable CI is set, hypothesis has other defaults.
settings.register_profile(
    "k2train",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    database=None,
    print_blob=True,
    phases=[one for one in Phase if SMALLEST or one not in (Phase.shrink, Phase.explain)],
    report_multiple_bugs=SMALLEST,
)
settings.load_profile("k2train")
pytest_plugins = ["tests.support.distribution"]
# pytest shows differences whole in continuous integration, and so it does everywhere.
os.environ.setdefault("CI", "true")
# A thousand processes import the same files, and compiling them takes a third of that.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


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


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(
    op: str, left: object, right: object
) -> Generator[None, list[object], list[object]]:
    """Say in a line where large values differ."""
    explained = large_values.difference(left, right) if op == "==" else None
    if explained is None:
        return (yield)
    # pytest compares them as well, and a wrapper cannot keep it from that.
    with mock.patch("difflib.ndiff", return_value=()):
        yield
    return [explained]


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Put back what a test has changed for those after it, and warn of it with the test's name.

    It is set up before all that a test changes, and looks when that is undone.
    """
    before = left_behind.State()
    yield
    for line in before.put_back():
        warnings.warn(f"left behind: {line}", stacklevel=1)


@pytest.fixture(autouse=True)
def no_launcher_variables(leaves_nothing_behind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test run under a launcher must not take its ranks for its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in os.environ:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="module")
def import_path_is_left_whole() -> Iterator[None]:
    """A program called in this process must not take folders off the tests' own import path."""
    before = list(sys.path)
    yield
    assert [place for place in before if place not in sys.path] == []


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a config text to `c.yaml` and give its path."""

    def _write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write
