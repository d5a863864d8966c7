"""Distribution of tests over pytest-xdist workers, and where their time goes (`scripts/test.sh
--durations`).

- A file's tests stay together, so that its fixtures are made once. Files of `TOGETHER` and of the
  folders of `ROOMS` share a worker and its fixtures.
- Files of `APART` have nothing to share: each of their tests goes to whichever worker is free.
- The longest units come first (`FIRST`) and the shortest last (`LAST`), so that no worker is alone
  at the end.
- No garbage is collected while tests are, and what they import is never looked at again.

Alternatives considered: `--dist load`, which makes every module fixture once a worker; `--dist
loadgroup`, which writes the group into every test's name.
"""

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

TOGETHER = {
    "tests/system/test_slurm_data.py": "slurm",
    "tests/system/test_slurm_train.py": "slurm",
    "tests/emulated_cuda/test_emulation.py": "emulated CUDA",
    "tests/emulated_cuda/test_engine.py": "emulated CUDA",
    "tests/emulated_cuda/test_trainer.py": "emulated CUDA",
    "tests/emulated_cuda/test_worlds.py": "emulated CUDA",
    "tests/tools/test_bench_gpu.py": "GPU parts",
    "tests/tools/test_gpu_check.py": "GPU parts",
}
"""Files with one cluster, one pool of emulated devices, or one dry run between them."""
ROOMS = (
    "tests/evaluation/",
    "tests/hf/",
    "tests/inference/",
    "tests/merge/",
    "tests/proofs/",
    "tests/release/",
)
"""Folders of which every file needs one trained run: other workers would train it again."""
APART = ("tests/laws/test_layout_law.py", "tests/system/test_mutations.py")
FIRST = (
    "slurm",
    "tests/laws/test_docs.py",
    "tests/system/test_fault_tests.py",
    "tests/watchdog/test_watchdog.py",
    "GPU parts",
    "emulated CUDA",
)
"""Units in which most of the time is waiting: what runs beside them has the processors. The last
one may wait for its CUDA build, which continuous integration installs meanwhile.
"""
LAST = ("tests/config/", "tests/guard/", "tests/plan/", "tests/record/", "tests/test_")
"""Units of a few seconds: with them the workers end together."""
SHOWN = 30


def unit_of(nodeid: str) -> str:
    """What is run by one worker in one go."""
    path = nodeid.split("::")[0]
    if path in APART:
        return nodeid
    room = next((room for room in ROOMS if path.startswith(room)), path)
    return TOGETHER.get(path, room)


def mechanism_of(item: pytest.Item) -> str:
    """What a test needs most, for the table of durations."""
    fixtures = getattr(item, "fixturenames", ())
    for name, mechanism in (
        ("cluster", "SLURM"),
        ("emulated", "emulated CUDA"),
        ("pool", "gloo pool"),
    ):
        if name in fixtures:
            return mechanism
    return "whole programs" if "/system/" in item.nodeid or "/tools/" in item.nodeid else "other"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without the garbage collector: a quarter of the time goes into what stays anyway."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the units of `FIRST` first, in its order, those of `LAST` last, and note every test's
    mechanism.
    """
    place = {unit: number for number, unit in enumerate(FIRST)}
    items.sort(
        key=lambda item: place.get(unit_of(item.nodeid), len(place) + item.nodeid.startswith(LAST))
    )
    for item in items:
        item.user_properties.append(("mechanism", mechanism_of(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule units in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)


def sums(reports: Sequence[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by file and by mechanism, set-up and tear-down included."""
    by_file: dict[str, float] = defaultdict(float)
    by_mechanism: dict[str, float] = defaultdict(float)
    for report in reports:
        by_file[report.nodeid.split("::")[0]] += report.duration
        by_mechanism[dict(report.user_properties).get("mechanism", "other")] += report.duration
    return by_file, by_mechanism


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """With `--durations`, the same by file and by mechanism."""
    if terminalreporter.config.option.durations is None:
        return
    reports = [
        report
        for found in terminalreporter.stats.values()
        for report in found
        if isinstance(report, pytest.TestReport)
    ]
    for title, seconds in zip(("file", "mechanism"), sums(reports), strict=True):
        terminalreporter.section(f"seconds by {title}")
        for name, spent in sorted(seconds.items(), key=lambda pair: -pair[1])[:SHOWN]:
            terminalreporter.write_line(f"{spent:8.1f}s  {name}")
