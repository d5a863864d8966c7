"""One browser for all tests of the pages."""

from collections.abc import Iterator

import pytest

from tests.support.devtools import Page, browser


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found
