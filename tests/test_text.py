"""Text formatting: bytes and durations in one system of units, none a thousand times off."""

from k2train.text import bytes_text, duration


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
