"""Text formatting: bytes and durations in one system of units, none a thousand times off."""

from k2train import text
from k2train.text import (
    bytes_text,
    duration,
    markdown_table,
    number,
    tokens_text,
)


def test_cells_of_a_record() -> None:
    """Catches a number without its commas, a name that moves the cursor, and unknown shown as 0."""
    record = {"tokens": 1204, "name": "a\x1b[2Jb", "repeat": None, "none": 0}
    shown = text.cells(record, "name", "tokens", "none", "repeat")
    assert shown == ["a\\x1b[2Jb", "1,204", "0", "-"]


def test_bytes_are_binary() -> None:
    """Catches a unit that is 1,000 where 1,024 is meant, and one that is a step off."""
    sizes = (0, 17, 1023, 2048, 3 * 2**20, 5 * 2**29, 1536 * 2**30, 3.5 * 2**40)
    assert [bytes_text(size) for size in sizes] == [
        "0 B",
        "17 B",
        "1023 B",
        "2.00 KiB",
        "3.00 MiB",
        "2.50 GiB",
        "1.50 TiB",
        "3.50 TiB",
    ]


def test_durations_read_well() -> None:
    """Catches minutes shown as hours, and a second that is cut off instead of rounded up."""
    assert [duration(seconds) for seconds in (0.2, 59, 80, 7500, 273600)] == [
        "1s",
        "59s",
        "1m20s",
        "2h05m",
        "3d04h",
    ]


def test_numbers_of_tokens_fit_their_size() -> None:
    """Catches 0.000B for what is small, and seven digits for what is large."""
    assert [tokens_text(count) for count in (0, 812, 999.6, 65_536, 40_300_000, 1_295.7e9)] == [
        "0",
        "812",
        "1.0K",
        "65.5K",
        "40.3M",
        "1,295.7B",
    ]


def test_numbers_have_separators_and_none_is_a_dash() -> None:
    """Catches a large whole number that loses digits, and an unknown one shown as zero."""
    found = [number(2**63 + 1), number(1234.56, 1), number(0, 0), number(None), number(None, 2)]
    assert found == ["9,223,372,036,854,775,809", "1,234.6", "0", "-", "-"]


def test_a_cell_cannot_break_a_markdown_table() -> None:
    """Catches a cell with a bar or a new line, which would begin another one."""
    assert markdown_table(["what", "n"], [["a | b", "1"], ["c\nd", "2"]], numbers=True) == [
        "| what | n |",
        "|---|---:|",
        r"| a \| b | 1 |",
        "| c d | 2 |",
    ]
    assert markdown_table(["what", "n"], []) == ["| what | n |", "|---|---|"]
