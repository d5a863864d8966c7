"""JSON values as the typed fields of a dataclass, strictly: another type is refused.

- Knows what records hold: numbers, text, optional values, tuples, dataclasses inside.

Alternatives considered:
- pydantic: its strict mode refuses lists for tuples, its lax mode rewrites values.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from k2train.record.jsonl import NON_FINITE


def field_values(kind: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields. Raises ValueError for one that is missing or of no use."""
    required = [key.name for key in fields(kind) if key.default is key.default_factory is MISSING]
    if missing := [key for key in required if key not in facts]:
        raise ValueError(f"has no {', '.join(missing)}")
    return {
        key.name: field_value(key.type, facts[key.name], key.name)
        for key in fields(kind)
        if key.name in facts
    }


def field_value(kind: Any, value: Any, key: str) -> Any:
    """Return a JSON value as a field of type `kind`. Raises ValueError for another type."""
    if isinstance(kind, UnionType):
        for option in get_args(kind):
            with suppress(ValueError):
                return field_value(option, value, key)
    elif get_origin(kind) is tuple and type(value) is list:
        of, *more = get_args(kind)
        if more == [...] or len(value) == 1 + len(more):
            return tuple(field_value(of, item, key) for item in value)
    elif is_dataclass(kind) and isinstance(kind, type) and type(value) is dict:
        return kind(**field_values(kind, value))
    elif kind is float and type(value) is str and value in NON_FINITE:
        return NON_FINITE[value]
    elif type(value) is int:
        # Counts, steps and tokens; larger numbers would overflow in their readers.
        if kind in (int, float) and 0 <= value < 2**63:
            return value
    elif type(value) is (get_origin(kind) or kind):
        return value

    shown = type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.60}"
    raise ValueError(f"has {shown} as {key}")
