"""Tables of the report: one that another can change."""

from dataclasses import FrozenInstanceError

import pytest

from k2train.report.table import Table


def test_a_table_stays_as_it_was_made() -> None:
    """Catches a table that the page changes while it is written."""
    made = Table("Time", ("start",), [("1",)])
    assert made.note == ""
    with pytest.raises(FrozenInstanceError):
        made.title = "Energy"  # type: ignore[misc]
