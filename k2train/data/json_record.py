"""Base of a data folder's JSON records: frozen pydantic models, mistakes as one plain line.

- No value is converted: a hand-edited number in quotes is a mistake, and so is `true` for 1.
- The files come from elsewhere. A message therefore never prints what they hold on a second line.

Alternatives considered:
- Pydantic's own constraints: their messages depend on which of a value's bounds is broken, and
  speak of inputs and tuples.
"""

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

MAX_TEXT = 512


def _must_be(words: str, is_right: Callable[[Any], bool]) -> PlainValidator:
    """Check a value without converting it; `words` say what it must be."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(f"must be {words}, is {repr(value)[:60]}")
        return value

    return PlainValidator(check)


def _is_text(value: Any) -> bool:
    # Text that does not fit on one printed line would break every message that names it.
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


Text = Annotated[str, _must_be("text", _is_text)]
# A truth value of JSON is an int in Python.
Whole = Annotated[int, _must_be("a whole number", lambda n: type(n) is int)]
Count = Annotated[int, _must_be("a whole number from 0", lambda n: type(n) is int and n >= 0)]
Positive = Annotated[int, _must_be("a whole number above 0", lambda n: type(n) is int and n > 0)]
Number = Annotated[int | float, _must_be("a number", lambda n: type(n) in (int, float))]


_MUST_BE = {
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "string": "text",
    "float": "a number",
    "bool": "true or false",
}
"""What a value must be, by the beginning of pydantic's name of the mistake."""


def _explain(error: ValidationError) -> str:
    """Describe the first mistake: the object, its key, what it must be and what it is."""
    mistake = error.errors(include_url=False)[0]
    kind, value = mistake["type"], repr(mistake["input"])[:60]

    # A damaged file may have any keys: what does not fit on one printed line is escaped.
    parts = [p if isinstance(p, int) or p.isprintable() else ascii(p)[1:-1] for p in mistake["loc"]]
    names = [f"[{part}]" if isinstance(part, int) else f".{part:.60}" for part in parts]
    key = names.pop().removeprefix(".") if parts and isinstance(parts[-1], str) else ""
    where = "".join(names).removeprefix(".")
    subject = (f"{where}: " if where else "") + (f"key '{key}' " if key else "")

    if kind == "missing":
        return f"{subject}is missing"
    if kind == "value_error":
        return f"{subject}{mistake['ctx']['error']}"
    wanted = _MUST_BE.get(kind.split("_")[0])
    return f"{subject}must be {wanted}, is {value}" if wanted else f"{subject}{mistake['msg']}"


class Record(BaseModel):
    """Base of all that is read from a data folder's JSON; immutable, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def parse(cls, content: Any) -> Self:
        """Validate a value read from JSON. Raises ValueError with its first mistake on one line."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(_explain(error)) from None
