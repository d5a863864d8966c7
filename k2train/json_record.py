"""JSON records: frozen pydantic models of files from elsewhere, a mistake as one plain line.

- No value is converted: a hand-edited number in quotes is a mistake, and so is `true` for 1.
- A message never prints what a file holds on a second line.
- The manifests of data folders and of checkpoints speak alike. YAML of people has
  `config/messages`, which reports every mistake.

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
    "list": "a list",
    "int": "a whole number",
    "dict": "an object",
    "model": "an object",
    "dataclass": "an object",
    "string": "text",
    "float": "a number",
    "bool": "true or false",
}
"""What a value must be, by the beginning of pydantic's name of the mistake."""


def first_mistake(error: ValidationError) -> str:
    """Describe the first mistake: the object, its key, what it must be and what it is."""
    mistake = error.errors(include_url=False)[0]
    kind, value = mistake["type"], repr(mistake["input"])[:60]

    place = mistake["loc"]
    if "[key]" in place:
        # The key itself is wrong; its message names it.
        place = place[: place.index("[key]") - 1]
    # A damaged file may have any keys: what does not fit on one printed line is escaped.
    parts = [p if isinstance(p, int) or p.isprintable() else ascii(p)[1:-1] for p in place]
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
    """Base of all that is read from such a file; immutable, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def parse(cls, content: Any) -> Self:
        """Validate a value read from JSON. Raises ValueError with its first mistake on one line."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(first_mistake(error)) from None
