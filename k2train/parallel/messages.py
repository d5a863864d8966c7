"""Messages between ranks: typed values as JSON bytes, and errors of a closed list of kinds.

- torch sends objects as pickles, and a pickle from a socket is a program. JSON is only data.
- A form (pydantic's TypeAdapter) converts a value to JSON types and back: tuples stay tuples,
  numbers keep every bit.
- JSON has no NaN. A float that is not finite travels as text, which its form turns back.
- An error travels as the name of its kind and its text.

Alternatives considered:
- The types in the message, beside each value: a sender could then choose what a receiver makes.
"""

import json
import math
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from k2train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunError,
    UnavailableError,
    UserError,
)
from k2train.safe_json import parse_json

T = TypeVar("T")

MAX_BYTES = 2**26
"""Limit of one rank's message, far above the facts of its shards."""
MAX_TEXT = 2**16
"""Limit of an error's text, in characters."""

FLAG = TypeAdapter(bool)
TEXT = TypeAdapter(str)
TEXTS = TypeAdapter(list[str])


class MessageError(RuntimeError):
    """A message is too long or has not the form that was agreed on: a mistake of this package."""


class SaveError(RuntimeError):
    """A checkpoint could not be saved.

    Raised on every rank alike; earlier checkpoints are untouched.
    """


class DiskRefused(SaveError):
    """The disk refused the write. The partial files are useless, but a later save may succeed."""


KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(UserError, ConfigError, DataError, CheckpointError, RunError),
        *(UnavailableError, SaveError, DiskRefused),
    )
}
"""Errors that a rank makes again from another's message."""


class ErrorFacts(NamedTuple):
    """An error as it travels: kind, text, and the error number of an UnavailableError."""

    kind: str
    text: str
    number: int = 0

    @classmethod
    def of(cls, error: Exception) -> "ErrorFacts":
        """Facts of an error; of a kind that is not in the list, its nearest base is named."""
        names = (kind.__name__ for kind in type(error).__mro__)
        kind = next((name for name in names if name in KINDS), SaveError.__name__)
        number = error.number if isinstance(error, UnavailableError) else 0
        return cls(kind, str(error)[:MAX_TEXT], number)

    def error(self) -> Exception:
        """Make the error again; a kind that is not in the list becomes a SaveError."""
        if self.kind == UnavailableError.__name__:
            return UnavailableError(self.text, self.number)
        return KINDS.get(self.kind, SaveError)(self.text)


PROBLEM: TypeAdapter[ErrorFacts | None] = TypeAdapter(ErrorFacts | None)


def encode(value: T, form: TypeAdapter[T]) -> bytes:
    """Return the JSON of `value`; nothing at all for None.

    Raises MessageError when it is not of that form.
    """
    if value is None:
        return b""
    try:
        tree = form.dump_python(value, mode="json", warnings="error")
        return json.dumps(_finite(tree), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise MessageError(f"a value that cannot be sent to other ranks: {error}") from None


def decode(content: bytes, form: TypeAdapter[T]) -> T:
    """Return the value in a message. Raises MessageError when it is not of that form."""
    try:
        return form.validate_python(parse_json(content) if content else None)
    except (ValidationError, ValueError) as error:
        raise MessageError(f"a message of another form: {' '.join(str(error).split())}") from None


def _finite(tree: Any) -> Any:
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return tree
