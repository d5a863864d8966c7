"""What is wrong in a recipe, in the words of the recipe: one line for each mistake, with the nearest right value.

The checks are pydantic's and the models' own; this says them again for someone who has never heard of either. Handing
on pydantic's messages was refused: they speak of unions, tuples and finite numbers, and of one mistake several times.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

Place = tuple[int | str, ...]

SHOWN_CHARACTERS = 80
_RANGES = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
_WORDS = {
    "path_type": "must be a path, as data/web",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list, as [x]",
    "list_type": "must be a list, as [x]",
    "dict_type": "must be a section of names, each with a value of its own",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}


class Contradiction(ValueError):
    """Raised by a model whose values do not go together: `keys` are the places of these values, seen from the model."""

    def __init__(self, message: str, *keys: Place) -> None:
        super().__init__(message)
        self.keys = keys


class Wrong(NamedTuple):
    """A mistake: where, what, and the places that may have caused it, the likeliest first."""

    place: Place
    message: str
    causes: tuple[Place, ...]


def wrongs(errors: Iterable[Mapping[str, Any]], root: type[BaseModel]) -> Iterator[Wrong]:
    """The errors of a pydantic ValidationError for the model `root`, each once."""
    found: dict[tuple[Place, str], Wrong] = {}
    for error in errors:
        place: Place = tuple(error["loc"])
        # A default that follows a wrong value is no mistake of its own.
        if not error["type"].startswith("default_factory"):
            keys = getattr(error.get("ctx", {}).get("error"), "keys", ())
            wrong = Wrong(place, _explain(error, root), (*((*place, *key) for key in keys), place))
            found.setdefault((place, wrong.message), wrong)
    yield from found.values()


def _explain(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    kind, place, context = error["type"], tuple(error["loc"]), error.get("ctx", {})
    value = show(error["input"])
    if kind == "extra_forbidden":
        legal = keys_at(root, place[:-1])
        near = nearest(str(place[-1]), legal)
        return (
            f"unknown key; nearest is {near}"
            if near
            else f"unknown key; legal are {', '.join(legal)}"
        )
    if kind == "missing":
        return (
            "missing; the list is too short"
            if isinstance(place[-1], int)
            else "missing; it has no default"
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", context["expected"])
        near = nearest(str(error["input"]), legal)
        return f"{value} is not one of {', '.join(legal)}" + (
            f"; nearest is {near}" if near else ""
        )
    if kind == "too_long":
        return f"must have {context['max_length']} values, has {context['actual_length']}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    for name, words in _RANGES:
        if name in context:
            return f"must be {words} {context[name]:g}, is {value}"
    if words := _WORDS.get(kind, ""):
        return f"{words}, is {value}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, is {value}"


def show(value: Any) -> str:
    """A value as a recipe spells it, cut short when it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def nearest(word: str, legal: Sequence[str]) -> str | None:
    """The one of the legal words that was most likely meant."""
    near = difflib.get_close_matches(word, legal, n=1, cutoff=0.5)
    return near[0] if near else None


def keys_at(root: type[BaseModel], place: Place) -> list[str]:
    """The legal keys of the section at `place`."""
    kind: Any = root
    for part in place:
        if not hasattr(kind, "model_fields"):
            kind = _section_in(kind)
        elif part in kind.model_fields:
            kind = kind.model_fields[part].annotation
            kind = kind if get_origin(kind) is dict else _section_in(kind)
    return list(kind.model_fields)


def _section_in(kind: Any) -> Any:
    """Of `dict[str, Section]` and `Section | None` the section."""
    return next((inner for inner in get_args(kind) if hasattr(inner, "model_fields")), kind)
