"""One tiny trained run for all tests of the room."""

from pathlib import Path

import pytest

from k2train.inference.source import Source
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_generation import tiny_run, tiny_source


@pytest.fixture(scope="session")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="session")
def source(run: Path) -> Source:
    return tiny_source(run)
