"""Scalars of YAML: read by the rules of YAML 1.2, written so that YAML 1.1 readers agree.

- `1e-4`, `3e6` and `1_000` are numbers, only `true` and `false` are booleans, `no`, `on` and
  `12:30` are text.
"""

import re
from typing import Any

import yaml

MAX_NUMBER_CHARACTERS = 40

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*")
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelling: value
    for word, value in (("true", True), ("false", False))
    for spelling in (word, word.title(), word.upper())
}
_YAML_11 = yaml.resolver.Resolver()
_YAML_11_TEXT = "tag:yaml.org,2002:str"


def parse_scalar(text: str) -> bool | int | float | str | None:
    """Return the value of an unquoted YAML 1.2 scalar.

    Anything else stays text (`012`, `no`, `.nan`, `0x10`).
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]

    # Bounded, because Python raises an error of its own for thousands of digits.
    if len(text) <= MAX_NUMBER_CHARACTERS:
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text


def format_value(value: Any) -> str:
    """Format a value as one line of YAML that YAML 1.2 and 1.1 readers read back equal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 readers take 1e-05 for text: they want a dot in the mantissa.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        inner = (f"{format_value(key)}: {format_value(item)}" for key, item in value.items())
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_value(item) for item in value) + "]"

    # Unquoted only if YAML 1.2 and 1.1 both read it back as this text.
    plain = _PLAIN_TEXT.fullmatch(value) and parse_scalar(value) == value
    if plain and _YAML_11.resolve(yaml.ScalarNode, value, (True, False)) == _YAML_11_TEXT:
        return str(value)
    return str(yaml.safe_dump(value, default_style='"', width=10**9)).strip()
