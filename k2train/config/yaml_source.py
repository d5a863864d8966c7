"""YAML source: read YAML text and dotted overrides into a tree with the origin of every value.

- PyYAML parses; `k2train.config.scalars` decides the meaning of a scalar.
- Reading does not stop at the first mistake. What cannot be read is left out of the tree, marked as
  broken, and reported together with the other mistakes.

Alternatives considered:
- `yaml.safe_load`: it reads `1e-4` as text, `no` as false and `012` as ten. It silently keeps the
  last of two equal keys, loses line numbers, and expands aliases without bound.
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from k2train.config.scalars import parse_scalar
from k2train.errors import ConfigError
from k2train.safe_json import read_plain_file

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 8
MAX_VALUES = 20_000
"""Limit of keys and values in one file; each unknown key costs a search for the nearest name."""

Path = tuple[str | int, ...]
"""Keys and list indices from the root of the tree to a value."""

_REFUSED_TAG = "!refused"
_BROKEN = object()


@dataclass(frozen=True)
class Origin:
    """Origin of a value: an override, a line of a file (from 1), or neither for a default."""

    file: str = ""
    line: int = 0
    override: str = ""

    def __str__(self) -> str:
        if self.override:
            return f"override '{self.override}'"
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Mistake:
    """One mistake and its origin."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


@dataclass
class Source:
    """Result of reading: nested plain values, origins, unreadable paths and mistakes."""

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)
    broken: set[Path] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)

    def origin_of(self, path: Path) -> Origin:
        """Return the origin of `path`, else of the nearest enclosing key, else the file's start."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.file, 1)


def dotted(path: Path) -> str:
    """Format a path: `("optimizer", "betas", 0)` as `optimizer.betas[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _refused(what: str, event: Any) -> yaml.ScalarNode:
    return yaml.ScalarNode(_REFUSED_TAG, what, event.start_mark, event.end_mark)


class _Loader(yaml.SafeLoader):
    """PyYAML composer that rejects aliases and tags and limits depth and count.

    It constructs no values.
    """

    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            return _refused(f"alias *{str(event.anchor)[:60]}", event)

        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark
            )

        self.count += 1
        if self.count > MAX_VALUES:
            problem = f"more than {MAX_VALUES} keys and values; is it a config?"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1

        if event.tag is not None:
            return _refused(f"tag {str(event.tag)[:60]}", event)
        return node


def _compose(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _yaml_problem(error: yaml.YAMLError) -> tuple[int, str]:
    """Return (line from 1, 0 if unknown; one line of text)."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (mark.line + 1 if mark else 0), " ".join(str(problem).split())


class _Reader:
    """Converts composed nodes into `source.tree`; a set `override` is the origin of all values."""

    def __init__(self, source: Source, override: str = "") -> None:
        self.source = source
        self.override = override

    def origin(self, node: Any) -> Origin:
        return (
            Origin(override=self.override)
            if self.override
            else Origin(self.source.file, node.start_mark.line + 1)
        )

    def mistake(self, node: Any, path: Path, message: str) -> None:
        self.source.mistakes.append(
            Mistake(self.origin(node), f"{dotted(path)}: {message}" if path else message)
        )

    def value(self, node: Any, path: Path) -> Any:
        """Return the plain value of `node`, or `_BROKEN` after recording the mistake."""
        if node.tag == _REFUSED_TAG:
            self.mistake(node, path, f"YAML {node.value} is not accepted; write the value out")
            self.source.broken.add(path)
            return _BROKEN

        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
            if any(item is _BROKEN for item in items):
                self.source.broken.add(path)
                return _BROKEN
            return items
        # Quoted text stays text.
        return node.value if node.style else parse_scalar(node.value)

    def item(self, node: Any, path: Path) -> Any:
        self.source.origins[path] = self.origin(node)
        return self.value(node, path)

    def mapping(self, node: Any, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _REFUSED_TAG:
                self.mistake(key_node, path, "a key must be plain text")
                continue
            key = key_node.value
            # The first of two equal keys counts.
            if key in first_lines:
                self.mistake(
                    key_node,
                    (*path, key),
                    f"duplicate key; it is already set on line {first_lines[key]}",
                )
                continue

            first_lines[key] = line
            self.source.origins[(*path, key)] = self.origin(key_node)
            value = self.value(value_node, (*path, key))
            if value is not _BROKEN:
                result[key] = value
        return result


def _read_text(path: str) -> str:
    try:
        content = read_plain_file(pathlib.Path(path), MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; is it a config?") from error

    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte {error.start})") from error


def _section_override(key: str, value: dict[Any, Any]) -> str:
    """Say how to set the keys of a section, or where a name with a dot can be set."""
    with_dot = next((str(name) for name in value if "." in str(name)), None)
    if with_dot is not None:
        return (
            f"{key}: an override sets one value, and its dots part sections; set {with_dot!r} "
            "in the file"
        )
    return f"{key}: an override sets one value; write {key}.<key>=<value>"


def _apply_override(source: Source, override: str) -> None:
    """Set one `dotted.key=value` in the tree; the value is YAML: a scalar or a `[list]`."""
    origin = Origin(override=override)
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        source.mistakes.append(
            Mistake(origin, "an override is written section.key=value, e.g. parallel.tensor=2")
        )
        return

    if key.startswith("-"):
        source.mistakes.append(
            Mistake(origin, f"overrides take no dashes; write {key.lstrip('-')}={text}")
        )
        return

    path: Path = tuple(key.split("."))

    # The override replaces the whole value, so origins below it go.
    for known in [known for known in source.origins if known[: len(path)] == path]:
        del source.origins[known]

    source.origins[path] = origin
    try:
        node = _compose(text)
        value = None if node is None else _Reader(source, override).value(node, path)
    except yaml.YAMLError as error:
        source.mistakes.append(
            Mistake(origin, f"{key}: the value is not YAML: {_yaml_problem(error)[1]}; quote it")
        )
        value = _BROKEN

    if isinstance(value, dict):
        source.mistakes.append(Mistake(origin, _section_override(key, value)))
        return

    # Walk to the key's section, creating what is missing.
    parent: Any = source.tree
    for length in range(1, len(path)):
        if parent.get(path[length - 1]) is None:
            parent[path[length - 1]] = {}
            source.origins.setdefault(path[:length], origin)
        parent = parent[path[length - 1]]
        if not isinstance(parent, dict):
            name = dotted(path[:length])
            source.mistakes.append(
                Mistake(origin, f"{key}: {name} is one value and has no keys below it")
            )
            return

    parent.pop(path[-1], None)
    if value is _BROKEN:
        source.broken.add(path)
    else:
        source.broken.discard(path)
        parent[path[-1]] = value


def read_source(path: str, overrides: Sequence[str] = ()) -> Source:
    """Read a YAML file and apply the overrides; the last one wins.

    Raises ConfigError when there is no tree: unreadable, too large, not UTF-8, not YAML, or not a
    mapping. All other mistakes are collected in `Source.mistakes`.
    """
    source = Source(file=path)
    try:
        node = _compose(_read_text(path))
    except yaml.YAMLError as error:
        line, problem = _yaml_problem(error)
        raise ConfigError(f"{Origin(path, line)}: not YAML: {problem}") from error

    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: "
            "a config is a mapping of sections, such as `model:`"
        )
    if node is not None:
        source.tree = _Reader(source).mapping(node, ())

    for override in overrides:
        _apply_override(source, override)
    return source
