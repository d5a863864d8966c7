"""Error messages for configs and recipes: pydantic's mistakes as sentences, with the right value.

- The checks are those of pydantic and of the models. This module rewords them for a reader who
  knows neither.
- Configs of runs and recipes of data share it, so both speak alike.

Alternatives considered:
- Pydantic's own messages: they mention unions, tuples and finite numbers, and report one mistake
  several times.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from k2train.config.values import show
from k2train.config.yaml_source import Path

_RANGES = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
_WORDS = {
    "path_type": "must be a path, such as data/web",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list, written [a, b]",
    "list_type": "must be a list, written [a, b]",
    "dict_type": "must be a section of names, each with a value of its own",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}


class Contradiction(ValueError):
    """Raised by a model whose values contradict each other.

    `keys` are the paths of these values, relative to the model.
    """

    def __init__(self, message: str, *keys: Path) -> None:
        super().__init__(message)
        self.keys = keys


class Problem(NamedTuple):
    """One mistake: pydantic's name of it, key path, message, and paths that may have caused it."""

    kind: str
    path: Path
    message: str
    causes: tuple[Path, ...]


def problems_of(error: ValidationError, unknown_key: Callable[[Path], str]) -> Iterator[Problem]:
    """Translate the mistakes of a pydantic error, each once; `unknown_key` words a wrong key."""
    found: dict[tuple[Path, str], Problem] = {}
    for item in error.errors(include_url=False):
        kind, path = item["type"], item["loc"]
        # A default computed from a wrong value is not a mistake of its own.
        if not kind.startswith("default_factory"):
            message = unknown_key(path) if kind == "extra_forbidden" else sentence(item)
            keys = getattr(item.get("ctx", {}).get("error"), "keys", ())
            causes = (*((*path, *key) for key in keys), path)
            found.setdefault((path, message), Problem(kind, path, message, causes))
    yield from found.values()


def sentence(item: Mapping[str, Any]) -> str:
    """Say what is wrong in one pydantic error and which value would be right; without the key."""
    kind, context, value = item["type"], item.get("ctx", {}), show(item["input"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        in_a_list = isinstance(item["loc"][-1], int)
        return f"missing; {'the list is too short' if in_a_list else 'it has no default'}"

    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", context["expected"])
        near = nearest(str(item["input"]).lower(), legal, 0.4)
        return f"{value} is not one of {', '.join(legal)}" + (
            f"; nearest is {near}" if near else ""
        )

    if kind == "too_long":
        return f"must have {context['max_length']} values, has {context['actual_length']}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    # Limits of a number, which pydantic names in the context.
    for name, phrase in _RANGES:
        if name in context:
            return f"must be {phrase} {context[name]:g}, is {value}"

    wanted = _WORDS.get(kind) or f"{item['msg'][:1].lower()}{item['msg'][1:]}"
    return f"{wanted}, is {value}"


def unknown(near: str | None, legal: Sequence[str]) -> str:
    """Say that a key is unknown, with the nearest legal one, else all of its section."""
    return "unknown key; " + (f"nearest is {near}" if near else f"legal are {', '.join(legal)}")


def legal_keys(root: type[BaseModel], path: Path) -> list[str]:
    """Names of the legal keys of the section at `path`."""
    section: Any = root
    for part in path:
        if not hasattr(section, "model_fields"):
            section = _section_type(section)
        elif part in section.model_fields:
            section = section.model_fields[part].annotation
            section = section if get_origin(section) is dict else _section_type(section)
    return list(section.model_fields)


def _section_type(annotation: Any) -> Any:
    """The section type within `dict[str, Section]` or `Section | None`."""
    return next(
        (inner for inner in get_args(annotation) if hasattr(inner, "model_fields")), annotation
    )


def nearest(word: str, legal: Sequence[str], cutoff: float = 0.5) -> str | None:
    """Return the legal word most similar to `word`; None when nothing is similar."""
    return next(iter(difflib.get_close_matches(word, legal, n=1, cutoff=cutoff)), None)
