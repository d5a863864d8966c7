"""Write the tables of all config and recipe keys into the documents, and the preset configs.

    python tools/config_reference.py [--check]

- Replaces everything between `<!-- keys: SECTION -->` and `<!-- end of keys -->` in `docs/*.md`.
- Type, bounds and default come from the schema, the unit from the key's name.
- The meaning of a config key is its comment in `configs/demo/stage1.yaml`.
- The meaning of a recipe key is in `tools/config_meanings.py`.
- `configs/presets/*.yaml` are written from that file and `tools/config_presets.py`.
- `--check` writes nothing and names the files that are out of date.

Exit codes: 0 done; 1 a file is out of date (`--check`); 2 a key without a meaning.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from command_line import Parser, command
from config_meanings import FOLLOWING, RECIPE_MEANINGS, RECIPES, SUFFIXES, UNITS
from config_presets import PRESETS, preset_text
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from k2train.config.scalars import format_value
from k2train.config.schema import Config, sections
from k2train.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from k2train.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "configs" / "demo" / "stage1.yaml"
PRESET_FOLDER = ROOT / "configs" / "presets"
BLOCK = re.compile(
    r"^<!-- keys: (\w[\w. ]*) -->\n.*?^<!-- end of keys -->\n", re.MULTILINE | re.DOTALL
)


def tables(example: str) -> dict[str, str]:
    """The Markdown table of every section and of every part of a recipe.

    Raises KeyError for a key without a meaning.
    """
    comments = _comments(example)
    found = {}
    for section, kind in sections().items():
        fields = {section: Config.model_fields[section]} if kind is None else kind.model_fields
        prefix = "" if kind is None else f"{section}."
        found[section] = _table(section, fields, {key: comments[prefix + key] for key in fields})
    for name, recipe in RECIPES.items():
        found[name] = _table(name, recipe.model_fields, RECIPE_MEANINGS[name])
    return found


def with_tables(document: str, found: Mapping[str, str]) -> str:
    """The document with every block of keys replaced."""
    return BLOCK.sub(
        lambda block: f"<!-- keys: {block[1]} -->\n{found[block[1]]}\n<!-- end of keys -->\n",
        document,
    )


def _comments(example: str) -> dict[str, str]:
    """Dotted key -> the comment beside it in a YAML file of two levels."""
    found, section = {}, ""
    for line in example.splitlines():
        written = re.match(r"( *)(\w+):.*?(?:  # (.*))?$", line)
        if written is None:
            continue
        indent, key, comment = written.groups()
        section = section if indent else key
        if comment:
            found[f"{section}.{key}" if indent else key] = comment
    return found


def _table(section: str, fields: Mapping[str, FieldInfo], meanings: Mapping[str, str]) -> str:
    rows = (
        (
            f"`{key}`",
            _type(field),
            _default(key, field),
            _unit(section, key),
            _without_choices(meanings[key], field),
        )
        for key, field in fields.items()
    )
    return "\n".join(markdown_table(("key", "type", "default", "unit", "meaning"), rows))


def _without_choices(meaning: str, field: FieldInfo) -> str:
    """The meaning without the list of values in front of it, which the type shows."""
    choices, colon, rest = meaning.partition(": ")
    return rest if colon and choices.split(" | ") == list(_values(field.annotation)) else meaning


def _type(field: FieldInfo) -> str:
    bounds = [bound for item in field.metadata for bound in _bounds(item)]
    # A value that is made a list may be written without the brackets.
    single = get_origin(field.annotation) is tuple and any(
        isinstance(item, BeforeValidator) for item in field.metadata
    )
    return " ".join([*(["text or"] if single else []), _name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    """A type in words: `whole number`, `text`, or the values to choose from."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in _values(annotation))
    if origin in (Union, UnionType):
        return " or ".join("`null`" if part is NoneType else _name(part) for part in arguments)
    if origin is tuple:
        return (
            f"list of {_name(arguments[0])}"
            if arguments[-1] is Ellipsis
            else f"two of {_name(arguments[0])}"
        )
    if origin is dict:
        if _name(arguments[1]) == "text":
            return "mapping"
        return "mapping of " + (
            "lists" if get_origin(_plain(arguments[1])) is tuple else "sections"
        )
    if hasattr(annotation, "__metadata__"):
        bounds = [bound for item in annotation.__metadata__ for bound in _bounds(item)]
        return " ".join([_name(annotation.__origin__), *bounds])
    names = {
        int: "whole number",
        float: "number",
        bool: "`true`, `false`",
        str: "text",
        Path: "path",
    }
    return names.get(annotation, "section")


def _plain(annotation: Any) -> Any:
    """A type without its notes."""
    return getattr(annotation, "__origin__", annotation) if _noted(annotation) else annotation


def _noted(annotation: Any) -> bool:
    return hasattr(annotation, "__metadata__")


def _values(annotation: Any) -> Iterator[str]:
    for value in get_args(annotation):
        if get_origin(value) is Literal:
            yield from _values(value)
        else:
            yield str(value)


def _bounds(item: Any) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for part in (item, *getattr(item, "metadata", ())):
        for name, sign in signs.items():
            bound = getattr(part, name, None)
            if isinstance(bound, (int, float)):
                yield f"{sign} {bound:g}"


def _default(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if key in FOLLOWING or field.default_factory is not None:
        return FOLLOWING[key]
    if isinstance(field.default, BaseModel):
        return "see below"
    plain = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(plain, list) and len(plain) > 2:
        return f"K2's {len(plain)}"
    return f"`{_number(plain)}`"


def _number(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if value == {}:
        return "{}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**20:
        return f"{value:,}"
    return format_value(value)


def _unit(section: str, key: str) -> str:
    by_suffix = next((unit for suffix, unit in SUFFIXES.items() if key.endswith(suffix)), "")
    return UNITS.get(f"{section}.{key}") or UNITS.get(key) or by_suffix


@command
def main(arguments: Sequence[str]) -> int:
    """Bring documents and presets up to date, or name those that are not; the exit code."""
    parser = Parser(
        description="Write the tables of all config and recipe keys into docs/*.md, and presets."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file is out of date"
    )
    options = parser.parse_args(arguments)
    example = EXAMPLE.read_text(encoding="utf-8")
    try:
        found = tables(example)
    except KeyError as missing:
        raise ConfigError(
            f"{missing.args[0]}: no meaning; give it a comment in {EXAMPLE.relative_to(ROOT)}"
        ) from None
    wanted = {
        path: with_tables(path.read_text(encoding="utf-8"), found)
        for path in sorted((ROOT / "docs").glob("*.md"))
    }
    wanted |= {PRESET_FOLDER / f"{name}.yaml": preset_text(name, example) for name in PRESETS}

    code = EXIT_DONE
    for path, after in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == after:
            continue
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if options.check:
            code = EXIT_FAILED
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(after, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
