"""Error messages for recipes: one line per mistake, with the nearest valid value.

- The checks are those of pydantic and of the models. This module rewords them for a reader who
  knows neither.
- Alternatives considered: pydantic's own messages; they mention unions, tuples and finite numbers,
  and report one mistake several times.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

KeyPath = tuple[int | str, ...]

SHOWN_CHARACTERS = 80
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
    "tuple_type": "must be a list, such as [x]",
    "list_type": "must be a list, such as [x]",
    "dict_type": "must be a section of names, each with a value of its own",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}


class Contradiction(ValueError):
    """Raised by a model whose values contradict each other.

    `keys` are the paths of these values, relative to the model.
    """

    def __init__(self, message: str, *keys: KeyPath) -> None:
        super().__init__(message)
        self.keys = keys


class Problem(NamedTuple):
    """One mistake: key path, message, and paths that may have caused it, likeliest first."""

    path: KeyPath
    message: str
    causes: tuple[KeyPath, ...]


def problems_of(errors: Iterable[Mapping[str, Any]], root: type[BaseModel]) -> Iterator[Problem]:
    """Translate the errors of a pydantic ValidationError for the model `root`, each once."""
    found: dict[tuple[KeyPath, str], Problem] = {}
    for error in errors:
        path: KeyPath = tuple(error["loc"])
        # A default computed from a wrong value is not a mistake of its own.
        if not error["type"].startswith("default_factory"):
            keys = getattr(error.get("ctx", {}).get("error"), "keys", ())
            problem = Problem(path, _explain(error, root), (*((*path, *key) for key in keys), path))
            found.setdefault((path, problem.message), problem)
    yield from found.values()


def _explain(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Message of one pydantic error, without its location."""
    kind, path, context = error["type"], tuple(error["loc"]), error.get("ctx", {})
    value = show(error["input"])

    if kind == "extra_forbidden":
        allowed = allowed_keys(root, path[:-1])
        similar = nearest(str(path[-1]), allowed)
        return (
            f"unknown key; nearest is {similar}"
            if similar
            else f"unknown key; legal are {', '.join(allowed)}"
        )

    if kind == "missing":
        return (
            "missing; the list is too short"
            if isinstance(path[-1], int)
            else "missing; it has no default"
        )
    if kind == "value_error":
        return str(context["error"])

    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        similar = nearest(str(error["input"]), allowed)
        return f"{value} is not one of {', '.join(allowed)}" + (
            f"; nearest is {similar}" if similar else ""
        )

    if kind == "too_long":
        return f"must have {context['max_length']} values, has {context['actual_length']}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    # Limits of a number, which pydantic names in the context.
    for name, phrase in _RANGES:
        if name in context:
            return f"must be {phrase} {context[name]:g}, is {value}"

    if phrase := _WORDS.get(kind, ""):
        return f"{phrase}, is {value}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, is {value}"


def show(value: Any) -> str:
    """Format a value as a recipe spells it, truncated when it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def nearest(word: str, allowed: Sequence[str]) -> str | None:
    """Closest match of `word` among the allowed words; None when nothing is similar."""
    matches = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return matches[0] if matches else None


def allowed_keys(root: type[BaseModel], path: KeyPath) -> list[str]:
    """Names of the valid keys of the section at `path`."""
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
