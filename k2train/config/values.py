"""Values of config keys: types whose check says what to write instead.

- A function checks each value before pydantic sees it. Pydantic alone accepts `true` for 1 and
  `.nan` for a number, and rejects `1e12` for an integer.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from k2train.config.scalars import format_value, parse_scalar
from k2train.expectation import parse_expectation

N = TypeVar("N", int, float)
MAX_WHOLE = 2**53
"""Largest whole number: above it a float cannot represent every one, `1e16` could mean another."""


def show(value: Any) -> str:
    """Format a value for a message: as YAML, on one line, cut when long."""
    if isinstance(value, (dict, list, tuple)):
        return "a section" if isinstance(value, dict) else "a list"
    text = (
        format_value(value)
        if isinstance(value, (type(None), bool, int, float, str))
        else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong(wanted: str, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"must be {wanted}, is {show(value)}{hint}")


def _number(value: Any) -> float:
    number = parse_scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise _wrong("a number", value)
    if not math.isfinite(number) or abs(number) > 1e300:
        raise _wrong("a finite number", value)
    return float(number)


def _whole(value: Any) -> int:
    number = parse_scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number // 1:
        raise _wrong("a whole number", value)
    if abs(number) > MAX_WHOLE:
        raise _wrong(f"at most {MAX_WHOLE}", value)
    return int(number)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong("true or false", value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        hint = f'; quote it: "{value}"' if isinstance(value, (int, float)) else ""
        raise _wrong("text", value, hint)

    # Text ends up in paths, one-line messages and logs, which a newline would break.
    if not value.strip() or not value.isprintable():
        raise _wrong("printable text on one line", value)
    return value


def _expectation(value: Any) -> str:
    return parse_expectation(_text(value)).text


def _run_name(value: Any) -> str:
    name = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) or name in (".", ".."):
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:128]
        raise ValueError(
            f"must be one path component of letters, digits, '.', '_' and '-', is {show(value)}"
            + (f"; nearest is {near}" if near else "")
        )
    return name


def _resume(value: Any) -> str | int:
    return _word_or_number(value, ("auto", "must", "never"), _whole, "a checkpoint's number")


def _interval(value: Any) -> str | float:
    return _word_or_number(value, ("auto",), _number, "a number of seconds")


def _switch(value: Any) -> str | bool:
    try:
        return "auto" if value == "auto" else _flag(value)
    except ValueError:
        raise _wrong("true, false or auto", value) from None


def _kept(value: Any) -> str | int:
    return _word_or_number(value, ("all",), _whole, "a number of checkpoints")


def _ranks(value: Any) -> str | int:
    return _word_or_number(value, ("all",), _whole, "the number of a rank")


def _named_paths(value: Any) -> Any:
    """Names with a path each; an empty section, read as null, has none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("a section of names, each with the path of a manifest", value)
    for name in value:
        if name == "held_out" or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(name)):
            raise ValueError(
                f"{show(name)} is no name for a set: use letters, digits, '_' and '-', and not "
                "held_out, which is the set of data.manifest"
            )
    return value


def _word_or_number(
    value: Any, words: Sequence[str], number_of: Callable[[Any], N], what: str
) -> str | N:
    """One of the words, or a number from 0."""
    if value in words:
        return str(value)
    try:
        number = number_of(value)
    except ValueError:
        number = None
    if number is None or number < 0:
        raise _wrong(f"{', '.join(words)} or {what} from 0", value)
    return number


def _chunk(value: Any) -> str | int:
    if isinstance(value, str):
        return _text(value)
    number = _whole(value)
    if number < 0:
        raise _wrong("a chunk's name or its number from 0", value)
    return number


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Amount = Annotated[float, BeforeValidator(_number), Field(ge=0)]
PositiveAmount = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Factor = Annotated[float, BeforeValidator(_number), Field(ge=1)]
Beta = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Switch = Annotated[Literal["auto"] | bool, BeforeValidator(_switch)]
Text = Annotated[str, BeforeValidator(_text)]
Expected = Annotated[str, BeforeValidator(_expectation)]
NamedPaths = Annotated[dict[str, Text], BeforeValidator(_named_paths)]
RunName = Annotated[str, BeforeValidator(_run_name)]
Resume = Annotated[Literal["auto", "must", "never"] | int, BeforeValidator(_resume)]
Interval = Annotated[Literal["auto"] | float, BeforeValidator(_interval)]
Kept = Annotated[Literal["all"] | int, BeforeValidator(_kept)]
Ranks = Annotated[Literal["all"] | int, BeforeValidator(_ranks)]
Length = Annotated[int, BeforeValidator(_whole), Field(ge=2)]
Chunk = Annotated[str | int, BeforeValidator(_chunk)]
Policy = Literal["alert", "skip_step", "rollback_and_defer", "stop"]
