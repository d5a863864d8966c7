"""One SLURM for all tests of its jobs: everything is submitted at once, awaited at once, and judged
one by one.
"""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.support.scenarios import chosen, judged, side_by_side
from tests.support.slurm import Cluster, Nodes, why_not

PARTITIONS = {
    "main": Nodes(("m1", "m2"), processors=16, memory_mb=32000),
    "pair": Nodes(("p1", "p2")),
    # A job of these takes two whole nodes.
    "train": Nodes(tuple(f"t{number}" for number in range(1, 17))),
}
# A node that says nothing for 10 s is lost; a cancelled job has 120 s to save; an array has at
# most 5 tasks.
SETTINGS = "SlurmdTimeout=10\nKillWait=120\nSlurmctldTimeout=10\nMaxArraySize=5"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    lacking = why_not()
    if lacking:
        assert os.environ.get("K2TRAIN_REQUIRE_SLURM") != "1", lacking
        pytest.skip(lacking)
    with Cluster(PARTITIONS, settings=SETTINGS, requeue_seconds=60) as made:
        yield made


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of the scenarios that the chosen tests judge, and of those that these need."""
    modules: dict[str, ModuleType] = {
        item.module.__name__: item.module  # type: ignore[attr-defined]
        for item in request.session.items
        if {"outcome", "cluster"} <= set(getattr(item, "fixturenames", ()))
    }
    started = {}
    for module in modules.values():
        folder = tmp_path_factory.mktemp("slurm")
        names = chosen(request.session.items, module.SCENARIOS)
        needed = [name for name in module.NEEDED if names and name not in names]
        for name in [*needed, *names]:
            place = folder / name.replace(" ", "_")
            place.mkdir()
            started[name] = module.SCENARIOS[name](cluster, place)
    return side_by_side(started)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Any]) -> Any:
    """What the scenario came to that a test is parametrized with."""
    return judged(outcomes[request.param])
