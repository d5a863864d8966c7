"""JSON records: nothing is converted, and a mistake is one line with place, key and value."""

from typing import Any

import pytest
from pydantic import ConfigDict, Field

from k2train.json_record import Count, Number, Positive, Record, Text, Whole


class Part(Record):
    name: Text
    share: Number = 1


class Top(Record):
    rows: Positive = 1
    seed: Whole = 0
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Count] = Field(default_factory=dict)
    other: Part | None = None


class Kept(Record):
    model_config = ConfigDict(extra="allow")
    rows: Count = 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object, is []"),
        ({"rows": "10"}, "key 'rows' must be a whole number above 0, is '10'"),
        ({"rows": 0}, "key 'rows' must be a whole number above 0, is 0"),
        ({"rows": True}, "key 'rows' must be a whole number above 0, is True"),
        ({"seed": 1.0}, "key 'seed' must be a whole number, is 1.0"),
        ({"parts": {}}, "key 'parts' must be a list, is {}"),
        ({"parts": [3]}, "parts[0]: must be an object, is 3"),
        ({"parts": [{"name": "a"}, {}]}, "parts[1]: key 'name' is missing"),
        ({"parts": [{"name": "a\nb"}]}, r"parts[0]: key 'name' must be text, is 'a\nb'"),
        ({"parts": [{"name": "a" * 513}]}, f"parts[0]: key 'name' must be text, is '{'a' * 59}"),
        ({"other": {"name": "a", "share": "1"}}, "other: key 'share' must be a number, is '1'"),
        ({"by_name": {"a": -1}}, "by_name: key 'a' must be a whole number from 0, is -1"),
        (
            {"by_name": {"a\nok": None}},
            r"by_name: key 'a\nok' must be a whole number from 0, is N",
        ),
        (
            {"by_name": {"\ud800": 1.5}},
            "by_name: key '",
        ),
    ],
)
def test_a_mistake_is_one_line(content: Any, message: str) -> None:
    """Catches a converted value, and text of the file that breaks or floods the line."""
    with pytest.raises(ValueError) as refused:
        Top.parse(content)
    assert str(refused.value).startswith(message) and len(str(refused.value)) < 160
    assert str(refused.value).isprintable()


def test_what_is_right_is_kept() -> None:
    """Catches a number that changes its type, and a key that a later version added and loses."""
    record = Top.parse({"parts": [{"name": "a", "share": 1}], "later": 1})
    assert record == Top(parts=(Part(name="a"),)) and type(record.parts[0].share) is int
    assert Kept.parse({"later": [1]}).model_dump(exclude_unset=True) == {"later": [1]}
