"""One tiny trained run and its tasks for all tests of the room."""

from pathlib import Path

import pytest

from tests.support.gloo_pool import GlooPool
from tests.support.scored import local_tasks, scored_run


@pytest.fixture(scope="session")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(pool, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks(tmp_path_factory.mktemp("tasks"))
