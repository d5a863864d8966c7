"""Keys of a document's fields in a recipe: text keys, nested keys, and conditions on fields.

- `meta.body` names the field `body` inside of `meta`. A field whose own name has the dot comes
  first.
- A condition keeps the documents whose field has one of the listed values.

Alternatives considered:
- An expression language (`jq`): one more thing to learn, and a recipe could then compute its text.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

_NO_SCALAR = ("a list or an object",)


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | bool | int | float) or value is None else value


def _check_scalars(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        if not (isinstance(value, str | bool | int | float) or value is None):
            raise ValueError("must list texts, numbers, true, false or null")
    return values


TextKeys = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_as_list),
    # One key is written as it always was, so the identity of old recipes stays.
    PlainSerializer(lambda keys: keys[0] if len(keys) == 1 else list(keys)),
]
"""Keys of the text: one, or several of which the first counts whose text is not blank."""

Values = Annotated[
    tuple[Any, ...],
    Field(min_length=1),
    BeforeValidator(_as_list),
    AfterValidator(_check_scalars),
]
Conditions = dict[str, Values]
"""Key of a field -> the values of which it must have one."""


def field_value(record: Mapping[str, Any], key: str) -> Any:
    """The value of a field, which may be nested; None when there is none."""
    if key in record or "." not in key:
        return record.get(key)
    # The longest outer name first: `a.b.c` may be `c` inside of a field `a.b`.
    outer = key
    while "." in outer:
        outer, _, _ = outer.rpartition(".")
        inside = record.get(outer)
        if isinstance(inside, Mapping):
            return field_value(inside, key[len(outer) + 1 :])
    return None


def text_value(values: Sequence[Any]) -> Any:
    """The first text that is not blank; else the first text, then the first value that is there."""
    if len(values) == 1:
        return values[0]
    present = [value for value in values if value is not None]
    texts = [value for value in present if isinstance(value, str)]
    # Some exports fill the field that a record does not use with an empty text.
    written = (text for text in texts if text.strip())
    return next(written, next(iter((*texts, *present)), None))


def comparable(value: Any) -> Any:
    """A value to compare conditions by: 1 and 1.0 are equal, 1 and true are not."""
    if value is None:
        return None
    if not isinstance(value, str | bool | int | float):
        # Lists and objects: no condition can name them.
        return _NO_SCALAR
    return (isinstance(value, bool), value)


class Matcher:
    """Conditions, ready to be tested on the values of `fields` of one document after another."""

    def __init__(self, where: Mapping[str, Sequence[Any]], fields: Sequence[str]) -> None:
        self._wanted = [
            (fields.index(key), frozenset(map(comparable, values))) for key, values in where.items()
        ]

    def matches(self, values: Sequence[Any]) -> bool:
        """Whether each field that has a condition holds one of its values."""
        return all(comparable(values[index]) in wanted for index, wanted in self._wanted)


def named(keys: Sequence[str]) -> str:
    """Format keys as `'a' or 'b'`."""
    return " or ".join(map(repr, keys))
