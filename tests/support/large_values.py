"""What pytest says of two large values that differ: where, in a line.

With -v, and on continuous integration always, it compares them line by line, in quadratic time: for
some megabytes longer than a test's own limit.
"""

from itertools import zip_longest

SHORT = 20_000
"""Characters of what pytest may compare itself."""


def difference(left: object, right: object) -> list[str] | None:
    """The first difference of two large values; None for those that pytest shows itself."""
    if type(left) is not type(right) or not isinstance(left, list | tuple | dict | str | bytes):
        return None
    written = repr(left), repr(right)
    if max(map(len, written)) <= SHORT:
        return None

    pairs = enumerate(zip_longest(*written))
    at = next((index for index, (one, other) in pairs if one != other), 0)
    pieces = [text[max(0, at - 40) : at + 40] for text in written]
    return [f"two large {type(left).__name__}s differ", f"at character {at} of {pieces}"]
